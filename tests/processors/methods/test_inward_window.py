"""InwardWindow: its windows, the blocks it touches on real grids, positions and scale, and what it leaves alone."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import DitAttnError, InwardWindow
from dit_attn.kernels import inward_window, sparse_attention
from dit_attn.processors.core import executor
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.positions import PositionSite
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span
from dit_attn.processors.methods.outside_keys import anchor_places
from tests._support.compose import forward, same, tiny
from tests._support.recorded_calls import reference
from tests._support.window_masks import window_bias

GRID = (2, 16, 24)
NATIVE = (8, 12)


def method(**changes: Any) -> InwardWindow:
    return InwardWindow(**{"native": NATIVE, "kv_block": 16, "q_block": 32, **changes})


def call(
    grid: tuple[int, int, int] = GRID, text: int = 0, kind: str = "video", spans: tuple[Span, ...] = (), step: int = 0
) -> AttentionCall:
    spans = spans or (*((Span("text", text),) if text else ()), visual_span(kind, grid))
    tokens = TokenLayout(spans).resolve(sum(span.length or 0 for span in spans))
    assert tokens is not None
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, tokens.seq_len, 2, 16, generator=draw)
    layer: Any = SimpleNamespace(index=0, state={}, stateless=None, rows=(0, 2))
    clock: Any = SimpleNamespace(step=step, total=10, progress=0.0)
    return AttentionCall(q, k, v, None, None, False, layer, tokens, clock, ("uncond", "cond"))


def answer(settings: InwardWindow, of: AttentionCall) -> tuple[Request, torch.Tensor]:
    request = Request()
    settings.request(of, request)
    return request, executor.run(of, request, executor.dense_rows(of))


def by_definition(
    of: AttentionCall, window: tuple[int, int, int], scale: float = 1.0, clip: bool = False
) -> torch.Tensor:
    """Float64 attention of (B, S, H, D): each visual row in its window and all of the text, text rows in everything."""
    assert of.tokens is not None
    scaled: Any = SimpleNamespace(q=of.q, k=of.k, v=of.v, mask=None, scale=of.q.shape[-1] ** -0.5 * scale)
    return reference(scaled, Request(), window_bias(of.tokens, window, clip))


@pytest.mark.parametrize(
    "changes, window",
    [
        ({}, (2, 8, 12)),
        ({"window": "reference"}, (2, 9, 13)),
        ({"native": (7, 12), "window": "reference"}, (2, 7, 13)),
        ({"window": (6, 10)}, (2, 6, 10)),
        ({"window": (1, 6, 10)}, (1, 6, 10)),
        ({"frames": 1}, (1, 8, 12)),
        ({"window": (99, 12)}, (2, 16, 12)),
    ],
)
def test_the_window_is_the_native_size_the_odd_one_or_what_is_given(changes: Any, window: tuple[int, int, int]) -> None:
    assert method(**changes).window_of(GRID) == window


@pytest.mark.parametrize("text", [0, 7])
@pytest.mark.parametrize(
    "changes", [{}, {"border": "clip"}, {"frames": 1}, {"tile": (1, 5, 7)}, {"window": "reference"}]
)
def test_exact_windows_equal_their_definition(text: int, changes: Any) -> None:
    settings, of = method(snap="no", **changes), call(text=text)
    request, out = answer(settings, of)
    expected = by_definition(of, settings.window_of(GRID), clip=settings.border == "clip")
    torch.testing.assert_close(out.double(), expected, atol=2e-6, rtol=1e-5)
    assert request.layout is not None and 0.2 < request.layout.density < 0.9


@pytest.mark.parametrize("text", [0, 7])
def test_snapped_windows_hold_at_least_the_window_around_their_tile_and_no_partial_block(text: int) -> None:
    of = call(text=text)
    request, out = answer(method(), of)
    layout, permuted = request.layout, request.permuted
    assert layout is not None and permuted is not None
    allowed = layout.materialize()[0, 0]
    cells = allowed.shape[0]
    for block in allowed.split(layout.q_block):
        assert torch.equal(block, block[:1].expand_as(block))  # all rows of a tile alike: nothing is partial
        assert int(block[0, :cells].sum()) >= 2 * NATIVE[0] * NATIVE[1] and bool(block[0, cells:].all())
    q, k, v = (x.double().transpose(1, 2) for x in (permuted.q, permuted.k, permuted.v))
    logits = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).masked_fill(~allowed, float("-inf"))
    expected = permuted.unpermute((logits.softmax(-1) @ v).transpose(1, 2))
    torch.testing.assert_close(out[:, text:].double(), expected, atol=2e-6, rtol=1e-5)


def test_auto_snaps_on_a_cpu_where_tiles_divide_the_grid_and_are_small() -> None:
    primes = (1, 37, 41)
    assert method().layout(GRID)[0].elements is None
    assert method(snap="no").layout(GRID)[0].elements is not None
    assert method().layout(primes)[0].materialize().sum() == inward_window(primes, (1, 8, 12)).materialize().sum()


def test_pooled_keys_stand_for_what_is_outside() -> None:
    of = call()
    dense = by_definition(of, GRID)
    errors = [float((answer(method(outside=name), of)[1] - dense).norm() / dense.norm()) for name in ("none", "pooled")]
    assert errors[1] < 0.8 * errors[0]


def test_anchors_are_dense_attention_over_the_steps_that_take_every_key() -> None:
    settings = method(outside="anchors", outside_tokens=8)
    found = [answer(settings, call(text=5, step=step)) for step in range(8)]
    outs, lses = [], []
    for request, out in found:
        rows, layout = request.permuted, request.layout
        assert rows is not None and layout is not None and request.compensation is not None
        _, lse = sparse_attention(rows.q, rows.k, rows.v, layout, compensation=request.compensation, return_lse=True)
        lses.append(rows.unpermute(lse.transpose(1, 2)))
        outs.append(out[:, 5:])
    weights = torch.stack(lses).softmax(0)[..., None]
    dense = by_definition(call(text=5), GRID)[:, 5:]
    torch.testing.assert_close((torch.stack(outs) * weights).sum(0).double(), dense, atol=2e-6, rtol=1e-5)
    assert all(float((out - dense).norm() / dense.norm()) > 0.1 for out in outs)


def test_anchors_move_with_steps_and_heads_and_stay_far_from_the_last_ones() -> None:
    for tokens in (1, 2, 7, 30, 32):
        places = torch.stack([anchor_places(tokens, step, 3) for step in range(tokens)])
        assert all(torch.equal(column.sort().values, torch.arange(tokens)) for column in places.T)
        assert torch.equal(places[1:, 0], places[:-1, 1])
        gaps = (places[1:] - places[:-1]).abs()
        assert tokens < 7 or int(torch.minimum(gaps, tokens - gaps).min()) >= tokens // 4


def test_what_is_outside_can_be_damped() -> None:
    plain = answer(method(), call())[1]
    outputs = [answer(method(outside="anchors", outside_bias=bias), call())[1] for bias in (0.0, -2.0, -60.0)]
    errors = [float((out - plain).norm()) for out in outputs]
    assert errors[0] > errors[1] > errors[2] and errors[2] < 1e-4
    settings = method(outside="anchors", outside_tokens=8)
    assert settings.density_at(GRID) == pytest.approx(method().density_at(GRID) + 1 / 8)
    assert method(outside="anchors").density_at((1, 37, 41)) == 1.0  # no tile divides it: stock attention


@pytest.mark.parametrize(
    "grid, native, most, raster",
    [
        ((21, 135, 240), (45, 80), 0.14, 0.33),  # Wan 2.1 14B, 2160 x 3840
        ((21, 68, 120), (30, 52), 0.26, 0.46),  # Wan 2.1 1.3B, 1088 x 1920
        ((1, 256, 256), (64, 64), 0.095, 0.25),  # Flux, 4096 x 4096
    ],
)
def test_few_blocks_are_touched_on_the_grids_of_real_models(grid: Any, native: Any, most: float, raster: float) -> None:
    settings = InwardWindow(native=native, kv_block=128, snap="no")
    assert settings.layout(grid)[0].density <= most
    if math.prod(grid) < 200_000:
        assert inward_window(grid, settings.window_of(grid)).density >= raster


def test_a_window_that_covers_the_picture_is_left_to_stock_attention() -> None:
    request = Request()
    method(native=(16, 24)).request(call(), request)
    assert request.empty and request.declined == ["the window covers the picture"]


@pytest.mark.parametrize("outside, words", [("pooled", "pooled keys"), ("anchors", "anchors")])
def test_what_stands_for_skipped_blocks_needs_tiles_that_divide_the_picture(outside: str, words: str) -> None:
    request = Request()
    method(outside=outside).request(call(grid=(1, 37, 41)), request)
    assert request.empty and request.declined == [f"{words} need tiles that divide the picture"]


def test_a_sequence_with_references_is_left_to_stock_attention() -> None:
    spans = (Span("text", 5), visual_span("image", (1, 16, 24)), visual_span("reference", (1, 16, 24)))
    request = Request()
    method().request(call(spans=spans), request)
    assert request.empty and request.declined == ["windows need one image or video in the sequence"]


def test_a_model_at_its_native_size_is_bit_equal_and_a_larger_picture_is_not() -> None:
    net, args = tiny("wan")
    stock = forward(net, args)
    dit_attn.enable(net, method(native=(99, 99)))
    assert same(stock, forward(net, args))
    dit_attn.enable(net, method(native=(4, 4), window=(4, 4)))
    assert not same(stock, forward(net, args))
    assert dit_attn.summary(net).sparse_calls > 0
    dit_attn.disable(net)
    assert same(stock, forward(net, args))


@pytest.mark.parametrize(
    "changes, factor",
    [
        ({}, 1.0),
        ({"temperature": 1.25}, 1.25),
        ({"temperature": "entropy", "window": (16, 12)}, math.log(384, 192) ** 0.5),
    ],
)
def test_the_temperature_multiplies_the_scale(changes: Any, factor: float) -> None:
    settings, of = method(snap="no", **changes), call()
    request, out = answer(settings, of)
    assert request.scale_factor == pytest.approx(factor)
    of.scale = of.softmax_scale * factor  # as the dispatcher does before the executor runs
    _, out = answer(settings, of)
    torch.testing.assert_close(
        out.double(), by_definition(of, settings.window_of(GRID), scale=factor), atol=2e-6, rtol=1e-5
    )


def test_interpolated_positions_stay_within_the_native_range() -> None:
    layer: Any = SimpleNamespace(index=0)
    clock: Any = SimpleNamespace(step=0, noise=1.0)
    site = PositionSite(layer, (visual_span("video", GRID),), clock)
    assert method().positions(site) is None and not method().moves_positions
    moved = method(rotary="interpolated")
    placed = moved.positions(site)
    assert moved.moves_positions and placed is not None and placed.scale == (1.0, 0.5, 0.5)
    assert moved.positions(PositionSite(layer, (visual_span("video", (2, 8, 12)),), clock)) is None
    for kind in ("ntk", "yarn"):
        placed = method(rotary=kind).positions(site)
        assert placed is not None and (placed.bands, placed.scale[1], placed.native[1:]) == (kind, 0.5, (8.0, 12.0))
    for noise, power in ((1.0, 2.0), (0.5, 0.5)):
        site.clock.noise = noise
        placed = method(rotary="dype").positions(site)
        assert placed is not None and placed.bands == "ntk" and placed.scale[1] == pytest.approx(0.5**power)
    site.clock.noise = 0.0
    assert method(rotary="dype").positions(site) is None
    twin = replace(site, pass_name="twin")
    moved = method(rotary="ntk", override="text", twin_rotary="interpolated")
    assert moved.positions(twin).bands == "all" and moved.positions(site).bands == "ntk"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"native": (3,)}, r"inward-window.native must be \(h, w\) in tokens, each at least 1, got \(3,\)"),
        ({"native": (0, 3)}, "each at least 1"),
        ({"window": (1, 2, 3, 4)}, r"window must be \(h, w\) or \(t, h, w\)"),
        ({"window": "wide"}, "window must be"),
        ({"tile": (2, 2)}, r"tile must be \(t, h, w\)"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"temperature": "hot"}, "temperature must be"),
        ({"snap": "yes", "border": "clip"}, 'border "clip" needs exact windows'),
        ({"snap": "no", "outside": "pooled"}, '"pooled" needs snapped windows'),
        ({"border": "clip", "outside": "pooled"}, '"pooled" needs snapped windows; leave border="clip" out'),
        ({"border": "clip", "outside": "anchors"}, '"anchors" needs snapped windows; leave border="clip" out'),
        ({"outside_tokens": 0}, "outside_tokens must be at least 1"),
        ({"outside_bias": -math.inf}, "outside_bias must be"),
        ({"densities": (0.5,)}, "has no density"),
    ],
)
def test_settings_that_contradict_or_do_not_fit_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(DitAttnError, match=message):
        method(**changes)


def test_a_missing_native_size_is_refused_before_anything_is_changed() -> None:
    net, args = tiny("wan")
    stock = forward(net, args)
    with pytest.raises(DitAttnError, match=r"does not know the size the model was trained at; give native=\(h, w\)"):
        dit_attn.enable(net, InwardWindow())
    assert same(stock, forward(net, args))
    dit_attn.enable(net, InwardWindow(window=(4, 4)))


def test_snapping_that_was_asked_for_needs_tiles_that_divide_the_grid() -> None:
    with pytest.raises(DitAttnError, match=r"tile \(1, 5, 7\) does not divide the grid"):
        method(snap="yes", tile=(1, 5, 7)).layout(GRID)
