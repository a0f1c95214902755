"""Re-weighting: every mode by its equation in float64, what stays as it is, and what the released code's form does."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from dit_attn import AdaptiveReweighting, BlockSparse, DitAttnError
from dit_attn.processors.core.cfg import BATCHED
from dit_attn.processors.core.row_weights import RowWeights
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span
from tests._support.core_calls import GRID, TEXT, VISUAL, Dispatched, host_run, random_args, stock_attention
from tests._support.recorded_calls import reference, weights
from tests._support.reweighted import reweighted

SPARSE = BlockSparse(density=0.4, q_block=32, kv_block=32, dense_steps=0)
SETTINGS: dict[str, Any] = {"start": 0, "stop": 9, "w_min": 0.5, "w_max": 3.0}
CONCEPT = (3, 4, 11)  # words of the text
MODES = ("bias", "gain", "logit")


def given(high: float = 2.5) -> RowWeights:
    """Weights of two samples on the grid of a frame; those of the first are 1 but for one cell."""
    draw = torch.Generator().manual_seed(3)
    cells = torch.ones(2, *GRID[1:])
    cells[0, 2, 3] = high
    cells[1, 1:5, 2:7] = 0.6 + torch.rand(4, 5, generator=draw) * (high - 0.6)
    columns = torch.zeros(2, TEXT, dtype=torch.bool)
    columns[:, list(CONCEPT)] = True
    return RowWeights(cells, columns)


def dispatched(
    method: AdaptiveReweighting, value: RowWeights | None, *others: Any, kind: str = "self",
    dtype: torch.dtype = torch.float64, cfg: Any = None,
) -> Dispatched:  # fmt: skip
    """A call of two rows: two samples, or with ``cfg`` the unconditional and the conditional row of one."""
    if kind == "cross":
        run, _ = host_run([method, *others], TokenLayout((visual_span("video", GRID),)), text_kind="cross")
        layer = run.add_layer("blocks.0.attn2", ("cross",))
        args = random_args(VISUAL, keys=TEXT)
    else:
        run, layer = host_run([method, *others], **({"cfg": cfg} if cfg is not None else {}))
        args = random_args()
    if cfg is not None:
        run.branch_count = lambda rows: 2  # type: ignore[method-assign]
    run.begin_call(2)
    if value is not None:
        run.given["reweighting"] = value
    return Dispatched(run, layer, replace(args, q=args.q.to(dtype), k=args.k.to(dtype), v=args.v.to(dtype)))


def row_weights(value: RowWeights, kind: str, low: float = 0.5, high: float = 3.0) -> torch.Tensor:
    """(2, S) fp64: weights of all rows, 1 for those of the text."""
    cells = value.weights.clamp(low, high).double()[:, None].expand(-1, GRID[0], -1, -1).flatten(1)
    return cells if kind == "cross" else torch.cat([torch.ones(2, TEXT, dtype=torch.float64), cells], 1)


def key_mask(kind: str) -> torch.Tensor:
    """(Sk,) bool: the concept's keys; the text comes first."""
    mask = torch.zeros(TEXT if kind == "cross" else TEXT + VISUAL, dtype=torch.bool)
    mask[list(CONCEPT)] = True
    return mask


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["self", "cross"])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_every_mode_is_its_equation(mode: str, kind: str, dtype: torch.dtype, error: float) -> None:
    done = dispatched(AdaptiveReweighting(mode=mode, **SETTINGS), given(), kind=kind, dtype=dtype)
    expected = reweighted(done.call, done.request, mode, row_weights(given(), kind), key_mask(kind))
    torch.testing.assert_close(done.out.double(), expected, atol=error, rtol=error)
    assert not torch.allclose(expected, reference(done.call, done.request), atol=2 * error)


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_joins_a_layout(mode: str) -> None:
    done = dispatched(AdaptiveReweighting(mode=mode, **SETTINGS), given(), SPARSE, dtype=torch.float32)
    assert done.request.layout is not None and done.request.layout.density < 0.9
    expected = reweighted(done.call, done.request, mode, row_weights(given(), "self"), key_mask("self"))
    torch.testing.assert_close(done.out.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", ["self", "cross"])
def test_weights_of_1_are_stock_attention_bit_for_bit(mode: str, kind: str) -> None:
    ones = replace(given(), weights=torch.ones(2, *GRID[1:]))
    for value in (ones, None):
        done = dispatched(AdaptiveReweighting(mode=mode, **SETTINGS), value, kind=kind, dtype=torch.float32)
        assert done.stock_calls == 1 and done.request.empty and done.call is not None
        stock = stock_attention(replace(random_args(), q=done.call.q, k=done.call.k, v=done.call.v))
        assert torch.equal(done.out, stock)
        reason = "nothing requested" if value is not None else "no weights are given"
        assert done.call.layer.stats.fallbacks == {reason: 1}


@pytest.mark.parametrize("mode", MODES)
def test_other_rows_stay_as_they_are(mode: str) -> None:
    one = RowWeights(given().weights[1:], given().columns[1:])  # type: ignore[index]
    done = dispatched(AdaptiveReweighting(mode=mode, **SETTINGS), one, cfg=BATCHED)
    assert done.call is not None and done.call.branches == ("uncond", "cond")
    changed = (done.out - reference(done.call, done.request)).abs().amax((2, 3)) > 1e-9
    assert not changed[0].any() and not changed[1, :TEXT].any()
    assert torch.equal(changed[1], row_weights(given(), "self")[1] != 1)


def test_a_share_rises_with_the_weight_except_that_of_scaled_logits() -> None:
    shares: dict[str, list[torch.Tensor]] = {"bias": [], "logit": []}
    for mode, found in shares.items():
        for weight in (1.0, 1.5, 2.5):
            value = replace(given(), weights=torch.full((2, *GRID[1:]), weight))
            done = dispatched(AdaptiveReweighting(mode=mode, **SETTINGS), value, kind="cross")
            bias = done.request.bias(slice(0, VISUAL))
            matrix = None if bias is None else bias.q.double() @ bias.k.double().mT
            found.append(weights(done.call, done.request, matrix)[0][..., list(CONCEPT)].sum(-1))
    assert all(bool((b > a).all()) for a, b in zip(shares["bias"], shares["bias"][1:]))
    lowered = (shares["logit"][2] < shares["logit"][0]).double().mean()
    assert 0.1 < lowered < 0.5  # of the rows: those whose logits of the concept are negative in the main


def test_a_gain_on_every_word_is_a_factor_of_the_output() -> None:
    value = replace(given(), columns=None)
    done = dispatched(AdaptiveReweighting(mode="gain", **SETTINGS), value, kind="cross")
    expected = reference(done.call, done.request) * row_weights(value, "cross")[..., None, None]
    torch.testing.assert_close(done.out, expected, atol=1e-12, rtol=1e-12)


def test_words_are_found_wherever_the_text_stands_in_the_sequence() -> None:
    value = given()
    for layout, first in (((Span("text", TEXT), visual_span("image", (1, 16, 18))), 0),
                          ((visual_span("image", (1, 16, 18)), Span("text", TEXT)), VISUAL)):  # fmt: skip
        run, layer = host_run([AdaptiveReweighting(mode="gain", **SETTINGS)], TokenLayout(layout))
        run.given["reweighting"] = replace(value, weights=torch.full((1, 16, 18), 2.0))
        args = random_args()
        args.v.zero_()
        args.v[:, first + CONCEPT[1]] = 1.0  # only one word of the concept has a value
        before = stock_attention(args)
        out = Dispatched(run, layer, args).out
        rows = torch.arange(TEXT + VISUAL)
        text = (rows >= first) & (rows < first + TEXT)
        torch.testing.assert_close(out[:, ~text], 2 * before[:, ~text])
        assert torch.equal(out[:, text], before[:, text])


def test_the_region_itself_may_be_attended_to_more() -> None:
    region = torch.zeros(1, *GRID[1:], dtype=torch.bool)
    region[0, 1:6, 1:8] = True
    value = replace(given(), region=region.expand(2, -1, -1))
    method = AdaptiveReweighting(columns="both", **SETTINGS)
    assert AdaptiveReweighting(columns="region").sites == ("self",) and method.sites == ("text", "self")
    done = dispatched(method, value)
    keys = key_mask("self")
    keys[TEXT:] = region[0].expand(GRID[0], -1, -1).flatten()
    expected = reweighted(done.call, done.request, "bias", row_weights(value, "self"), keys)
    torch.testing.assert_close(done.out, expected, atol=1e-12, rtol=1e-12)


def test_the_largest_weight_depends_on_what_is_attended_to() -> None:
    method = AdaptiveReweighting()
    assert (method.highest("cross"), method.highest("self")) == (1.5, 4.0)
    assert AdaptiveReweighting(w_max=2.0).highest("cross") == 2.0
    done = dispatched(replace(method, start=0, stop=9), given(9.0), kind="cross")
    assert done.request.biases and float(done.request.biases[0].rows.max()) == pytest.approx(math.log(1.5))


@pytest.mark.parametrize("settings", [{"start": 1}, {"stop": 0}])
def test_steps_outside_of_the_bounds_are_stock(settings: dict[str, Any]) -> None:
    done = dispatched(AdaptiveReweighting(**{**SETTINGS, **settings}), given())
    assert done.stock_calls == 1 and done.request.empty


def test_weights_follow_the_change_and_the_step_before() -> None:
    region = torch.zeros(1, 4, 4, dtype=torch.bool)
    region[:, :2] = True
    change = torch.ones(1, 4, 4)
    change[:, 1] = 0.0
    method = AdaptiveReweighting(blur=False, w_max=3.0)
    first = method.next_weights(change, region)
    assert (first[0, 1] > 1.5).all() and (first[0, [0, 2, 3]] == 1).all()
    torch.testing.assert_close(method.next_weights(torch.ones(1, 4, 4), region, first), 0.5 * first + 0.5)
    smooth = AdaptiveReweighting(w_max=3.0).next_weights(change, region)
    assert 1 < smooth[0, 0].min() <= smooth[0, 1].max() < first.max()


def test_the_report_has_the_share_of_the_mask_before_and_after() -> None:
    shares = []
    for weight in (1.0, 3.0):
        region = torch.ones(2, *GRID[1:], dtype=torch.bool)
        value = replace(given(), weights=torch.full((2, *GRID[1:]), weight), region=region)
        method = AdaptiveReweighting(observe=True, **SETTINGS)
        run, layer = host_run([method])
        run.given["reweighting"] = value
        done = Dispatched(run, layer, random_args())
        report = run.reports["reweighting"]
        bias = done.request.bias(slice(TEXT, TEXT + VISUAL)) if weight != 1 else None
        matrix = None if bias is None else torch.nn.functional.pad(bias.q @ bias.k.mT, (0, 0, TEXT, 0))
        expected = weights(done.call, done.request, matrix)[0][:, :, TEXT:, list(CONCEPT)].sum(-1).mean()
        assert report.shares[0] == pytest.approx(float(expected), rel=1e-4)
        assert report.means[0] == report.highest[0] == weight and not report.warnings
        assert f"weights {weight:.2f} on average" in str(report)
        shares.append(report.shares[0])
    assert shares[0] < shares[1]


def test_the_settings_are_saved_and_come_back(tmp_path: Any) -> None:
    method = AdaptiveReweighting(mode="gain", w_max=2.0)
    method.save_pretrained(tmp_path)
    assert AdaptiveReweighting.from_pretrained(tmp_path) == method


def test_what_does_not_fit_is_one_line() -> None:
    with pytest.raises(DitAttnError, match=r"reweighting.mode"):
        AdaptiveReweighting(mode="scale")
    with pytest.raises(DitAttnError, match=r"reweighting.w_min"):
        AdaptiveReweighting(w_min=1.5)
    run, layer = host_run([AdaptiveReweighting(**SETTINGS)])
    run.given["reweighting"] = torch.ones(1, 2, 2)
    with pytest.raises(DitAttnError, match="the weights of reweighting must be RowWeights, got Tensor"):
        Dispatched(run, layer, random_args())
