"""Dispatch of one attention call: methods or stock attention and why, the numeric guard, and observers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

import dit_attn
from dit_attn import BlockSparse, models
from dit_attn.kernels import Compensation
from dit_attn.processors.attach.attach import session_of
from dit_attn.processors.core import dispatch, executor
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span
from dit_attn.processors.guidance.perturbation import Perturbation
from tests._support.compose import forward, tiny
from tests._support.core_calls import GRID, JOINT, TEXT, VISUAL, Dispatched, host_run, random_args, stock_attention
from tests._support.recorded_calls import reference
from tests._support.span_biases import SpanBiases

BLOCKS: dict[str, Any] = {"q_block": 32, "kv_block": 32, "dense_steps": 0}
CALL = {**models.call_defaults("tiny-image"), "height": 64, "width": 64, "num_inference_steps": 2}


# -- the numeric guard ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = models.load("tiny-image")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    out: torch.Tensor = pipe("a circle", generator=generator, output_type="latent", **CALL).images
    return out


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_poison_in_a_later_run_is_found_and_ends_with_the_session(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    dit_attn.disable(pipe)
    stock = latents(pipe)
    with dit_attn.enabled(pipe, BlockSparse(density=0.25, **BLOCKS)):
        clean = latents(pipe)
        assert dit_attn.summary(pipe).sparse_calls
        with monkeypatch.context() as patch:
            patch.setattr(executor, "sparse_attention", lambda q, *args, **kwargs: torch.full_like(q, value))
            with pytest.warns(UserWarning, match="NaN or infinity"):
                assert torch.equal(latents(pipe), stock)
        assert torch.equal(latents(pipe), stock)  # no layer is trusted again
        report = dit_attn.summary(pipe)
        assert report.sparse_calls == 0 and "NaN or infinity" in str(report)
    with dit_attn.enabled(pipe, BlockSparse(density=0.25, **BLOCKS)):
        assert torch.equal(latents(pipe), clean)


def test_a_mask_that_is_expanded_over_heads_and_rows_is_one_of_keys() -> None:
    keys = torch.rand(2, 1, 1, TEXT + VISUAL, generator=torch.Generator().manual_seed(1)) < 0.8
    heads, length = random_args().q.shape[2], TEXT + VISUAL
    found = []
    for mask in (keys, keys.expand(2, heads, length, length)):
        run, layer = host_run([BlockSparse(density=0.5, **BLOCKS)])
        done = Dispatched(run, layer, random_args(mask=mask))
        assert done.stock_calls == 0 and layer.stats.sparse_calls == 1, layer.stats.fallbacks
        found.append(done.out)
    assert torch.equal(*found)
    run, layer = host_run([BlockSparse(density=0.5, **BLOCKS)])
    square = keys.expand(2, heads, length, length).clone()
    assert Dispatched(run, layer, random_args(mask=square)).stock_calls == 1  # its rows may differ


def test_the_bound_is_measured_for_every_density_of_a_layer(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(
        executor, "sampled_error", lambda call, request, out: seen.append((call.layer.index, call.clock.step)) or 0.1
    )
    same, other = (0.5,) * 6 * 2, (0.5,) * 6 + (0.25,) * 6
    for table, times in ((same, 1), (other, 2)):
        seen.clear()
        with dit_attn.enabled(pipe, BlockSparse(densities=table, parts=2, max_error=0.5, **BLOCKS)):
            latents(pipe)
        assert sorted(seen) == sorted((layer, step) for layer in range(6) for step in range(times))


def test_a_part_of_the_run_that_is_too_sparse_sends_its_layers_dense(pipe: Any) -> None:
    with dit_attn.enabled(pipe, BlockSparse(density=0.5, max_error=10.0, **BLOCKS)):
        latents(pipe)
        bound = 1.5 * max(layer.error for layer in dit_attn.summary(pipe).layers)
    table = BlockSparse(densities=(0.5,) * 6 + (0.125,) * 6, parts=2, max_error=bound, **BLOCKS)
    with dit_attn.enabled(pipe, table), pytest.warns(UserWarning, match="above max_error"):
        latents(pipe)
        report = dit_attn.summary(pipe)
    broken = [layer for layer in report.layers if layer.fallbacks]
    assert broken and all(layer.sparse_calls == 1 and layer.error > bound for layer in broken)
    assert report.worst_error is not None and report.worst_error[0] > bound


def test_an_error_that_is_not_a_number_is_above_every_bound(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.executor, "sampled_error", lambda *args: float("nan"))
    dit_attn.disable(pipe)
    stock = latents(pipe)
    with dit_attn.enabled(pipe, BlockSparse(density=0.25, max_error=100.0, **BLOCKS)):
        with pytest.warns(UserWarning, match="error nan is above"):
            assert torch.equal(latents(pipe), stock)
        assert dit_attn.summary(pipe).sparse_calls == 0


# -- observers --------------------------------------------------------------------------------------------------------


def test_an_observer_sees_every_call_and_changes_nothing() -> None:
    model, inputs = tiny("wan")
    before = forward(model, inputs)
    seen: list[tuple[str, tuple[int, ...], bool]] = []
    with dit_attn.observing(
        model, lambda call, request, out: seen.append((call.layer.name, tuple(out.shape), request.layout is None))
    ):
        during = forward(model, inputs)
    assert torch.equal(before, during)
    assert session_of(model) is None
    assert len({name for name, *_ in seen}) == len(seen) > 0
    assert all(stock for *_, stock in seen)


def test_an_observer_sees_the_layout_a_method_asked_for_and_what_it_gave() -> None:
    model, inputs = tiny("wan")
    method = dit_attn.BlockSparse(density=0.5, q_block=32, kv_block=32, dense_steps=0)
    seen = {}
    with (
        dit_attn.enabled(model, method),
        dit_attn.observing(model, lambda call, request, out: seen.update({call.layer.name: (request.layout, out)})),
    ):
        forward(model, inputs)
        session = session_of(model)
        assert session is not None and session.observers
    layout, out = next((layout, out) for layout, out in seen.values() if layout is not None)
    assert layout.density < 0.75
    assert torch.isfinite(out).all()
    assert session.observers == []


# -- a host that is not diffusers -------------------------------------------------------------------------------------

SPARSE = BlockSparse(density=0.3, **BLOCKS)
LAST = torch.arange(2) == 1
KEY_MASK = ~(LAST[:, None] & (torch.arange(TEXT + VISUAL) < 6)[None])  # six text keys of the second row do not exist


@pytest.mark.parametrize("mask", [None, KEY_MASK, KEY_MASK[:, None, None], torch.randn(2, 4, 1, TEXT + VISUAL)],
                         ids=["no mask", "keys", "boolean", "additive"])  # fmt: skip
@pytest.mark.parametrize("scale", [None, 0.4])
def test_a_call_of_a_bare_run_state_is_the_softmax_over_its_layout(
    mask: torch.Tensor | None, scale: float | None
) -> None:
    run, layer = host_run([SPARSE])
    done = Dispatched(run, layer, random_args(mask=mask, scale=scale))
    assert done.call is not None and done.request.layout is not None and done.stock_calls == 0
    assert 0.2 < done.request.layout.density < 0.6
    torch.testing.assert_close(done.out.double(), reference(done.call, done.request), atol=3e-6, rtol=1e-5)
    assert (layer.stats.calls, layer.stats.sparse_calls, layer.stats.fallbacks) == (1, 1, {})
    share = VISUAL / (TEXT + VISUAL)
    assert layer.stats.computed == pytest.approx(share * done.request.layout.density + 1 - share)


def test_density_one_is_bit_equal_to_stock_and_counted_as_a_fallback() -> None:
    run, layer = host_run([BlockSparse(density=1.0, **BLOCKS)])
    args = random_args()
    done = Dispatched(run, layer, args)
    assert torch.equal(done.out, stock_attention(args))
    assert done.request.layout is None and layer.stats.fallbacks == {"density 1": 1} and not layer.stats.sparse_calls


def test_dense_calls_are_timed_where_a_sparse_method_left_them_dense() -> None:
    run, layer = host_run([BlockSparse(density=0.3, q_block=32, kv_block=32, dense_steps=1)])
    for step, timed in ((0, 1), (1, 1)):
        run.clock.step = step
        Dispatched(run, layer, random_args())
        assert layer.stats.dense_calls == timed and layer.stats.dense_seconds > 0
    assert layer.stats.sparse_calls == 1 and layer.stats.seconds > 0
    run, layer = host_run([dit_attn.SoftPAG()])
    Dispatched(run, layer, random_args())
    assert layer.stats.dense_calls == layer.stats.dense_seconds == 0


class ValueOnly(TorchFunctionMode):
    """A mode of other code around the attention call."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return func(*args, **(kwargs or {}))


VIDEO = TokenLayout((visual_span("video", GRID),))
APART = TokenLayout((visual_span("image", (1, 12, 12)), Span("text", 20), visual_span("image", (1, 12, 12))))
FALLBACKS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no method enabled": ({"methods": []}, {}),
    dispatch.ONLY_GUIDANCE: ({"methods": [dit_attn.SoftPAG()]}, {}),
    "cross attention": ({}, {"keys": 77}),
    "causal attention": ({}, {"causal": True}),
    "unknown token layout for 307 tokens": ({"layout": VIDEO}, {"seq_len": 307}),
    "visual tokens are not consecutive": ({"layout": APART}, {}),
    "sequence under 256 tokens": ({"layout": TokenLayout((visual_span("image", (1, 10, 10)),))}, {"seq_len": 100}),
    "square attention mask": ({}, {"mask": torch.ones(1, 1, 308, 308, dtype=torch.bool)}),
    "attention mask of shape (2, 3, 1, 308)": ({}, {"mask": torch.ones(2, 3, 1, 308, dtype=torch.bool)}),
    "attention mask of shape (2, 308, 308)": ({"methods": [SpanBiases()]}, {"mask": torch.zeros(2, 308, 308)}),
    "BlockMask attention mask": ({}, {"mask": type("BlockMask", (), {"ndim": 0})()}),
    "attention dropout": ({}, {"dropout": 0.1}),
    "ring attention": ({}, {"unsupported": "ring attention"}),
    "dense step": ({"methods": [BlockSparse(density=0.3, q_block=32, kv_block=32, dense_steps=1)]}, {}),
}


@pytest.mark.parametrize("reason", FALLBACKS)
def test_a_call_that_no_method_carries_out_takes_the_stock_result_and_counts_the_reason(reason: str) -> None:
    made, given_args = FALLBACKS[reason]
    run, layer = host_run(**{"methods": [SPARSE], **made})
    args, result = random_args(**given_args), torch.full((1,), 7.0)
    for count in (1, 2):
        assert dispatch.dispatch_attention(run, layer, args, lambda args: result) is result
        assert layer.stats.fallbacks == {reason: count} and layer.stats.sparse_calls == 0


def test_a_layout_that_could_not_be_found_and_a_function_mode_leave_calls_to_stock() -> None:
    run, layer = host_run([SPARSE])
    run.set_layout(None, "layout of wan: KeyError: 'grid'")
    assert Dispatched(run, layer, random_args()).stock_calls == 1
    run.set_layout(JOINT)
    with ValueOnly():
        assert Dispatched(run, layer, random_args()).stock_calls == 1
    with torch.device("cpu"):  # torch's own mode changes nothing
        assert Dispatched(run, layer, random_args()).stock_calls == 0
    assert list(layer.stats.fallbacks) == [
        "layout of wan: KeyError: 'grid'", "ValueOnly is active around the attention call"
    ]  # fmt: skip


def test_a_kernel_that_fails_disables_its_layer_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    run, layer = host_run([SPARSE])
    other, args = run.add_layer("blocks.1"), random_args()

    def broken(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("no image for this device\nand more")

    with monkeypatch.context() as patch, pytest.warns(UserWarning, match=r"blocks\.0 goes back to dense attention"):
        patch.setattr(executor, "sparse_attention", broken)
        done = Dispatched(run, layer, args)
    assert torch.equal(done.out, stock_attention(args)) and done.request.layout is None
    assert layer.disabled == "kernel failed: RuntimeError: no image for this device"
    assert Dispatched(run, layer, args).stock_calls == 1 and layer.stats.fallbacks == {layer.disabled: 2}
    assert Dispatched(run, other, args).stock_calls == 0


@pytest.mark.filterwarnings("ignore:dit_attn. blocks.0 goes back to dense attention")
def test_nan_of_the_input_ends_with_the_run_and_nan_of_the_kernel_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    run, layer = host_run([SPARSE, SpanBiases()])
    args = random_args()
    poisoned = replace(args, v=torch.full_like(args.v, float("nan")))
    Dispatched(run, layer, poisoned)
    assert (layer.disabled, layer.disabled_run) == ("kernel gave NaN or infinity", True)
    layer.begin_run()
    run.clock.run += 1
    assert layer.disabled is None
    with monkeypatch.context() as patch:
        patch.setattr(executor, "sparse_attention", lambda q, *args, **kwargs: torch.full_like(q, float("nan")))
        Dispatched(run, layer, args)
    assert (layer.disabled, layer.disabled_run) == ("kernel gave NaN or infinity", False)
    Dispatched(run, layer, poisoned)  # with the bias alone: says nothing about the kernel
    assert not layer.disabled_run


def test_results_are_looked_at_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    run, layer = host_run([SPARSE])
    looked: list[Any] = []
    monkeypatch.setattr(dispatch, "_is_finite", lambda out, mesh: looked.append(out) or True)
    for expected in (1, 1, 2):
        run.clock.run += expected == 2
        Dispatched(run, layer, random_args())
        assert len(looked) == expected


def test_a_call_that_several_methods_decline_is_one_fallback() -> None:
    class Declines:
        role, min_tokens, sites = "", 0, ("self",)

        def request(self, call: AttentionCall, request: Request) -> None:
            request.decline("not here")

    run, layer = host_run([BlockSparse(density=1.0), Declines()])
    assert Dispatched(run, layer, random_args()).stock_calls == 1
    assert layer.stats.fallbacks == {"not here": 1}


def test_the_second_call_of_a_processor_is_to_the_image_and_only_its_methods_are_asked() -> None:
    kinds = []

    class OfImages:
        role, min_tokens, sites = "", 0, ("image",)

        def request(self, call: AttentionCall, request: Request) -> None:
            kinds.append((call.kind, call.layer.rows))

    run, _ = host_run([OfImages()])
    layer = run.add_layer("blocks.0.cross", ("cross", "image"))
    for turn in (0, 1, 0, 1):  # a model that attends sample by sample
        one = random_args(keys=TEXT, turn=turn)
        Dispatched(run, layer, replace(one, q=one.q[:1], k=one.k[:1], v=one.v[:1]))
    assert kinds == [("image", (0, 1)), ("image", (1, 2))]
    assert layer.stats.fallbacks["no method for cross attention"] == 2


def test_a_perturbed_pass_changes_the_rows_behind_the_plain_ones() -> None:
    plain = Dispatched(*host_run([SPARSE]), random_args())
    run, layer = host_run([SPARSE], rows=1)
    run.append_perturbed(Perturbation({"blocks.0": {1: 1.0}}), 1)
    found = Dispatched(run, layer, random_args())
    assert found.call is not None and found.call.branches == ("cond", "perturbed")
    assert torch.equal(found.out[0], plain.out[0]) and torch.equal(found.out[1, :, 0], plain.out[1, :, 0])
    assert torch.equal(found.out[1, :, 1], random_args().v[1, :, 0])  # the identity returns the values
    wide = Perturbation({"blocks.0": {1: 1.0}}, target="uniform")
    with run.perturbing(wide, 2), pytest.raises(dit_attn.DitAttnError, match="split over devices"):
        Dispatched(run, layer, random_args(unsupported="ring attention"))


def test_observers_do_not_see_a_sequence_that_is_split() -> None:
    run, layer = host_run([SPARSE])
    assert Dispatched(run, layer, random_args(unsupported="ring attention")).call is None
    assert Dispatched(run, layer, random_args()).call is not None


@pytest.mark.parametrize("visual_density", [0.25, 0.5])
def test_what_is_computed_counts_text_rows_and_pooled_keys(visual_density: float) -> None:
    args = random_args()
    run, layer = host_run([SPARSE])
    call = AttentionCall(args.q, args.k, args.v, None, None, False, layer, run.tokens(308), run.clock)
    request = Request(compute_visual=lambda: args.q, visual_density=visual_density)
    share = VISUAL / (TEXT + VISUAL)
    assert dispatch.computed_fraction(call, request) == pytest.approx(share * visual_density + 1 - share)
    pooled = torch.zeros(2, 2, 9, 16)
    request.compensation = Compensation(pooled, pooled, torch.zeros(1, 1, 9), 32)
    more = share * (visual_density + 9 / 308) + 1 - share
    assert dispatch.computed_fraction(call, request) == pytest.approx(more)
