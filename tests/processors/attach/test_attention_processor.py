"""Wrapped attention processors: the stock class with its call intercepted, and exactly the stock object after it."""

from __future__ import annotations

import copy
import functools
import inspect
import pickle
import threading
import types
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.models.attention_processor import JointAttnProcessor2_0
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor, FluxIPAdapterAttnProcessor
from diffusers.models.transformers.transformer_wan import WanAttnProcessor

import dit_attn
from dit_attn.processors.attach import attention_processor, compat
from dit_attn.processors.attach.attention_processor import (
    is_wrapped,
    tap_of,
    unwrap_processor,
    wrap_processor,
)
from dit_attn.processors.core.layer import Layer
from tests._support.compose import SPARSE, forward, tiny
from tests._support.core_calls import JOINT, host_run, random_args, stock_attention
from tests._support.wrapped_processors import BLOCKS, TorchProcessor, session_like, wrapped


class DecoratedProcessor(TorchProcessor):
    """Its call is decorated, as by a deprecation."""

    @functools.wraps(TorchProcessor.__call__)
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return TorchProcessor.__call__(self, *args, **kwargs)


class LinearProcessor:
    """No softmax attention."""

    def __call__(self, attn: Any, x: torch.Tensor) -> torch.Tensor:
        return x.cumsum(1)


def helper(q: torch.Tensor) -> torch.Tensor:
    """Attention in a function of the processor's own module."""
    return F.scaled_dot_product_attention(q, q, q)


class HelperProcessor:
    """Attention in a helper."""

    def __call__(self, attn: Any, q: torch.Tensor) -> torch.Tensor:
        return helper(q)


# -- what can be intercepted ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("processor", "tap"),
    [
        (WanAttnProcessor(), "dispatch"),
        (FluxAttnProcessor(), "dispatch"),
        (JointAttnProcessor2_0(), "torch"),
        (TorchProcessor(), "torch"),
        (DecoratedProcessor(), "torch"),
        (HelperProcessor(), "torch"),
        (LinearProcessor(), None),
        (torch.nn.ReLU(), None),
    ],
    ids=lambda value: type(value).__name__ if value is not None and not isinstance(value, str) else str(value),
)
def test_the_way_in_is_found_in_the_code_of_the_processor(processor: Any, tap: str | None) -> None:
    assert tap_of(processor) == tap


def test_a_processor_without_attention_is_refused_with_its_layer() -> None:
    run, layer = host_run([])
    with pytest.raises(dit_attn.DitAttnError, match=r"layer blocks\.0 runs LinearProcessor, which has no softmax"):
        wrap_processor(LinearProcessor(), run, layer)  # type: ignore[arg-type]


# -- wrap and unwrap --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stock", [TorchProcessor(0.5), WanAttnProcessor()], ids=["torch", "dispatch"])
def test_a_wrapped_processor_has_class_signature_and_state_of_the_stock_one(stock: Any) -> None:
    before = dict(vars(stock))
    processor, _run, _layer = wrapped(stock)
    assert is_wrapped(processor) and not is_wrapped(stock) and isinstance(processor, type(stock))
    assert inspect.signature(type(processor).__call__) == inspect.signature(type(stock).__call__)
    assert {name: value for name, value in vars(processor).items() if not name.startswith("_dit_")} == {
        name: value for name, value in before.items() if name != "_attention_backend"
    }
    assert type(wrapped(stock)[0]) is type(processor)  # one derived class for all layers
    assert type(processor).__name__ == f"DitAttn{type(stock).__name__}"
    assert unwrap_processor(processor) is stock and vars(stock) == before


def test_wrapping_a_wrapped_processor_wraps_the_stock_one() -> None:
    stock = TorchProcessor()
    first, _run, _layer = wrapped(stock)
    second, run, layer = wrapped(first)
    assert vars(second)["_dit_stock"] is stock and vars(second)["_dit_run"] is run
    assert vars(second)["_dit_layer"] is layer


def test_a_processor_that_is_a_module_keeps_its_weights() -> None:
    stock = FluxIPAdapterAttnProcessor(8, 8, num_tokens=(4,))
    processor, _run, _layer = wrapped(stock)
    assert isinstance(processor, torch.nn.Module)
    weights, others = dict(processor.named_parameters()), dict(stock.named_parameters())
    assert weights.keys() == others.keys() and all(weights[name] is others[name] for name in weights)
    assert unwrap_processor(processor) is stock


def test_what_other_code_writes_to_a_wrapped_processor_is_on_the_stock_one_after_it() -> None:
    stock = WanAttnProcessor()
    processor, _run, _layer = wrapped(stock)
    assert processor._attention_backend is compat.backend_member()  # what diffusers reads
    processor._attention_backend = AttentionBackendName.NATIVE  # what set_attention_backend writes
    processor._parallel_config = "parallel"
    assert processor._attention_backend is compat.backend_member()
    assert unwrap_processor(processor) is stock
    assert (stock._attention_backend, stock._parallel_config) == (AttentionBackendName.NATIVE, "parallel")
    again, _run, _layer = wrapped(stock)
    assert vars(again)["_dit_dense_backend"] is AttentionBackendName.NATIVE
    again._attention_backend = None
    unwrap_processor(again)
    assert stock._attention_backend is None


def test_a_backend_that_was_never_set_stays_the_class_s_own() -> None:
    stock = WanAttnProcessor()
    processor, _run, _layer = wrapped(stock)
    unwrap_processor(processor)
    assert "_attention_backend" not in vars(stock)


def test_a_processor_is_pickled_as_its_stock_class_and_state() -> None:
    processor, _run, _layer = wrapped(TorchProcessor(0.7))
    loaded = pickle.loads(pickle.dumps(processor))
    assert type(loaded) is TorchProcessor and vars(loaded) == {"scale": 0.7}


def test_a_processor_is_copied_with_the_run_of_the_copied_model() -> None:
    model, _ = tiny("wan")
    session = dit_attn.enable(model, SPARSE)
    clone = copy.deepcopy(model)
    processor: Any = clone.get_submodule(session.layers[1].name).processor
    run, layer = vars(processor)["_dit_run"], vars(processor)["_dit_layer"]
    assert is_wrapped(processor) and run is not session and run.model is clone and layer is run.layers[1]
    stock: Any = vars(model.get_submodule(session.layers[1].name).processor)["_dit_stock"]
    assert unwrap_processor(processor) is not stock and type(unwrap_processor(processor)) is type(stock)


# -- the calls --------------------------------------------------------------------------------------------------------


def test_a_processor_that_calls_torch_goes_through_the_method() -> None:
    method = dit_attn.BlockSparse(density=0.3, **BLOCKS)
    processor, run, layer = wrapped(TorchProcessor(), [method])
    args = random_args(scale=0.3)
    found = processor(None, args.q, args.k, args.v)
    assert layer.stats.sparse_calls == 1 and run.layout is JOINT
    assert (found - stock_attention(args)).abs().max() > 1e-3
    dense, _run, other = wrapped(TorchProcessor(), [dit_attn.BlockSparse(density=1.0, **BLOCKS)])
    assert torch.equal(dense(None, args.q, args.k, args.v), TorchProcessor()(None, args.q, args.k, args.v))
    assert other.stats.fallbacks == {"density 1": 1}


def test_masks_of_a_torch_processor_reach_the_method_and_other_functions_are_left_alone() -> None:
    mask = torch.rand(2, 1, 1, 308, generator=torch.Generator().manual_seed(1)) < 0.8
    args = random_args(scale=0.3)
    processor, run, layer = wrapped(TorchProcessor(), [dit_attn.BlockSparse(density=0.3, **BLOCKS)])
    seen: list[Any] = []
    run.observers.append(lambda call, request, out: seen.append((call.mask, call.scale, tuple(call.q.shape))))
    processor(None, args.q, args.k, args.v, mask)
    assert seen[0][0] is mask and seen[0][1:] == (0.3, (2, 308, 4, 16)) and layer.stats.sparse_calls == 1
    F.scaled_dot_product_attention(args.q, args.q, args.q)  # outside the processor nothing is intercepted
    assert layer.stats.calls == 1


def test_a_processor_created_again_from_its_class_is_stock_until_the_next_call_wraps_it() -> None:
    """Loaders of IP-Adapters replace all processors, many by ``processor.__class__()``."""
    model, args = tiny("wan")
    plain = forward(model, args)
    session = dit_attn.enable(model, SPARSE)
    sparse = forward(model, args)
    layer: Any = model.get_submodule(session.layers[0].name)
    before = layer.processor
    model.set_attn_processor({name: value.__class__() for name, value in model.attn_processors.items()})  # type: ignore
    assert type(layer.processor) is WanAttnProcessor
    session.reset()
    assert torch.equal(forward(model, args), sparse)
    assert is_wrapped(layer.processor) and layer.processor is not before
    dit_attn.disable(model)
    assert type(layer.processor) is WanAttnProcessor and torch.equal(forward(model, args), plain)


def test_arguments_of_a_new_processor_reach_the_stock_class() -> None:
    made = type(wrapped(TorchProcessor())[0])(scale=0.9)
    assert type(made) is TorchProcessor and made.scale == 0.9
    module = type(wrapped(FluxIPAdapterAttnProcessor(8, 8))[0])(8, 16)
    assert type(module) is FluxIPAdapterAttnProcessor and module.hidden_size == 8


def test_the_backend_outside_a_wrapped_layer_is_refused() -> None:
    args = random_args()
    with pytest.raises(RuntimeError, match="outside a wrapped attention layer"):
        attention_processor._backend(args.q, args.k, args.v)


def test_layers_nest_and_an_error_leaves_no_layer_active() -> None:
    slot = attention_processor._SLOT

    class Dispatching(WanAttnProcessor):
        """Calls another processor, then fails or tells which layer is active."""

        def __call__(self, attn: Any, inner: Any = None, fails: bool = False) -> Any:
            first = slot.layer
            second = inner(attn) if inner is not None else None
            if fails:
                raise InterruptedError
            return first, second, slot.layer

    outer, inner = (wrapped_as_dispatch(Dispatching()) for _ in range(2))
    first, second, third = outer[0](None, inner[0])
    assert first is third is outer[1].handle and second[0] is inner[1].handle
    with pytest.raises(InterruptedError):
        outer[0](None, inner[0], fails=True)
    assert slot.layer is None and slot.run is None
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.append(slot.layer))
    slot.layer = outer[1].handle
    try:
        thread.start()
        thread.join()
    finally:
        slot.layer = None
    assert seen == [None]  # another thread has layers of its own


def wrapped_as_dispatch(processor: Any) -> tuple[Any, Layer]:
    """A processor with the tap of dispatching ones, whatever its code mentions."""
    run, layer = session_like([])
    clone: Any = object.__new__(attention_processor._derive(type(processor), "dispatch"))
    clone.__dict__.update(_dit_layer=layer, _dit_run=run, _dit_stock=processor, _dit_dense_backend=None)
    return clone, layer


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The function modes that processors ran in."""
    made: list[Any] = []
    begin = attention_processor._TorchTap.__init__
    monkeypatch.setattr(
        attention_processor._TorchTap, "__init__", lambda self, *given: made.append(self) or begin(self, *given)
    )
    return made


@pytest.mark.parametrize("name", ["pixart", "sd3"])
def test_code_of_diffusers_runs_without_a_mode_until_other_code_changes_what_it_calls(
    name: str, modes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, args = tiny(name)
    with dit_attn.enabled(model, SPARSE):
        expected = forward(model, args)
        assert not modes and dit_attn.summary(model).sparse_calls
        module = inspect.getmodule(next(iter(model.attn_processors.values())).__class__.__mro__[1])
        monkeypatch.setattr(module, "F", types.SimpleNamespace(**vars(F)))
        assert torch.equal(forward(model, args), expected) and modes


@pytest.mark.parametrize("known", [True, False])
def test_attention_that_other_code_puts_in_the_place_of_torch_s_is_the_stock_one(
    known: bool, modes: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    stock, calls = F.scaled_dot_product_attention, []

    def of_other_code(*given: Any, **more: Any) -> torch.Tensor:
        calls.append(given)
        return stock(*given, **more)

    model, args = tiny("sd3")
    with dit_attn.enabled(model, SPARSE):
        expected = forward(model, args)
    if not known:
        monkeypatch.setattr(attention_processor, "same_as_copy", lambda call: None)
        attention_processor._derive.cache_clear()
    monkeypatch.setattr(F, "scaled_dot_product_attention", of_other_code)
    with dit_attn.enabled(model, SPARSE):
        assert torch.equal(forward(model, args), expected) and bool(modes) is not known
    before = len(calls)
    with dit_attn.enabled(model, dit_attn.BlockSparse(density=1.0)):
        forward(model, args)
    assert len(calls) - before == len(model.attn_processors)
    monkeypatch.undo()
    attention_processor._derive.cache_clear()
