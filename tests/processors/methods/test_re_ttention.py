"""ReTtention: its schedule, its equations, what it remembers and when it forgets."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import dit_attn
from dit_attn import DitAttnError, ReTtention
from dit_attn.processors.attach.attach import session_of
from dit_attn.processors.core import executor
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.tokens import Span, TokenLayout, Tokens, visual_span
from dit_attn.processors.methods.re_ttention import MASKS, band_layout, window_layout
from tests._support.compose import forward, pipeline_run, same, tiny, tiny_pipeline
from tests._support.reshaped_reference import kept_and_dense, read_pairs, reshaped

GRID = (4, 8, 10)
CPU = torch.device("cpu")


def method(**changes: Any) -> ReTtention:
    return ReTtention(**{"density": 0.15, "q_block": 16, "kv_block": 16, "dense_steps": 2, "stagger": False, **changes})


class Layer:
    """A layer of a run that never ends by itself: makes calls, step by step."""

    def __init__(self, settings: ReTtention, total: int = 100, text: int = 0, index: int = 0) -> None:
        self.settings, self.total = settings, total
        spans = (*((Span("text", text),) if text else ()), visual_span("video", GRID))
        tokens = TokenLayout(spans).resolve(math.prod(GRID) + text)
        assert tokens is not None
        self.tokens: Tokens = tokens
        self.layer: Any = SimpleNamespace(index=index, state={}, stateless=None, rows=(0, 2))

    def call(self, step: int, seed: int, branches: tuple[str, ...] = ("uncond", "cond"), **given: Any) -> AttentionCall:
        draw = torch.Generator().manual_seed(seed)
        shape = (len(branches), self.tokens.seq_len)
        q = given.get("q", torch.randn(*shape, 4, 16, generator=draw))
        k, v = (given.get(n, torch.randn(*shape, 2, 16, generator=draw)) for n in "kv")
        clock: Any = SimpleNamespace(step=step, total=self.total, progress=step / self.total)
        return AttentionCall(q, k, v, None, None, False, self.layer, self.tokens, clock, branches, layer_count=8)

    def answer(self, call: AttentionCall) -> torch.Tensor | str:
        """(B, Sv, H, D), or why the call was left to the stock path."""
        request = Request()
        self.settings.request(call, request)
        if request.empty:
            return request.declined[0]
        return executor.run(call, request, executor.dense_rows(call))[:, self.tokens.visual[0].start :]

    def kinds(self, steps: int) -> str:
        """What happens at each step: d(ense), R(efresh), s(parse)."""
        kinds = ""
        for step in range(steps):
            before = {key: state.step for key, state in self.layer.state.items()}
            found = self.answer(self.call(step, step))
            after = {key: state.step for key, state in self.layer.state.items()}
            refreshed = after != before and bool(after)
            kinds += "d" if isinstance(found, str) else "R" if refreshed else "s"
        return kinds


@pytest.mark.parametrize(
    "dense_steps, steps, expected",
    [
        (5, 20, "ddddd" + "Rssss" * 3),
        (10, 50, "d" * 10 + "Rssss" * 8),
        (15, 50, "d" * 15 + "Rssss" * 7),
        (0.25, 20, "ddddd" + "Rssss" * 3),
        (2, 8, "ddRssssd"),  # a refresh that nobody would read is a plain dense step
    ],
)
def test_the_schedule_is_the_papers(dense_steps: float, steps: int, expected: str) -> None:
    assert Layer(method(dense_steps=dense_steps), total=steps).kinds(steps) == expected


def test_staggered_layers_refresh_in_turn_and_early() -> None:
    found = [Layer(method(dense_steps=6, stagger=True), total=22, index=i).kinds(22) for i in range(5)]
    assert found[0] == "dddddd" + "Rssss" * 3 + "d"
    assert found[2] == "ddd" + "R" + "dd" + "ss" + "Rssss" * 2 + "Rsss"
    refreshes = [sum(kinds[step] == "R" for kinds in found) for step in range(6, 21)]
    assert max(refreshes) == 1 and sum(kinds.count("R") for kinds in found) < 5 * 5


def test_a_skipped_refresh_is_made_up_for() -> None:
    layer = Layer(method())
    kinds = [layer.answer(layer.call(step, step)) for step in (0, 1, 2, 3)]
    state = next(iter(layer.layer.state.values()))
    layer.answer(layer.call(9, 9))  # steps 4 to 8 never reached this layer
    assert next(iter(layer.layer.state.values())).step == 9 and state.step == 2
    assert isinstance(kinds[0], str) and not isinstance(kinds[3], str)


@pytest.mark.parametrize("text", [0, 13])
@pytest.mark.parametrize("mask", sorted(MASKS))
@pytest.mark.parametrize("ramp", ["none", "paper", "conserving"])
def test_steps_follow_the_equations(mask: str, text: int, ramp: str) -> None:
    layer = Layer(method(mask=mask, ramp=ramp), text=text)
    first = layer.call(2, 1)
    dense = layer.answer(first)
    state = next(iter(layer.layer.state.values()))
    pairs = read_pairs(first, state.layout, MASKS[mask])
    assert isinstance(dense, torch.Tensor)
    torch.testing.assert_close(dense.double(), kept_and_dense(first, pairs)[2].transpose(1, 2), atol=1e-5, rtol=1e-5)
    for n in range(3):
        now = layer.call(3 + n, 2 + n)
        found = layer.answer(now)
        growth = 0.0 if ramp == "none" else 0.04 * n
        assert isinstance(found, torch.Tensor)
        expected = reshaped(first, now, pairs, growth, ramp == "conserving")
        torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-4)


def test_a_refresh_is_exact() -> None:
    layer = Layer(method())
    call = layer.call(2, 1)
    found = layer.answer(call)
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    stock = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
    assert isinstance(found, torch.Tensor) and found.shape == stock.shape
    torch.testing.assert_close(found, stock, atol=1e-6, rtol=1e-6)


def test_the_expected_cost_counts_refreshes_twice() -> None:
    assert method().executed == pytest.approx((1 + 5 * 0.15) / 5)


def test_a_picture_that_stands_still_is_exact_and_the_papers_ramp_is_not() -> None:
    for ramp in ("none", "paper", "conserving"):
        layer = Layer(method(ramp=ramp))
        exact = layer.answer(layer.call(2, 1))
        errors = []
        for step in range(3, 7):
            found = layer.answer(layer.call(step, 1))
            assert isinstance(found, torch.Tensor) and isinstance(exact, torch.Tensor)
            errors.append(float((found - exact).norm() / exact.norm()))
        assert errors[0] < 1e-5  # the first sparse step takes rho as it is
        if ramp == "none":
            assert max(errors) < 1e-5
        else:
            assert 0.005 < errors[1] < errors[2] < errors[3]


@pytest.mark.parametrize("ramp, mass", [("none", 1.0), ("conserving", 1.0), ("paper", 1.12)])
def test_row_mass_is_conserved_but_by_the_papers_ramp(ramp: str, mass: float) -> None:
    layer = Layer(method(ramp=ramp, clamp=False))
    ones = torch.ones(2, 320, 2, 16)
    found: Any = None
    for step in range(2, 7):
        found = layer.answer(layer.call(step, step, v=ones))
    torch.testing.assert_close(found, torch.full_like(found, mass), atol=1e-4, rtol=0)


def test_branches_are_kept_apart() -> None:
    both, alone = Layer(method()), Layer(method())
    for step in (2, 3, 4):
        call = both.call(step, step)
        stacked = both.answer(call)
        parts = []
        for row, branch in enumerate(("uncond", "cond")):
            part = {name: getattr(call, name)[row : row + 1] for name in "qkv"}
            parts.append(alone.answer(alone.call(step, step, (branch,), **part)))
        assert isinstance(stacked, torch.Tensor)
        torch.testing.assert_close(stacked, torch.cat(parts), atol=1e-6, rtol=1e-6)  # type: ignore[arg-type]
    assert len(alone.layer.state) == 2


@pytest.mark.parametrize("cache, bound", [("model", 1e-7), ("bf16", 4e-3), ("fp8", 4e-2)])
@pytest.mark.parametrize("offload", [False, True])
def test_a_smaller_cache_costs_little_and_is_as_large_as_said(cache: str, bound: float, offload: bool) -> None:
    exact, small = Layer(method()), Layer(method(cache=cache, offload=offload))
    for layer in (exact, small):
        layer.answer(layer.call(2, 1))
    a, b = exact.answer(exact.call(3, 2)), small.answer(small.call(3, 2))
    assert isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor)
    assert float((a - b).norm() / a.norm()) <= bound
    state = next(iter(small.layer.state.values()))
    tensors = [state.rho, state.rest.values, *([state.rest.scale] if state.rest.scale is not None else [])]
    held = sum(x.numel() * x.element_size() for x in tensors)
    assert held == 2 * small.settings.cache_bytes(320, 4, 16, 4)


def test_another_shape_refreshes_anew() -> None:
    layer = Layer(method())
    layer.answer(layer.call(2, 1))
    single = layer.call(3, 2, ("cond",))
    found = layer.answer(single)
    q, k, v = (x.transpose(1, 2) for x in (single.q, single.k, single.v))
    stock = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2)
    assert isinstance(found, torch.Tensor)
    torch.testing.assert_close(found, stock, atol=1e-6, rtol=1e-6)


def tokens_of(grid: tuple[int, int, int], text: int = 0) -> Tokens:
    spans = (*((Span("text", text),) if text else ()), visual_span("video" if grid[0] > 1 else "image", grid))
    found = TokenLayout(spans).resolve(text + math.prod(grid))
    assert found is not None
    return found


def test_the_band_of_a_picture_has_the_papers_width() -> None:
    layout = band_layout(tokens_of((1, 64, 64)), 1 / 32, 128, 128, CPU)
    assert layout.token_density == pytest.approx(0.0312462, abs=1e-6)
    counts = layout.materialize()[0, 0].sum(-1)
    assert counts[2000] == 129 and counts[0] == counts[-1] == 65


def test_tiles_of_cogvideox_are_nearly_full() -> None:
    tokens = tokens_of((13, 30, 45), 226)
    visual, whole = 17550, 17776
    band = band_layout(tokens, 1 / 32, 128, 64, CPU)
    elements = (band.token_density * visual + 226) / whole
    assert elements == pytest.approx(0.0560659, abs=2e-4)
    assert (band.density * visual + 226) / whole < 1.4 * elements
    window = window_layout(tokens, 1 / 32, None, 128, 128, CPU)
    assert window.density < 1.1 * window.token_density
    generic = window.block_mask()[0, 0, 60]
    assert int(generic.sum()) <= math.ceil(137 / 32) + 3  # the nearest blocks, and those with text


def test_the_window_is_compact_and_moves_inward() -> None:
    tokens = tokens_of(GRID)
    layout = window_layout(tokens, 0.2, None, 16, 16, CPU)
    mask = layout.block_mask()[0, 0]
    assert mask.diagonal().all() and (mask.sum(-1) == 4).all()


def test_a_run_remembers_nothing_afterwards_and_repeats_itself() -> None:
    pipe, kwargs = tiny_pipeline("wan")
    settings = ReTtention(density=0.25, q_block=32, kv_block=32, dense_steps=1, period=3)
    stock = pipeline_run(pipe, kwargs, steps=6)
    with dit_attn.enabled(pipe, settings):
        first = pipeline_run(pipe, kwargs, steps=6)
        session = session_of(pipe.transformer)
        assert session is not None and all(not layer.state for layer in session.layers)
        report = dit_attn.summary(pipe)
        assert report.sparse_calls and report.density is not None
        with pytest.raises(RuntimeError, match="stop"):
            stop_at(pipe, kwargs, 3)
        assert same(first, pipeline_run(pipe, kwargs, steps=6))
    assert same(stock, pipeline_run(pipe, kwargs, steps=6)) and not same(stock, first)


def stop_at(pipe: Any, kwargs: dict[str, Any], step: int) -> None:
    def end(pipe: Any, at: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if at == step:
            raise RuntimeError("stop")
        return values

    pipe(**kwargs, num_inference_steps=6, output_type="latent", callback_on_step_end=end)


def test_density_one_is_stock_and_bad_settings_are_named() -> None:
    model, inputs = tiny("wan")
    before = forward(model, inputs)
    with dit_attn.enabled(model, ReTtention(density=1.0, dense_steps=0)):
        assert same(before, forward(model, inputs))
    with pytest.raises(DitAttnError, match=r"mask.*'bnd'.*band"):
        ReTtention(mask="bnd")
    with pytest.raises(DitAttnError, match=r"period.*at least 1"):
        ReTtention(period=0)
    with pytest.raises(DitAttnError, match="window must be three"):
        ReTtention(window=(3, 3))
