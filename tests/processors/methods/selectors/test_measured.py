"""Measured masks: exact at a refresh, kept between, in turns, renewed on drift, told beforehand and freed."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import BlockSparse, DitAttnError, RectifiedSpaAttn
from dit_attn.processors.core.call import Request
from dit_attn.processors.methods.re_ttention import ReTtention
from tests._support import selector_references as references
from tests._support.compose import forward, same, tiny
from tests._support.rectified_reference import Setup
from tests.processors.methods.test_re_ttention import Layer

SETTINGS: dict[str, Any] = {"density": 0.2, "q_block": 16, "kv_block": 16, "selector": "measured", "dense_steps": 2}


def rectified(**changes: Any) -> RectifiedSpaAttn:
    return RectifiedSpaAttn(**{**SETTINGS, "pooled_block": 8, "stagger": False, "period": 4, **changes})


def layer_of(settings: Any, **given: Any) -> Layer:
    return Layer(settings, **given)


def state_of(layer: Layer) -> Any:
    (state,) = layer.layer.state.values()
    return state


def kinds(layer: Layer, steps: int, seed: int = 0) -> str:
    """What happens at each step: d(ense), R(efresh), s(parse)."""
    found = ""
    for step in range(steps):
        call, request = layer.call(step, seed), Request()
        layer.settings.request(call, request)
        if request.compute_visual is not None:
            request.compute_visual()
        found += "R" if request.compute_visual else "s" if request.layout is not None else "d"
    return found


def test_the_schedule_is_dense_then_one_refresh_a_period_and_layers_take_turns() -> None:
    assert kinds(layer_of(rectified()), 12) == "ddRsssRsssRs"
    assert kinds(layer_of(rectified(stagger=True), index=3), 12) == "dRsssRsssRss"
    assert kinds(layer_of(rectified(stagger=True), index=1), 8) == "ddRRsssR"
    assert kinds(layer_of(rectified(), total=7), 7) == "ddRsssd"  # a last refresh would be for nothing
    assert kinds(layer_of(rectified(dense_layers=(0,))), 4) == "dddd"


@pytest.mark.parametrize("measure", ["mass", "error"])
@pytest.mark.parametrize("text", [0, 21])
def test_a_refresh_is_exact_and_its_mask_is_the_best_by_definition(measure: str, text: int) -> None:
    layer = layer_of(rectified(measure=measure, keep=(), dense_steps=0), text=text)
    call = layer.call(0, 1)
    out = layer.answer(call)
    assert isinstance(out, torch.Tensor)
    exact = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (call.q, call.k, call.v)), enable_gqa=True
    ).transpose(1, 2)[:, text:]
    torch.testing.assert_close(out, exact, atol=2e-6, rtol=1e-5)
    setup = Setup(call, layer.settings, 1, 3)  # type: ignore[arg-type]
    if measure == "error":
        expected = references.block_error(setup, 16, setup.q, 16, 8)
    else:
        weights = torch.softmax(setup.logits, -1)
        parts = [part.sum(0) for part in weights.split(16)]
        expected = torch.stack([torch.stack([x.sum() for x in part.split(16)]) for part in parts])
    mask = state_of(layer).selection.layout.block_mask()[1, 3]
    forced = -(-text // 16) + 1 if text else 0
    count = int(mask.sum(-1).max())
    best = expected[:, : 20 if text else None].topk(count - forced if text else count, -1).indices
    assert bool(mask.gather(1, best).all())


def test_sparse_steps_keep_the_mask_and_pool_anew() -> None:
    layer = layer_of(rectified(dense_steps=0))
    layer.answer(layer.call(0, 1))
    first = state_of(layer).selection.layout
    requests = []
    for step, seed in ((1, 2), (2, 3)):
        request = Request()
        layer.settings.request(layer.call(step, seed), request)
        assert request.layout is first and request.selection_cost == 0.0
        requests.append(request)
    assert requests[0].compensation is not None and requests[1].compensation is not None
    assert not torch.equal(requests[0].compensation.k, requests[1].compensation.k)


def test_branches_have_masks_of_their_own() -> None:
    layer = layer_of(rectified(dense_steps=0))
    layer.answer(layer.call(0, 1, branches=("cond",)))
    layer.answer(layer.call(0, 2, branches=("uncond",)))
    masks = [state.selection.layout.block_mask() for state in layer.layer.state.values()]
    assert len(masks) == 2 and not torch.equal(*masks)


def test_drift_refreshes_a_step_after_it_is_seen() -> None:
    layer = layer_of(rectified(dense_steps=0, drift=0.3, period=50))
    seen = []
    for step, seed in enumerate((1, 1, 1, 2, 2, 2, 2)):
        request = Request()
        layer.settings.request(layer.call(step, seed), request)
        if request.compute_visual is not None:
            request.compute_visual()
        seen.append(request.compute_visual is not None)
    assert seen == [True, False, False, False, True, False, False]
    calm = layer_of(rectified(dense_steps=0, period=50))
    assert kinds(calm, 6) == "Rsssss"


def test_a_budget_that_changes_with_the_run_is_chosen_anew() -> None:
    settings = BlockSparse(**{**SETTINGS, "density": None, "densities": (0.1,) * 8 + (0.4,) * 8, "parts": 2,
                              "stagger": False, "dense_steps": 0})  # fmt: skip
    layer = layer_of(settings, total=8)
    assert kinds(layer, 7) == "RsssRss"
    assert state_of(layer).selection.layout.density == pytest.approx(0.4, abs=0.03)


@pytest.mark.parametrize("changes", [{}, {"drift": 0.5}, {"spread": "head"}, {"fine": 0.1}])
def test_memory_is_told_beforehand_and_freed(changes: dict[str, Any]) -> None:
    layer = layer_of(rectified(dense_steps=0, **changes), total=3)
    layer.answer(layer.call(0, 1))
    state = state_of(layer)
    layouts = [x for x in state.selection if x is not None]
    tensors = [t for x in layouts for t in (x.kv_indices, x.kv_num_blocks)] + list(state.means or ())
    held = sum(x.numel() * x.element_size() for x in tensors)
    told = 2 * layer.settings.cache_bytes(320, 4, 16, 4)
    assert 0 < held <= told and (changes.get("spread") == "head" or told < 1.3 * held)
    assert rectified(selector="error").cache_bytes(320, 4, 16, 4) == 0
    layer.answer(layer.call(1, 1))
    layer.answer(layer.call(2, 1))
    assert not layer.layer.state


def test_costs_and_phases_are_those_of_a_period() -> None:
    sparse = 0.2 + 1 / 8
    assert rectified().executed == pytest.approx((1 + 3 * sparse) / 4)
    assert rectified().relative_time(lambda density: density, (4, 8, 10)) == pytest.approx((1 + 3 * 1.2 * sparse) / 4)
    assert [(phase.name, phase.step, phase.count) for phase in rectified().phases(20)] == [
        ("refresh", 2, 1), ("sparse", 3, 3)
    ]  # fmt: skip
    assert not rectified(stagger=True).synchronized().stagger
    assert BlockSparse(selector="mass").synchronized() == BlockSparse(selector="mass")
    assert ReTtention().synchronized().stagger is False


def test_a_differentiated_call_is_refused() -> None:
    layer = layer_of(rectified(dense_steps=0))
    call = layer.call(0, 1)
    call.q.requires_grad_(True)
    with torch.enable_grad(), pytest.raises(DitAttnError, match="measured cannot be trained"):
        layer.settings.request(call, Request())


def test_in_a_model_density_one_is_stock_and_a_run_of_one_step_is_nearly_so() -> None:
    model, inputs = tiny("wan")
    stock = forward(model, inputs)
    with dit_attn.enabled(model, rectified(density=1.0)):
        assert same(stock, forward(model, inputs))
    for settings in (rectified(dense_steps=0), BlockSparse(**SETTINGS | {"dense_steps": 0})):
        with dit_attn.enabled(model, settings):
            out = forward(model, inputs)
            report = dit_attn.summary(model)
        assert report.sparse_calls > 0
        assert float((out - stock).norm() / stock.norm()) < 1e-4  # a refresh is exact
