"""Perturbed attention against the written-out map in float64, and what each target must leave alone."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import dit_attn
from dit_attn.processors.core.call import AttentionCall
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span
from dit_attn.processors.guidance.perturbation import JOINTS, TARGETS, Perturbation, blur

GRID, TEXT = (2, 3, 4), 5
ORDERS = {"text first": ("text", "video"), "video first": ("video", "text"), "no text": ("video",)}
MASKS = ("none", "padding", "additive", "per head")


def attention_call(
    order: tuple[str, ...] = ("text", "video"),
    mask: str = "none",
    heads: int = 4,
    groups: int = 1,
    seed: int = 0,
    batch: int = 2,
    rule: str = "key",
) -> AttentionCall:
    """A float64 call over a clip and a text; ``groups`` query heads share keys and values."""
    generator = torch.Generator().manual_seed(seed)
    layout = TokenLayout(tuple(visual_span(kind, GRID) if kind == "video" else Span(kind, TEXT) for kind in order))
    length = sum(span.length or 0 for span in layout.spans)

    def draw(count: int, width: int) -> torch.Tensor:
        return torch.randn(batch, length, count, width, dtype=torch.float64, generator=generator)

    session = SimpleNamespace(family=SimpleNamespace(mask_rule=rule))
    return AttentionCall(
        q=draw(heads, 6), k=draw(heads // groups, 6), v=draw(heads // groups, 5),
        mask=made_mask(mask, batch, heads, length, generator), scale=0.4, causal=False,
        layer=SimpleNamespace(name="a", session=session), tokens=layout.resolve(length), clock=Clock(),  # type: ignore[arg-type]
    )  # fmt: skip


def made_mask(kind: str, batch: int, heads: int, length: int, generator: torch.Generator) -> torch.Tensor | None:
    """The last two tokens of one sample do not exist."""
    there = torch.ones(batch, length, dtype=torch.bool)
    there[0, -2:] = False
    if kind == "padding":
        return there[:, None, None, :]
    if kind == "additive":
        bias = torch.randn(batch, 1, 1, length, generator=generator).double()  # the kernels take it in float32
        return bias.masked_fill(~there[:, None, None, :], torch.finfo(torch.float64).min)
    if kind == "per head":
        return there[:, None, None, :].expand(-1, heads, -1, -1)
    return None


def written_out(call: AttentionCall) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits, map (B, H, S, S) and values (B, H, S, D) of a call."""
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    assert call.scale is not None
    logits = q @ k.transpose(-1, -2) * call.scale
    if call.mask is not None:
        boolean = call.mask.dtype == torch.bool
        logits = logits.masked_fill(~call.mask, -torch.inf) if boolean else logits + call.mask
    return logits, torch.softmax(logits, -1), v


def plain(call: AttentionCall) -> torch.Tensor:
    _, weights, v = written_out(call)
    return (weights @ v).transpose(1, 2)


def replaced(call: AttentionCall, plan: Perturbation) -> torch.Tensor:
    """The map that takes the place of A, (B, H, S, S), row-stochastic, built as the definitions say."""
    logits, weights, _ = written_out(call)
    assert call.tokens is not None and call.tokens.visual_range is not None
    length, (start, stop) = call.q.shape[1], call.tokens.visual_range
    picture = torch.zeros(length, dtype=torch.bool)
    picture[start:stop] = True
    rows = torch.ones_like(picture) if plan.joint == "joint" else picture
    eye = torch.eye(length, dtype=torch.bool)
    inside = picture[:, None] & picture[None, :]
    if plan.target == "uniform":
        there = torch.isfinite(logits) & (logits > torch.finfo(torch.float64).min / 4)
        new = there.double() / there.sum(-1, keepdim=True)
    elif plan.target in ("mean-query", "blurred-query"):
        q = call.q.clone()
        if plan.target == "mean-query" or plan.sigma > 9999:
            q[:, rows] = q[:, rows].mean(1, keepdim=True)
        else:
            q[:, picture] = blurred_by_hand(q[:, picture], plan.sigma)
        changed = AttentionCall(**{**vars(call), "q": q})
        new = written_out(changed)[1]
    elif plan.joint == "ii-logit-mask":
        new = torch.softmax(logits.masked_fill(inside & ~eye, -torch.inf), -1)
    elif plan.joint == "ii-mass-to-diagonal":
        mass = (weights * inside).sum(-1, keepdim=True)
        new = weights * ~inside + mass * eye
    else:
        new = eye.double().expand_as(weights)
    return torch.where(rows[:, None], new, weights)


def blurred_by_hand(q: torch.Tensor, sigma: float) -> torch.Tensor:
    """Every token of a frame as a weighted sum of its neighbors, mirrored at the borders; no convolution."""
    t, h, w = GRID
    frames = q.reshape(q.shape[0], t, h, w, *q.shape[2:])
    for axis, size in ((2, h), (3, w)):
        reach = min(math.ceil(6 * sigma) | 1, size | 1) // 2
        weights = [math.exp(-0.5 * (offset / sigma) ** 2) for offset in range(-reach, reach + 1)]
        total = torch.zeros_like(frames)
        for place in range(size):
            for offset, weight in zip(range(-reach, reach + 1), weights, strict=True):
                source = abs(place + offset)
                source = 2 * (size - 1) - source if source >= size else source
                total.select(axis, place).add_(frames.select(axis, source), alpha=weight / sum(weights))
        frames = total
    return frames.reshape(q.shape)


def applied(call: AttentionCall, strengths: dict[int, float], first: int = 0, **plan: Any) -> torch.Tensor:
    return Perturbation({"a": strengths}, **plan).apply(call, plain(call), first)


PLANS = [
    *({"target": "identity", "joint": joint} for joint in JOINTS),
    {"target": "uniform"},
    {"target": "uniform", "joint": "image-rows"},
    {"target": "mean-query"},
    {"target": "mean-query", "joint": "image-rows"},
    {"target": "blurred-query", "joint": "image-rows", "sigma": 0.7},
    {"target": "blurred-query", "joint": "image-rows", "sigma": 10_000.0},
]


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: " ".join(map(str, plan.values())))
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("order", ORDERS)
def test_a_blend_of_outputs_is_the_output_of_the_blended_map(plan: dict[str, Any], mask: str, order: str) -> None:
    for groups in (1, 2):
        call = attention_call(ORDERS[order], mask, groups=groups)
        strengths = {0: 1.0, 1: 0.3, 3: 0.75}
        _, weights, v = written_out(call)
        new = replaced(call, Perturbation({}, **plan))
        there = torch.isfinite(new).all(-1)[:, 0] if plan.get("joint") == "ii-logit-mask" else slice(None)
        torch.testing.assert_close(new.sum(-1).transpose(1, 2)[there], torch.ones_like(call.q[..., 0])[there])
        u = torch.tensor([strengths.get(head, 0.0) for head in range(4)], dtype=torch.float64)[:, None, None]
        expected = (((1 - u) * weights + u * new) @ v).transpose(1, 2)
        bound = 1e-12 if plan.get("joint") != "ii-mass-to-diagonal" else 1e-6  # the fused kernel's log-sum on a CPU
        found = applied(call, strengths, **plan)
        assert torch.isfinite(found).all()  # of padding that reads nothing, too
        torch.testing.assert_close(found[there], expected[there], atol=bound, rtol=bound)


@settings(max_examples=40, deadline=None)
@given(
    strengths=st.dictionaries(st.integers(0, 3), st.floats(0.01, 1.0), min_size=1),
    plan=st.sampled_from(PLANS),
    seed=st.integers(0, 99),
)
def test_the_perturbation_is_affine_in_the_strength(
    strengths: dict[int, float], plan: dict[str, Any], seed: int
) -> None:
    call = attention_call(seed=seed)
    out, whole = plain(call), applied(call, dict.fromkeys(strengths, 1.0), **plan)
    u = torch.tensor([strengths.get(head, 0.0) for head in range(4)], dtype=torch.float64)[:, None]
    torch.testing.assert_close(applied(call, strengths, **plan), out + u * (whole - out))


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: " ".join(map(str, plan.values())))
def test_other_heads_rows_and_samples_keep_every_bit(plan: dict[str, Any]) -> None:
    call = attention_call()
    out = plain(call)
    kept = out.clone()
    changed = Perturbation({"a": {1: 0.6}}, **plan).apply(call, out, first=1)
    assert torch.equal(out, kept)  # the stock path's tensor is not written to
    assert torch.equal(changed[0], out[0])
    assert torch.equal(changed[:, :, [0, 2, 3]], out[:, :, [0, 2, 3]])
    assert not torch.equal(changed[1, :, 1], out[1, :, 1])
    if plan.get("joint", "joint") != "joint":
        assert torch.equal(changed[:, :TEXT], out[:, :TEXT])


def test_nothing_is_touched_without_a_head_across_lengths_and_in_other_layers() -> None:
    call = attention_call()
    out = plain(call)
    assert Perturbation({}).apply(call, out) is out
    assert Perturbation({"b": {0: 1.0}}).apply(call, out) is out
    assert Perturbation({"a": {0: 1.0}}).apply(call, out, first=2) is out
    cross = AttentionCall(**{**vars(call), "k": call.k[:, :7], "v": call.v[:, :7]})
    assert Perturbation({"a": {0: 1.0}}).apply(cross, out) is out


def test_all_heads_at_full_strength_give_the_values() -> None:
    call = attention_call()
    torch.testing.assert_close(applied(call, dict.fromkeys(range(4), 1.0)), call.v, atol=0, rtol=0)


def test_the_slope_in_the_strength_is_the_value_minus_the_output() -> None:
    call = attention_call()
    lower, upper = (applied(call, {2: u}) for u in (0.25, 0.75))
    expected = call.v[:, :, 2] - plain(call)[:, :, 2]
    torch.testing.assert_close((upper - lower)[:, :, 2] / 0.5, expected)


def test_the_identity_of_one_token_changes_nothing() -> None:
    call = attention_call(("text",))
    one = AttentionCall(**{**vars(call), **{name: getattr(call, name)[:, :1] for name in ("q", "k", "v")}})
    for u in (0.2, 1.0):
        torch.testing.assert_close(Perturbation({"a": {0: u}}).apply(one, plain(one)), plain(one))


def test_conventions_agree_on_picture_rows_or_keep_the_weights_on_the_text() -> None:
    call = attention_call()
    outs = {joint: applied(call, {0: 1.0}, joint=joint) for joint in JOINTS}
    assert torch.equal(outs["joint"][:, TEXT:], outs["image-rows"][:, TEXT:])
    for a, b in itertools.combinations(outs.values(), 2):
        assert not torch.allclose(a, b)
    alone = attention_call(("video",))  # without text all four are the same
    first, *others = (applied(alone, {0: 1.0}, joint=joint) for joint in JOINTS)
    for other in others:
        torch.testing.assert_close(first, other)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_type_stays_and_the_blend_is_made_in_float32(dtype: torch.dtype) -> None:
    call = attention_call()
    small = AttentionCall(**{**vars(call), **{name: getattr(call, name).to(dtype) for name in ("q", "k", "v")}})
    out = plain(call).to(dtype)
    found = Perturbation({"a": {0: 0.37}}).apply(small, out)
    assert found.dtype == dtype
    exact = torch.lerp(out.float(), small.v.float(), 0.37).to(dtype)
    assert torch.equal(found[:, :, 0], exact[:, :, 0])


@pytest.mark.parametrize("plan", PLANS, ids=lambda plan: " ".join(map(str, plan.values())))
def test_a_square_mask_is_enough_for_the_identity_and_refused_by_what_weighs_keys(plan: dict[str, Any]) -> None:
    call = attention_call()
    length = call.q.shape[1]
    square = torch.ones(2, 1, length, length, dtype=torch.bool).tril()
    call = AttentionCall(**{**vars(call), "mask": square})
    reads_no_key = plan["target"] == "identity" and plan["joint"] in ("joint", "image-rows")
    if reads_no_key or plan.get("sigma", math.inf) < 9999:
        assert torch.isfinite(applied(call, {0: 1.0}, **plan)).all()
    else:
        with pytest.raises(dit_attn.DitAttnError, match="square attention mask"):
            applied(call, {0: 1.0}, **plan)


@pytest.mark.parametrize("joint", JOINTS[1:])
def test_picture_rows_cannot_be_told_without_the_parts_of_the_sequence(joint: str) -> None:
    call = AttentionCall(**{**vars(attention_call()), "tokens": None})
    assert Perturbation({"a": {0: 1.0}}).apply(call, plain(call)) is not None
    with pytest.raises(dit_attn.DitAttnError, match="use joint='joint'"):
        applied(call, {0: 1.0}, joint=joint)


# -- the blur of SEG --------------------------------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    grid=st.tuples(st.integers(1, 3), st.integers(1, 9), st.integers(1, 9)),
    sigma=st.floats(0.05, 5000.0),
    seed=st.integers(0, 99),
)
def test_a_blur_keeps_constants_frames_and_bounds(grid: tuple[int, int, int], sigma: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(1, math.prod(grid), 2, 3, dtype=torch.float64, generator=generator)
    out = blur(q, grid, sigma)
    assert out.shape == q.shape
    assert out.amax() <= q.amax() + 1e-9 and out.amin() >= q.amin() - 1e-9
    torch.testing.assert_close(blur(torch.ones_like(q), grid, sigma), torch.ones_like(q))
    frames = out.reshape(grid[0], -1, 2, 3)
    for index, frame in enumerate(q.reshape(grid[0], -1, 2, 3)):  # no frame sees another
        torch.testing.assert_close(frames[index], blur(frame[None], (1, *grid[1:]), sigma)[0])


def test_no_width_changes_nothing_and_a_wide_blur_is_flat() -> None:
    q = torch.randn(1, 7 * 9, 2, 3, dtype=torch.float64)
    assert torch.equal(blur(q, (1, 7, 9), 0.0), q)
    assert torch.equal(blur(q, (1, 7, 9), 0.1), q)  # one tap
    assert blur(q, (1, 7, 9), 5000.0).std(1).max() < 0.5 * q.std(1).max()


def test_a_blur_is_a_convolution_with_a_gaussian_away_from_the_border() -> None:
    q = torch.randn(1, 15 * 15, 1, 1, dtype=torch.float64)
    sigma, reach = 0.8, 2
    taps = torch.tensor([math.exp(-0.5 * (i / sigma) ** 2) for i in range(-reach, reach + 1)], dtype=torch.float64)
    kernel = torch.outer(taps, taps) / taps.sum() ** 2
    expected = F.conv2d(q.reshape(1, 1, 15, 15), kernel[None, None])[0, 0]
    found = blur(q, (1, 15, 15), sigma).reshape(15, 15)[reach:-reach, reach:-reach]
    torch.testing.assert_close(found, expected)


def test_every_target_and_convention_is_tried_above() -> None:
    assert {plan["target"] for plan in PLANS} == set(TARGETS)
    assert {plan.get("joint", "joint") for plan in PLANS} == set(JOINTS)
