"""The operator of compiled graphs is the dispatch of its layer; what cannot be compiled is refused in one line."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.processors.attach import intercepted_call
from dit_attn.processors.core.call import SDPAArgs
from tests._support.core_calls import host_run, random_args
from tests._support.wrapped_processors import BLOCKS, TorchProcessor, wrapped


@pytest.mark.parametrize("trained", ["", "transformer", "method"])
def test_the_operator_of_compiled_graphs_is_the_dispatch_of_its_layer_and_is_not_trained(trained: str) -> None:
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([torch.nn.Module()])
    processor, run, layer = wrapped(TorchProcessor(), [dit_attn.BlockSparse(density=0.3, **BLOCKS)])
    model.blocks[0].processor = processor
    run.module = lambda layer: model.blocks[0]
    args = random_args(scale=0.3)
    layer.learned = {1: torch.nn.Linear(1, 1).requires_grad_(trained == "method")}
    grads = (True, trained == "transformer")
    given = (layer.handle, run.handle, args.q, args.k, args.v, None, 0.3, False, True, False, *grads)
    if trained:
        with pytest.raises(dit_attn.DitAttnError, match=r"cannot be trained inside torch\.compile"):
            torch.ops.dit_attn.attend(*given)
        return
    out = torch.ops.dit_attn.attend(*given)
    assert out.is_contiguous() and layer.stats.sparse_calls == 1
    assert torch.equal(out, processor(model.blocks[0], args.q, args.k, args.v))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes = [mode.from_tensor(x) for x in (args.q, args.k, args.v)]
        shape = torch.ops.dit_attn.attend(layer.handle, run.handle, *fakes, *given[5:]).shape
    assert shape == out.shape


def test_the_result_of_stock_attention_is_contiguous_as_the_graph_expects() -> None:
    model = torch.nn.Module()
    model.processor = processor = wrapped(TorchProcessor(), [dit_attn.BlockSparse(density=1.0)])[0]
    run, layer = processor._dit_run, processor._dit_layer
    run.module = lambda layer: model
    args = random_args()
    out = torch.ops.dit_attn.attend(
        layer.handle, run.handle, args.q, args.k, args.v, None, None, False, True, False, False, False
    )
    assert out.is_contiguous() and layer.stats.fallbacks == {"density 1": 1}


@pytest.mark.parametrize("parallel", (False, True))
def test_a_call_that_is_not_parallel_stays_so_in_a_parallel_model(
    parallel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []
    monkeypatch.setattr(intercepted_call, "dispatch_backend", lambda *args: given.append(args[3]) or args[2].q.clone())
    run, layer = host_run([])
    kind = type("Kind", (), {"_dit_tap": "dispatch", "_parallel_config": "two ranks"})
    run.module = lambda layer: SimpleNamespace(processor=kind())  # type: ignore[attr-defined]
    x = torch.zeros(1, 4, 1, 8)
    torch.ops.dit_attn.attend(layer.handle, run.handle, x, x, x, None, None, False, False, parallel, False, False)
    assert given == ["two ranks" if parallel else None]


def test_a_session_is_found_by_its_handle() -> None:
    run, _layer = host_run([])
    assert intercepted_call.session_by_handle(run.handle) is run  # type: ignore[comparison-overlap]


def test_an_exported_graph_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intercepted_call, "_is_exporting", lambda: True)
    run, layer = host_run([])
    x = torch.zeros(1, 4, 1, 8)
    with pytest.raises(dit_attn.DitAttnError, match=r"torch\.export would freeze the decisions"):
        intercepted_call.compiled_attention(layer.handle, run.handle, SDPAArgs(x, x, x), parallel=False)
