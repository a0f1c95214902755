"""RectifiedSpaAttn: its limits, its equations, and what it promises on inputs where the answer is known."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import DitAttnError, RectifiedSpaAttn
from dit_attn.kernels import pool_blocks
from dit_attn.kernels.layouts.block_layout import BlockLayout
from dit_attn.kernels.layouts.token_order import block_neighbors, token_order
from dit_attn.processors.core import executor
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.dispatch import computed_fraction
from dit_attn.processors.core.token_permute import token_permutation
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span
from dit_attn.processors.methods import pooled_scores
from dit_attn.processors.methods.pooled_scores import ordered_scores
from dit_attn.processors.methods.selectors import RULES
from tests._support.compose import forward, same, tiny
from tests._support.rectified_reference import Setup, pooled_map, rectified

GRID = (5, 6, 8)
TEXT = 21


def method(**changes: Any) -> RectifiedSpaAttn:
    return RectifiedSpaAttn(**{"density": 0.3, "q_block": 16, "kv_block": 16, "dense_steps": 0, **changes})


def call(
    text: str = "", batch: int = 2, heads: int = 4, key_heads: int = 2, masked: int = 0, seed: int = 0, **given: Any
) -> AttentionCall:
    """An attention call over a clip with text "" (none), "first" or "last"; ``masked`` text keys do not exist."""
    spans = [visual_span("video", GRID)]
    if text:
        spans.insert(0 if text == "first" else 1, Span("text", TEXT))
    tokens = TokenLayout(tuple(spans)).resolve(math.prod(GRID) + (TEXT if text else 0))
    assert tokens is not None
    draw = torch.Generator().manual_seed(seed)
    shape = (batch, tokens.seq_len)
    q = torch.randn(*shape, heads, 16, generator=draw)
    k, v = (torch.randn(*shape, key_heads, 16, generator=draw) for _ in range(2))
    q, k, v = (given.get(name, x) for name, x in (("q", q), ("k", k), ("v", v)))
    mask = None
    if masked:
        mask = torch.ones(batch, 1, 1, tokens.seq_len, dtype=torch.bool)
        start = next(span.start for span in tokens.spans if span.kind == "text")
        mask[-1, ..., start + TEXT - masked : start + TEXT] = False
    layer: Any = SimpleNamespace(index=0)
    clock: Any = SimpleNamespace(total=10, step=5)
    return AttentionCall(q, k, v, mask, None, False, layer, tokens, clock, ("cond",) * batch, layer_count=4)


def run(case: AttentionCall, settings: RectifiedSpaAttn) -> tuple[torch.Tensor, Request]:
    """(B, Sv, H, D) visual rows of the result, and the request."""
    request = Request()
    assert executor.read_mask(case, request) is None
    settings.request(case, request)
    out = executor.run(case, request, executor.dense_rows(case))
    assert case.tokens is not None and case.tokens.visual_range is not None
    start, stop = case.tokens.visual_range
    return out[:, start:stop], request


def dense(case: AttentionCall) -> torch.Tensor:
    """(B, Sv, H, D) float64, exact attention of the visual rows."""
    settings = method(order="none", compensation="none")
    assert case.tokens is not None and case.tokens.visual_range is not None
    visual = case.tokens.visual_range[1] - case.tokens.visual_range[0]
    return rectified(case, settings, BlockLayout.dense(visual, case.tokens.seq_len, 16, 16))


SETTINGS = {
    "none": {"compensation": "none"},
    "paper": {"compensation": "paper"},
    "repo": {"compensation": "repo"},
    "ungated": {"compensation": "repo", "gate": False},
    "merge": {"pooled_block": 4},
    "variance": {"pooled_block": 8, "variance": True},
    "top-p": {"top_p": 0.6, "selector": "mass"},
    "extra": {"budget": "extra", "keep": ("neighbors", "first-frame"), "density": 0.1},
    "tiles": {"order": "tiles", "tile": (2, 2, 4)},
    "boxes": {"order": "tiles"},
    "curve": {"order": "hilbert"},
    "pieces": {"probe": 4},
    "pieces by mass": {"probe": 8, "selector": "mass", "q_block": 8},
    "row-major": {"order": "none", "selector": "mass"},
    "first order": {"pooled_block": 8, "first_order": True},
    "two levels": {"pooled_block": 16, "fine": 0.2, "fine_block": 4},
    "all terms": {"pooled_block": 8, "fine": 0.1, "first_order": True, "variance": True, "spread": "head"},
    "one threshold": {"pooled_block": 8, "spread": "layer", "selector": "ear"},
}


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("text, masked", [("", 0), ("first", 0), ("last", 5)])
def test_every_setting_follows_its_equations(name: str, text: str, masked: int) -> None:
    settings, case = method(**SETTINGS[name]), call(text, masked=masked)
    out, request = run(case, settings)
    assert request.layout is not None and 0.05 < request.layout.density < 0.9
    fine = request.fine.layout if request.fine is not None else None
    expected = rectified(case, settings, request.layout, fine)
    torch.testing.assert_close(out.double(), expected, atol=3e-6, rtol=1e-5)


def test_every_compensation_is_part_of_what_is_computed() -> None:
    case = call()
    shares = {}
    for name in ("merge", "first order", "two levels", "all terms"):
        _, request = run(case, method(**SETTINGS[name]))
        shares[name] = float(computed_fraction(case, request))
    assert shares["merge"] == pytest.approx(5 / 15 + 1 / 4)
    assert shares["first order"] == pytest.approx(5 / 15 + 1 / 8 + 16 / 240)
    assert shares["two levels"] == pytest.approx(5 / 15 + 1 / 16 + 3 / 15 / 4)
    assert shares["all terms"] == pytest.approx(5 / 15 + 1.5 / 8 + 2 / 15 / 2 + 16 / 240)
    assert method(**SETTINGS["two levels"]).executed == pytest.approx(0.3 + 1 / 16 + 0.2 / 4)
    assert method(pooled_block=8, variance=True).executed == pytest.approx(0.3 + 1.5 / 8)
    with pytest.raises(DitAttnError, match=r"fine belongs to compensation merge, not paper"):
        method(compensation="paper", fine=0.1)
    with pytest.raises(DitAttnError, match=r"fine_block must divide kv_block 16, got 5"):
        method(fine=0.1, fine_block=5)


@pytest.mark.parametrize("text, masked", [("", 0), ("first", 4), ("last", 0)])
def test_the_pooled_map_weighs_text_by_token_and_ragged_blocks_by_count(text: str, masked: int) -> None:
    settings, case = method(), call(text, masked=masked)
    _, request = run(case, settings)
    assert request.permuted is not None
    found = torch.softmax(ordered_scores(request.permuted, 16, 16, 16**-0.5), -1)
    for batch in range(2):
        expected = pooled_map(Setup(case, settings, batch, 3), settings)
        torch.testing.assert_close(found[batch, 3].double(), expected, atol=1e-6, rtol=1e-5)


def test_the_order_is_boxes_of_one_block_where_they_divide_the_grid_and_the_curve_elsewhere() -> None:
    def order(grid: tuple[int, int, int], block: int, **options: Any) -> Any:
        tokens = TokenLayout((visual_span("video", grid), Span("text", 7))).resolve(math.prod(grid) + 7)
        assert tokens is not None
        return method(q_block=block, kv_block=block, **options).token_order(tokens)

    assert order((9, 12, 12), 36) == ("tiles", (3, 3, 4)) and order((1, 32, 32), 32) == ("tiles", (1, 4, 8))
    assert order((21, 45, 80), 128) == ("hilbert", None)
    assert order((21, 45, 80), 120, order="hilbert") == ("hilbert", None)
    assert order((9, 12, 12), 36, order="tiles", tile=(1, 6, 6)) == ("tiles", (1, 6, 6))
    assert order((21, 45, 80), 128, order="tiles") == ("tiles", None)  # boxes of 128 tokens, cut off at the borders


@pytest.mark.parametrize("select", ["mass", "error"])
@pytest.mark.parametrize("text, masked", [("", 0), ("last", 5)])
def test_pieces_rank_blocks_by_what_is_inside_them(select: str, text: str, masked: int) -> None:
    settings, case = method(probe=4, selector=select), call(text, masked=masked)
    request = Request()
    assert executor.read_mask(case, request) is None
    rows = request.permute(case, *settings.token_order(case.tokens))
    whole = ordered_scores(rows, 16, 16, 0.25)
    found = RULES[select].rank(settings.selector_input(rows, 0.25)).scores.exp()
    mass = torch.softmax(ordered_scores(rows, 4, 4, 0.25), -1)
    if select == "error":
        values = pool_blocks(rows.v, 4, rows.key_mask).repeat_interleave(2, 1)
        mass = (mass * torch.cdist(mass @ values, values)).square()
    for i, j in ((0, 0), (3, 5), (14, whole.shape[-1] - 1)):
        total = mass[..., 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].sum((-1, -2))
        torch.testing.assert_close(found[..., i, j], total.sqrt() if select == "error" else total, atol=1e-6, rtol=1e-4)


def test_ranking_a_few_heads_at_a_time_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    case = call("last", masked=3)
    whole, _ = run(case, method(probe=4))
    monkeypatch.setattr(pooled_scores, "AT_ONCE", 1)
    apart, _ = run(case, method(probe=4))
    assert torch.equal(whole, apart)


def test_only_a_forced_or_well_scored_block_is_read_and_the_budget_holds() -> None:
    settings, case = method(keep=("first-frame",), density=0.5), call("last")
    _, request = run(case, settings)
    assert request.layout is not None and request.permuted is not None
    mask, order = request.layout.block_mask(), request.permuted.order
    forced = order.forced(settings.keep, case.q.shape[1], 16, 16)
    assert mask[forced.expand_as(mask)].all()
    first = torch.zeros(GRID, dtype=torch.bool)
    first[0] = True
    holds = torch.stack([part.any() for part in first.flatten()[order.parts[0].order].split(16)])
    assert torch.equal(forced[0, 0, 0, : len(holds)], holds)  # blocks that really hold a token of the first frame
    assert forced[0, 0, :, 15:].all()  # text
    assert int(mask.sum(-1).max()) == math.ceil(0.5 * mask.shape[-1])


def test_neighbors_of_two_block_sizes_and_two_grids_match_brute_force() -> None:
    orders = (token_order("hilbert", (3, 4, 5)), token_order("hilbert", (1, 4, 4)))
    found = block_neighbors(*orders, block=8, kv_block=6)
    places = torch.cat([order.coordinates() + 100 * i for i, order in enumerate(orders)])
    near = (places[:, None] - places[None]).abs().amax(-1) <= 1
    expected = torch.zeros_like(found)
    for a, b in near.nonzero().tolist():
        expected[a // 8, b // 6] = True
    assert torch.equal(found, expected)


def block_constant(case: AttentionCall, settings: RectifiedSpaAttn) -> AttentionCall:
    """The same call with keys and queries that do not vary within a block."""
    assert case.tokens is not None
    order = token_permutation(case.tokens, *settings.token_order(case.tokens), torch.device("cpu"))
    assert order.keys is not None
    out = {}
    for name in ("q", "k"):
        x = getattr(case, name).clone()
        for low in range(0, order.visual, 16):
            places = order.keys[low : min(low + 16, order.visual)]
            x[:, places] = x[:, places[:1]]
        out[name] = x
    return call("last" if len(case.tokens.spans) > 1 else "", **out)


@pytest.mark.parametrize("compensation", ["merge", "repo", "paper"])
@pytest.mark.parametrize("text", ["", "last"])
def test_blocks_of_equal_keys_are_recovered_exactly(compensation: str, text: str) -> None:
    settings = method(compensation=compensation, pooled_block=16)
    case = block_constant(call(text), settings)
    out, _ = run(case, settings)
    plain, _ = run(case, method(compensation="none"))
    exact = dense(case)
    torch.testing.assert_close(out.double(), exact, atol=1e-5, rtol=1e-4)
    assert (plain - exact).norm() > 0.05 * exact.norm()


@pytest.mark.parametrize("compensation", ["merge", "repo", "none"])
def test_rows_sum_to_one(compensation: str) -> None:
    case = call("first", v=torch.ones(2, 261, 2, 16))
    out, _ = run(case, method(compensation=compensation))
    torch.testing.assert_close(out, torch.ones_like(out), atol=1e-5, rtol=0)


def test_rows_of_the_paper_form_lose_what_the_gate_rejects() -> None:
    case = call(v=torch.ones(2, 240, 2, 16))
    out, _ = run(case, method(compensation="paper"))
    assert float(out.max()) <= 1.0 + 1e-5 and float(out.min()) < 0.9


def test_keys_that_do_not_exist_never_count() -> None:
    case, settings = call("last", masked=6), method()
    before, _ = run(case, settings)
    assert case.mask is not None
    gone = ~case.mask[-1, 0, 0]
    case.k[-1, gone], case.v[-1, gone] = 50.0, -50.0
    after, _ = run(case, settings)
    torch.testing.assert_close(before, after, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("compensation", ["merge", "repo"])
def test_rows_and_heads_of_a_batch_are_independent(compensation: str) -> None:
    case, settings = call("last", key_heads=4), method(compensation=compensation)
    both, _ = run(case, settings)
    alone, _ = run(call("last", batch=1, heads=4, key_heads=4, q=case.q[1:], k=case.k[1:], v=case.v[1:]), settings)
    torch.testing.assert_close(both[1:], alone, atol=1e-6, rtol=1e-6)


def test_merge_beats_dropping_on_smooth_keys() -> None:
    t, h, w = (torch.linspace(0, 3, n) for n in GRID)
    field = torch.stack(torch.meshgrid(t, h, w, indexing="ij"), -1).reshape(1, 240, 1, 3)
    waves = torch.sin(field @ torch.randn(3, 16, generator=torch.Generator().manual_seed(1))) * 2
    noise = torch.randn(1, 240, 1, 16, generator=torch.Generator().manual_seed(2))
    v = torch.randn(1, 240, 1, 16, generator=torch.Generator().manual_seed(3)) + waves
    case = call(batch=1, heads=1, key_heads=1, q=waves, k=waves + 0.3 * noise, v=v)
    exact = dense(case)
    error = {
        name: float((run(case, method(density=0.15, **settings))[0] - exact).norm() / exact.norm())
        for name, settings in (("none", {"compensation": "none"}), ("merge", {"pooled_block": 4}))
    }
    assert error["merge"] < 0.5 * error["none"]


def test_density_one_is_stock_and_bad_settings_are_named() -> None:
    model, inputs = tiny("wan")
    before = forward(model, inputs)
    with dit_attn.enabled(model, method(density=1.0)):
        assert same(before, forward(model, inputs))
    with pytest.raises(DitAttnError, match=r"pooled_block.*divide kv_block 16.*5"):
        method(pooled_block=5)
    with pytest.raises(DitAttnError, match=r"compensation.*'papr'"):
        method(compensation="papr")
    with pytest.raises(DitAttnError, match=r"tile.*three"):
        method(tile=(2, 2))


def test_a_layer_above_the_error_bound_goes_dense_and_says_so() -> None:
    model, inputs = tiny("wan")
    stock = forward(model, inputs)
    with (
        pytest.warns(UserWarning, match="above max_error"),
        dit_attn.enabled(model, method(density=0.05, compensation="none", max_error=1e-6)),
    ):
        assert same(stock, forward(model, inputs))
        report = dit_attn.summary(model)
    assert report.sparse_calls == 0 and "max_error" in " ".join(report.fallbacks)
    assert report.worst_error is not None and report.worst_error[0] > 1e-6
    with dit_attn.enabled(model, method(max_error=10.0)):
        forward(model, inputs)
        report = dit_attn.summary(model)
    assert report.sparse_calls and report.worst_error is not None and "worst error" in str(report)


def test_a_poisoned_layer_goes_dense() -> None:
    model, inputs = tiny("wan")
    stock = forward(model, inputs)

    class Poison(RectifiedSpaAttn):
        def plan(self, call: AttentionCall, request: Request) -> None:
            super().plan(call, request)
            assert request.compensation is not None
            if call.layer.index == 0:
                request.compensation.k.fill_(float("nan"))

    with (
        pytest.warns(UserWarning, match="NaN"),
        dit_attn.enabled(model, Poison(density=0.3, q_block=16, kv_block=16, dense_steps=0)),
    ):
        forward(model, inputs)
        layers = dit_attn.summary(model).layers
    assert layers[0].sparse_calls == 0 and all(layer.sparse_calls for layer in layers[1:])
    assert same(stock, forward(model, inputs))
