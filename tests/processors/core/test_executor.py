"""The executor: which calls it refuses, how it reads a mask, and that it computes the rows of a request exactly."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dit_attn.kernels import BlockLayout
from dit_attn.processors.core import executor
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.layer import Layer
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span
from tests._support.core_calls import random_args, stock_attention
from tests._support.recorded_calls import reference

BEFORE, VISUAL, AFTER = 9, 288, 11
SEQ = BEFORE + VISUAL + AFTER
LAYOUT = TokenLayout((Span("text", BEFORE), visual_span("video", (4, 8, 9)), Span("audio", AFTER)))


def attention_call(mask: Any = None, **changes: Any) -> AttentionCall:
    """A call over text, video and audio."""
    args = random_args(SEQ)
    layer, tokens = Layer("blocks.0", 0), LAYOUT.resolve(SEQ)
    return replace(AttentionCall(args.q, args.k, args.v, mask, None, False, layer, tokens, Clock()), **changes)


def sparse_request(call: AttentionCall, density: float = 0.4) -> Request:
    """A random block layout of the visual rows; every query block attends to the first key block."""
    blocks = torch.rand(2, 4, 9, 10, generator=torch.Generator().manual_seed(1)) < density
    blocks[..., 0] = True
    request = Request(layout=BlockLayout.from_mask(blocks, VISUAL, SEQ, 32, 32))
    assert executor.read_mask(call, request) is None
    return request


# -- calls that are refused -------------------------------------------------------------------------------------------


def test_a_joint_call_is_supported_and_others_say_why_not() -> None:
    call = attention_call()
    assert executor.unsupported_reason(call) is None
    short, apart = (
        TokenLayout(tuple(visual_span("image", (1, 1, n)) for n in (100, 155))).resolve(255),
        TokenLayout((visual_span("image", (1, 1, 99)), Span("text", None), visual_span("image", (1, 1, 99)))).resolve(
            SEQ
        ),
    )
    assert executor.unsupported_reason(replace(call, k=call.k[:, :77])) == "cross attention"
    assert executor.unsupported_reason(replace(call, tokens=None)) == f"unknown token layout for {SEQ} tokens"
    assert executor.unsupported_reason(replace(call, causal=True)) == "causal attention"
    assert executor.unsupported_reason(replace(call, tokens=apart)) == "visual tokens are not consecutive"
    square = torch.ones(2, SEQ, SEQ, dtype=torch.bool)
    assert executor.unsupported_reason(replace(call, mask=square)) == f"attention mask of shape (2, {SEQ}, {SEQ})"
    few = {name: getattr(call, name)[:, :255] for name in ("q", "k", "v")}
    assert executor.unsupported_reason(replace(call, tokens=short, **few)) == "sequence under 256 tokens"


# -- masks ------------------------------------------------------------------------------------------------------------

KEYS = torch.rand(2, SEQ, generator=torch.Generator().manual_seed(2)) < 0.8


@pytest.mark.parametrize("shape", [(2, SEQ), (2, 1, 1, SEQ), (1, 1, 1, SEQ)])
def test_a_boolean_mask_of_keys_becomes_the_key_mask(shape: tuple[int, ...]) -> None:
    mask, request = KEYS[: shape[0]].reshape(shape), Request()
    assert executor.read_mask(attention_call(mask), request) is None
    assert request.key_mask is not None and request.key_bias is None
    assert torch.equal(request.key_mask, KEYS[: shape[0]].expand(2, -1))


def test_a_boolean_mask_by_head_becomes_a_bias_and_the_keys_any_head_attends_to() -> None:
    mask = torch.rand(2, 4, 1, SEQ, generator=torch.Generator().manual_seed(3)) < 0.3
    request = Request()
    assert executor.read_mask(attention_call(mask), request) is None
    assert request.key_mask is not None and request.key_bias is not None
    assert torch.equal(request.key_mask, mask[:, :, 0].any(1))
    assert torch.equal(request.key_bias == 0.0, mask[:, :, 0])
    assert torch.equal(request.key_bias == -torch.inf, ~mask[:, :, 0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_additive_mask_stays_a_bias_and_its_lowest_values_are_missing_keys(dtype: torch.dtype) -> None:
    bias = torch.randn(2, 1, 1, SEQ, generator=torch.Generator().manual_seed(4)).to(dtype)
    bias = bias.masked_fill(~KEYS[:, None, None], torch.finfo(dtype).min)
    request = Request()
    assert executor.read_mask(attention_call(bias), request) is None
    assert request.key_mask is not None and request.key_bias is not None
    assert torch.equal(request.key_mask, KEYS)
    assert request.key_bias.dtype == torch.float32 and torch.equal(request.key_bias, bias[:, :, 0].float())


def test_a_square_mask_is_taken_where_all_its_visual_rows_are_alike() -> None:
    square = torch.ones(2, 1, SEQ, SEQ, dtype=torch.bool)
    square[:, :, BEFORE : BEFORE + VISUAL] = KEYS[:, None, None]
    request = Request()
    assert executor.read_mask(attention_call(square), request) == "square attention mask"
    assert request.key_mask is None
    assert executor.read_mask(attention_call(square, mask_rule="visual-row"), request) is None
    assert torch.equal(request.key_mask, KEYS)  # type: ignore[arg-type]  # it was set
    unknown = attention_call(square, mask_rule="visual-row", tokens=None)
    assert executor.read_mask(unknown, Request()) == "square attention mask"


@pytest.mark.parametrize("shape", [(2, 1, 1, SEQ - 1), (2, 3, 1, SEQ), (2, 1, SEQ)])
def test_masks_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    reason = executor.read_mask(attention_call(torch.ones(shape, dtype=torch.bool)), Request())
    assert reason == f"attention mask of shape {shape}"


# -- results ----------------------------------------------------------------------------------------------------------

ADDITIVE = torch.randn(2, 4, 1, SEQ, generator=torch.Generator().manual_seed(5))
SQUARE = torch.ones(2, 1, SEQ, SEQ, dtype=torch.bool)
SQUARE[:, :, BEFORE : BEFORE + VISUAL] = KEYS[:, None, None]
SQUARE[:, :, :BEFORE, BEFORE + 50 :] = False  # text rows have a mask of their own


@pytest.mark.parametrize("mask", [None, KEYS, KEYS[:, None, None], ADDITIVE, SQUARE],
                         ids=["no mask", "keys", "boolean", "additive", "square"])  # fmt: skip
def test_visual_rows_follow_the_layout_and_all_others_are_dense(mask: torch.Tensor | None) -> None:
    call = attention_call(mask, mask_rule="visual-row", scale=0.3)
    request = sparse_request(call)
    out = executor.run(call, request, executor.dense_rows(call))
    torch.testing.assert_close(out.double(), reference(call, request), atol=3e-6, rtol=1e-5)


def test_a_permuted_request_gives_rows_in_the_order_of_the_sequence() -> None:
    call = attention_call(KEYS)
    request = sparse_request(call)
    request.permuted = request.permute(call, "hilbert")
    order = request.permuted.order
    assert request.layout is not None and order.rows is not None and order.keys is not None
    swapped = replace(
        call, q=call.q.clone(), k=call.k[:, order.keys], v=call.v[:, order.keys], mask=KEYS[:, order.keys]
    )
    swapped.q[:, :VISUAL] = call.q[:, call.visual][:, order.rows]
    first = TokenLayout((visual_span("video", (4, 8, 9)), Span("text", None))).resolve(SEQ)
    expected = reference(replace(swapped, tokens=first), Request(layout=request.layout))[:, :VISUAL]
    out = executor.run(call, request, executor.dense_rows(call))[:, call.visual]
    torch.testing.assert_close(out[:, order.rows].double(), expected, atol=3e-6, rtol=1e-5)


def test_rows_that_a_method_computes_itself_are_put_into_the_sequence() -> None:
    call = attention_call()
    rows = torch.full((2, VISUAL, 4, 16), 3.0)
    out = executor.run(call, Request(compute_visual=lambda: rows), executor.dense_rows(call))
    assert torch.equal(out[:, call.visual], rows)
    torch.testing.assert_close(out[:, :BEFORE], stock_attention(random_args(SEQ))[:, :BEFORE], atol=1e-6, rtol=1e-5)
    alone = replace(call, **{name: getattr(call, name)[:, call.visual] for name in ("q", "k", "v")})
    alone.tokens = TokenLayout((visual_span("video", (4, 8, 9)),)).resolve(VISUAL)
    assert executor.run(alone, Request(compute_visual=lambda: rows), executor.dense_rows(alone)) is rows


# -- the sampled error ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", [None, KEYS, ADDITIVE], ids=["no mask", "boolean", "additive"])
def test_the_sampled_error_of_exact_attention_is_zero_and_grows_with_what_is_wrong(mask: torch.Tensor | None) -> None:
    call = attention_call(mask)
    request = sparse_request(call)
    exact = stock_attention(random_args(SEQ, mask=mask))
    assert executor.sampled_error(call, request, exact) < 1e-6
    wrong = exact.clone()
    wrong[:, call.visual] *= 1.25
    assert executor.sampled_error(call, request, wrong) == pytest.approx(0.25, rel=1e-4)
    wrong = exact.clone()
    wrong[:, :BEFORE] = 100.0  # rows that are not visual do not count
    assert executor.sampled_error(call, request, wrong) < 1e-6


def test_the_sampled_error_with_every_row_is_the_relative_norm() -> None:
    call = attention_call()
    request = sparse_request(call, 0.1)
    out = executor.run(call, request, executor.dense_rows(call))
    exact = stock_attention(random_args(SEQ))
    visual = (out - exact)[:, call.visual].norm() / exact[:, call.visual].norm()
    assert float(visual) > 0.05
    assert executor.sampled_error(call, request, out, count=VISUAL) == pytest.approx(float(visual), rel=1e-4)
    assert executor.sampled_error(call, request, out) == pytest.approx(float(visual), rel=0.3)
