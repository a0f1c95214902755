"""comfy-kitchen: its dense INT8 attention behind our call, on request; its sparse kernel against fp64 formulas."""

from __future__ import annotations

import inspect
import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels import BlockLayout, choose_backend, reference_attention, sparse_attention
from dit_attn.kernels.backends import kitchen, registry
from dit_attn.kernels.backends.registry import BACKENDS, CallInfo
from dit_attn.kernels.problem import Problem

NAME = "comfy-kitchen"
DENSE = BlockLayout.dense(200, 200, 64, 64)
CUDA = CallInfo(torch.device("cuda"), torch.bfloat16, 128, 128, DENSE)
WHY = "comfy-kitchen is not installed here, only on request: pip install 'dit-attn[kitchen]'"


class Kitchen(types.ModuleType):
    """The two functions that the adapter calls, with the signatures of 0.2.40."""

    available = True

    @staticmethod
    def int8_attention(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        *,
        scale: float | None = None,
        attn_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if any(x.stride(-1) != 1 for x in (q, k, v)):
            raise ValueError("the last dimension of q, k, and v must be contiguous")
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=True)

    @classmethod
    def int8_attention_is_available(cls, device: torch.device | None = None) -> bool:
        return cls.available


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> type[Kitchen]:
    """A kitchen on the CPU."""
    monkeypatch.setitem(sys.modules, "comfy_kitchen", Kitchen("comfy_kitchen"))
    monkeypatch.setattr(registry, "unsupported_reason_kitchen", lambda device: None)
    monkeypatch.setattr(Kitchen, "available", True)
    return Kitchen


def inputs(dim: int = 32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(2, 200, 4, dim, generator=generator)
    k, v = (torch.randn(2, 200, 2, dim, generator=generator) for _ in range(2))
    return q, k, v


@pytest.mark.parametrize("layout", ["bshd", "bhsd", "last"])
def test_a_dense_call_goes_there_with_its_scale_and_grouped_heads(stub: type[Kitchen], layout: str) -> None:
    q, k, v = inputs()
    expected, _ = reference_attention(q.double(), k.double(), v.double(), DENSE, scale=0.3)
    if layout == "last":  # channels that are not side by side are copied
        q, k, v = (x.transpose(1, 3).contiguous().transpose(1, 3) for x in (q, k, v))
    given = [x.transpose(1, 2) for x in (q, k, v)] if layout == "bhsd" else [q, k, v]
    order = "bhsd" if layout == "bhsd" else "bshd"
    out = sparse_attention(*given, DENSE, scale=0.3, backend=NAME, tensor_layout=order)  # type: ignore[arg-type]
    assert isinstance(out, torch.Tensor)
    out = out.transpose(1, 2) if layout == "bhsd" else out
    assert out.shape == q.shape and float((out - expected).abs().max()) < 1e-5


def test_it_is_never_chosen(stub: type[Kitchen]) -> None:
    choice = choose_backend(inputs()[0], DENSE)
    assert choice.backend == "sdpa" and choice.reasons[NAME] == "rounds q, k and v to 8 bits; only on request"
    assert choose_backend(inputs()[0], _half()).backend != NAME


def _half() -> BlockLayout:
    return BlockLayout.from_mask(torch.eye(4, dtype=torch.bool)[None, None], 200, 200, 64, 64)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"layout": _half()}, "its sparse kernel takes no lists, it chooses the blocks itself"),
        ({"lse": True}, "log-sum-exp"),
        ({"terms": True}, "no key mask, bias or other optional term"),
        ({"keys_altered": True}, "no key mask, bias or other optional term"),
        ({"grad": True}, "it has no gradients"),
        ({"value_dim": 64}, "k and v differ in head size, 128 and 64"),
        ({"head_dim": 320, "value_dim": 320}, "head size 320 is above 256"),
        ({"dtype": torch.float64}, "8 bits"),
    ],
)
def test_what_it_cannot_run_is_refused_with_the_reason(stub: type[Kitchen], change: dict[str, Any], why: str) -> None:
    assert BACKENDS[NAME].unsupported_reason(CUDA) is None
    assert why in (BACKENDS[NAME].unsupported_reason(replace(CUDA, **change)) or "")


def test_where_it_cannot_run_is_known_without_importing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kitchen, "has_kitchen", lambda: False)
    with pytest.raises(DitAttnError, match="comfy-kitchen is not installed"):
        sparse_attention(*inputs(), DENSE, backend=NAME)
    monkeypatch.setattr(kitchen, "has_kitchen", lambda: True)
    assert kitchen.unsupported_reason_kitchen(torch.device("cpu")) == "its INT8 attention is for GPUs"
    for capability, why in (((7, 0), "the GPU is older than compute capability 7.5"), ((7, 5), None)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        assert kitchen.unsupported_reason_kitchen(torch.device("cuda")) == why
    monkeypatch.setattr(torch.version, "hip", "7.0")  # which AMD GPUs it has is left to the package
    assert kitchen.unsupported_reason_kitchen(torch.device("cuda")) is None


def test_what_goes_wrong_inside_is_one_line(stub: type[Kitchen], monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem(*inputs(), DENSE, 0.3, None, None)
    monkeypatch.setattr(Kitchen, "available", False)
    with pytest.raises(DitAttnError, match=r"has no INT8 attention for cpu, .* leave backend='comfy-kitchen' out"):
        kitchen.kitchen_attention(problem)
    monkeypatch.setattr(Kitchen, "available", True)
    with pytest.raises(DitAttnError, match=r"refuses the call \(.*\); leave backend='comfy-kitchen' out"):
        kitchen.kitchen_attention(replace(problem, k=problem.k[..., :8]))
    monkeypatch.setitem(sys.modules, "comfy_kitchen", None)
    with pytest.raises(DitAttnError, match="comfy-kitchen cannot be imported"):
        kitchen.kitchen_attention(problem)


@pytest.mark.parametrize("name", ["int8_attention", "int8_attention_is_available"])
def test_the_package_has_the_signatures_that_are_called(name: str) -> None:
    package = pytest.importorskip("comfy_kitchen", reason=WHY)
    theirs, ours = (
        [(p.name, p.kind, p.default) for p in inspect.signature(getattr(one, name)).parameters.values()]
        for one in (package, Kitchen)
    )
    assert theirs == ours


@pytest.mark.parametrize(
    ("ratio", "sinks", "rows"), [(0.25, [0, 0], [0, 0]), (0.2, [1, 3], [5, 6]), (0.5, [0, 8], [0, 0])]
)
def test_its_sparse_kernel_chooses_blocks_by_pooled_scores_and_adds_the_diagonal(
    ratio: float, sinks: list[int], rows: list[int]
) -> None:
    """What ``sol_attn`` computes without its pooled tail, in our terms; a list cannot be given to it."""
    package = pytest.importorskip("comfy_kitchen", reason=WHY)
    taken = set(inspect.signature(package.sol_attn).parameters)
    assert not {"layout", "kv_indices", "block_mask", "indices", "mask"} & taken
    generator = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(2, 500, 2, 128, generator=generator) for _ in range(3))
    found = package.sol_attn(q, k, v, topk_ratio=ratio, sink_blocks=sinks, sink_q=rows, tail=False)
    mask = pooled_choice(q.double(), k.double(), ratio, sinks, rows)
    layout = BlockLayout.from_mask(mask, 500, 500, 64, 64)
    expected, _ = reference_attention(q.double(), k.double(), v.double(), layout)
    assert float((found - expected).abs().max()) < 1e-5
    assert 0.2 < layout.density <= 1.0


def pooled_choice(q: torch.Tensor, k: torch.Tensor, ratio: float, sinks: list[int], rows: list[int]) -> torch.Tensor:
    """The blocks of 64 x 64 (B, H, n, n) that ``sol_attn`` attends to.

    A share of those that are no sinks, by the scores of block means, then the diagonal with both neighbors, the sinks,
    and full rows.
    """
    means = [torch.stack([part.mean(1) for part in x.split(64, 1)], 2) for x in (q, k)]  # (B, H, n, D)
    scores = means[0] @ means[1].transpose(-1, -2)
    index = torch.arange(scores.shape[-1])
    sink = (index >= sinks[0]) & (index < sinks[1])
    others = int((~sink).sum())
    count = max(0, min(others - 1, max(1, round(ratio * others))))
    scores = scores.masked_fill(sink, float("-inf"))
    chosen = torch.zeros_like(scores, dtype=torch.bool).scatter(-1, scores.topk(count, -1).indices, True)
    chosen = chosen | ((index[:, None] - index).abs() <= 1) | sink
    return chosen | ((index >= rows[0]) & (index < rows[1]))[:, None]
