"""Logit biases of a request: any number, for any rows, with everything else a method requests, against the formula."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dit_attn
from dit_attn.errors import DitAttnError
from dit_attn.kernels import BlockLayout, Epilogue, pooled_compensation
from dit_attn.kernels.dense import _channels
from dit_attn.kernels.terms import BARRED
from dit_attn.processors.core import executor
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.layer import Layer
from dit_attn.processors.core.logit_bias import factor_bias
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span
from tests._support.core_calls import Dispatched, host_run, random_args
from tests._support.recorded_calls import reference

BEFORE, GRID, AFTER = 9, (2, 6, 9), 7
VISUAL = 108
SEQ = BEFORE + VISUAL + AFTER
LAYOUT = TokenLayout((Span("text", BEFORE), visual_span("video", GRID), Span("text", AFTER)))
INF = math.inf


def attention_call(key_heads: int = 2, mask: Any = None, dtype: torch.dtype = torch.float32) -> AttentionCall:
    """Two samples of text, video and text."""
    args = random_args(SEQ, key_heads=key_heads)
    q, k, v = (x.to(dtype) for x in (args.q, args.k, args.v))
    layer, tokens = Layer("blocks.0", 0), LAYOUT.resolve(SEQ)
    return AttentionCall(q, k, v, mask, 0.4, False, layer, tokens, Clock(), mask_rule="visual-row")


def with_layout(call: AttentionCall, order: str | None = None) -> Request:
    """Random key blocks of 16 for every block of 16 visual rows."""
    request = Request()
    assert executor.read_mask(call, request) is None
    blocks = torch.rand(2, 4, 7, 8, generator=torch.Generator().manual_seed(1)) < 0.5
    blocks[..., 2] = True
    request.layout = BlockLayout.from_mask(blocks, VISUAL, SEQ, 16, 16)
    if order is not None:
        request.permuted = request.permute(call, order)
    return request


def run(call: AttentionCall, request: Request) -> torch.Tensor:
    return executor.run(call, request, executor.dense_rows(call))


def square(rows: torch.Tensor, keys: torch.Tensor, value: torch.Tensor | float) -> torch.Tensor:
    """(B, H, S, S): the value where row and key are chosen, from (B, S) bool and (B|1, H|1) or a number."""
    both = (rows[:, None, :, None] & keys[:, None, None, :]).expand(2, 4, -1, -1)
    amount = value if isinstance(value, torch.Tensor) else torch.full((1, 1), value)
    return torch.where(both, amount[..., None, None].double(), 0.0)


def expected(call: AttentionCall, request: Request, bias: torch.Tensor) -> torch.Tensor:
    """The formula, in the order of the sequence."""
    if request.permuted is None or request.layout is None:
        return reference(call, request, bias)
    order = request.permuted.order
    assert order.rows is not None and order.keys is not None
    allowed = torch.zeros(2, 4, VISUAL, SEQ, dtype=torch.bool)
    places = request.layout.materialize().expand(2, 4, -1, -1)
    allowed[:, :, order.rows[:, None], order.keys[None]] = places
    hidden = torch.zeros(2, 4, SEQ, SEQ, dtype=torch.float64)
    hidden[:, :, call.visual] = torch.zeros(()).double().masked_fill(~allowed, -INF)
    return reference(call, Request(), bias + hidden)


MASKS: dict[str, Callable[[], torch.Tensor | None]] = {
    "none": lambda: None,
    "keys": lambda: torch.rand(2, SEQ, generator=torch.Generator().manual_seed(2)) < 0.8,
    "additive": lambda: torch.randn(2, 4, 1, SEQ, generator=torch.Generator().manual_seed(3)),
    "square": lambda: _square_mask(),
}


def _square_mask() -> torch.Tensor:
    keys = torch.rand(2, SEQ, generator=torch.Generator().manual_seed(4)) < 0.8
    mask = torch.ones(2, 1, SEQ, SEQ, dtype=torch.bool)
    mask[:, :, BEFORE : BEFORE + VISUAL] = keys[:, None, None]
    mask[:, :, :BEFORE, 50:] = False
    return mask


@dataclass(frozen=True)
class Piece:
    """Arguments of one span bias."""

    rows: torch.Tensor
    keys: torch.Tensor
    value: Any


@st.composite
def pieces(draw: Any) -> Piece:
    chosen = []
    for _ in range(2):
        mask = torch.zeros(draw(st.sampled_from((1, 2))), SEQ, dtype=torch.bool)
        for sample in mask:
            low = draw(st.integers(0, SEQ))
            sample[low : draw(st.integers(low, SEQ))] = True
        chosen.append(mask)
    amounts = st.sampled_from((0.0, 0.7, -1.3, 6.0, -INF))
    if draw(st.booleans()):
        return Piece(*chosen, draw(amounts))
    shape = (draw(st.sampled_from((1, 2))), draw(st.sampled_from((1, 4))))
    values = [draw(amounts) for _ in range(shape[0] * shape[1])]
    return Piece(*chosen, torch.tensor(values).reshape(shape))


@settings(max_examples=60, deadline=None)
@given(
    given_pieces=st.lists(pieces(), max_size=3),
    key_heads=st.sampled_from((1, 2, 4)),
    mask=st.sampled_from(sorted(MASKS)),
    layout=st.booleans(),
    order=st.sampled_from((None, "hilbert", "tiles")),
    seed=st.integers(0, 99),
)
def test_any_number_of_biases_of_any_rows_is_the_formula(
    given_pieces: list[Piece], key_heads: int, mask: str, layout: bool, order: str | None, seed: int
) -> None:
    call = attention_call(key_heads, MASKS[mask]())
    request = with_layout(call, order) if layout else Request()
    total = torch.zeros(2, 4, SEQ, SEQ, dtype=torch.float64)
    for piece in given_pieces:
        request.add_span_bias(call, piece.rows, piece.keys, piece.value)
        total = total + square(piece.rows, piece.keys, piece.value)
    rng = torch.Generator().manual_seed(seed)
    rows, keys = torch.randn(1, 4, 40, 2, generator=rng), torch.randn(2, key_heads, SEQ, 2, generator=rng)
    request.add_bias(call, rows, keys, first=5)
    total[:, :, 5:45] += (rows @ keys.repeat_interleave(4 // key_heads, 1).mT).double()
    torch.testing.assert_close(run(call, request).double(), expected(call, request, total), atol=5e-6, rtol=2e-5)


@pytest.mark.parametrize("layout", [False, True])
def test_a_row_that_is_barred_from_every_key_gives_zero_and_nothing_leaks_to_others(layout: bool) -> None:
    call = attention_call()
    call.v[:, 30:50] = 1e4  # of the barred keys
    request = with_layout(call) if layout else Request()
    rows = slice(4, 70)
    request.add_span_bias(call, rows, slice(30, 50), -INF)
    request.add_span_bias(call, slice(20, 24), slice(None), -INF)
    out = run(call, request)
    assert torch.equal(out[:, 20:24], torch.zeros_like(out[:, 20:24]))
    assert float(out[:, 4:70].abs().max()) < 10.0 and bool(out.isfinite().all())


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3), (torch.float64, 1e-12)])
@pytest.mark.parametrize("layout", [False, True])
def test_in_other_types_the_bias_is_as_exact_as_the_output(dtype: torch.dtype, tolerance: float, layout: bool) -> None:
    """A bias of 0.3 that is rounded to bf16 would be off by 0.4 percent of every weight, on all rows alike."""
    call = attention_call(dtype=dtype)
    request = with_layout(call) if layout else Request()
    total = torch.zeros(2, 4, SEQ, SEQ, dtype=torch.float64)
    for value, keys in ((0.301, slice(0, 9)), (-INF, slice(20, 40)), (7.77, slice(60, 90))):
        request.add_span_bias(call, slice(None), keys, value)
        total[..., keys] += value
    truth = expected(call, request, total)
    torch.testing.assert_close(run(call, request).double(), truth, atol=tolerance, rtol=tolerance)


def test_the_channels_of_a_16_bit_bias_add_up_to_it() -> None:
    rng = torch.Generator().manual_seed(0)
    rows, keys = torch.randn(1, 1, 50, 2, generator=rng), torch.randn(1, 1, 60, 2, generator=rng)
    for dtype in (torch.bfloat16, torch.float16):
        parts = _channels(rows, keys, dtype)
        assert parts[0].dtype == parts[1].dtype == dtype
        found, truth = (a.double() @ b.double().mT for a, b in (parts, (rows, keys)))
        torch.testing.assert_close(found, truth, atol=3e-6, rtol=0)


@pytest.mark.parametrize("order", ["hilbert", "none"])
def test_pooled_keys_have_the_mean_bias_of_their_keys_and_are_barred_with_any_of_them(order: str) -> None:
    keys_exist = torch.rand(2, SEQ, generator=torch.Generator().manual_seed(2)) < 0.8
    call = attention_call(mask=keys_exist)
    request = with_layout(call, order)
    permuted = request.permuted
    assert permuted is not None and request.layout is not None and permuted.key_mask is not None
    size = 8
    request.compensation = pooled_compensation(permuted.k, permuted.v, size, key_mask=permuted.key_mask)
    scale = torch.rand(2, 4, 7, generator=torch.Generator().manual_seed(5))
    request.epilogue = Epilogue(row_scale=scale)
    total = torch.zeros(2, 4, SEQ, SEQ, dtype=torch.float64)
    for rows, keys, value in ((slice(20, 60), slice(0, 30), 1.1), (slice(30, 90), slice(70, 75), -INF)):
        request.add_span_bias(call, rows, keys, value)
        total[:, :, rows, keys] += value
    out = run(call, request)[:, call.visual]

    at = permuted.order
    row_places = torch.arange(VISUAL) if at.rows is None else at.rows
    key_places = torch.arange(SEQ) if at.keys is None else at.keys
    q = permuted.q.transpose(1, 2).double()
    k, v = (x.transpose(1, 2).double().repeat_interleave(2, 1) for x in (permuted.k, permuted.v))
    bias = total[:, :, BEFORE + row_places][..., key_places]
    exists = permuted.key_mask[:, None, None]
    allowed = request.layout.materialize() & exists
    logits = (q @ k.mT * 0.4 + bias).masked_fill(~allowed, -INF)
    blocks = -(-SEQ // size)
    pad = blocks * size - SEQ
    there = torch.nn.functional.pad(exists.expand(2, 4, VISUAL, -1), (0, pad)).unflatten(-1, (blocks, size))
    spread = torch.nn.functional.pad(bias, (0, pad)).unflatten(-1, (blocks, size))
    number = there.sum(-1)
    mean_bias = torch.where(there, spread, 0.0).sum(-1) / number.clamp(min=1)
    means = [torch.nn.functional.pad(x * exists.mT, (0, 0, 0, pad)).unflatten(2, (blocks, size)).sum(3) for x in (k, v)]
    mean_k, mean_v = (x / number[:, :, :1].mT.clamp(min=1) for x in means)
    skipped = ~request.layout.block_mask()[..., torch.arange(blocks) * size // 16][:, :, torch.arange(VISUAL) // 16]
    virtual = (q @ mean_k.mT * 0.4 + mean_bias + number.log()).masked_fill(~skipped, -INF)
    weights = torch.softmax(torch.cat([logits, virtual], -1), -1)
    truth = (weights @ torch.cat([v, mean_v], 2)) * scale[:, :, torch.arange(VISUAL) // 16, None]
    truth = permuted.unpermute(truth.transpose(1, 2))
    torch.testing.assert_close(out.double(), truth, atol=5e-6, rtol=2e-5)


def test_gradients_flow_through_a_biased_call() -> None:
    call = attention_call(dtype=torch.float64)
    leaf = [x.requires_grad_() for x in (call.q, call.k, call.v)]
    total = torch.zeros(2, 4, SEQ, SEQ, dtype=torch.float64)
    total[:, :, 10:60, :20], total[:, :, 12:14] = 0.8, -INF
    grads = []
    for layout in (False, True):
        request = with_layout(call) if layout else Request()
        request.add_span_bias(call, slice(10, 60), slice(0, 20), 0.8)
        request.add_span_bias(call, slice(12, 14), slice(None), -INF)
        finite = torch.ones(SEQ, dtype=torch.bool)
        finite[12:14] = False
        for out in (run(call, request), reference(call, request, total.clamp(min=2 * BARRED))):
            grads.append(torch.autograd.grad(out[:, finite].square().sum(), leaf))
    for mine, truth in (grads[:2], grads[2:]):
        for a, b in zip(mine, truth, strict=True):
            torch.testing.assert_close(a, b, atol=1e-9, rtol=1e-9)


# -- what changes nothing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows, keys, value",
    [
        (slice(0, 20), slice(0, 9), 0.0),
        (slice(7, 7), slice(0, 9), -INF),
        (slice(0, 20), torch.zeros(SEQ, dtype=torch.bool), 2.0),
        (torch.zeros(2, SEQ, dtype=torch.bool), slice(None), -INF),
        (slice(None), slice(None), torch.zeros(2, 4)),
    ],
)
def test_zero_values_and_empty_spans_request_nothing(rows: Any, keys: Any, value: Any) -> None:
    call, request = attention_call(), Request()
    request.add_span_bias(call, rows, keys, value)
    request.add_bias(call, torch.zeros(1, 1, SEQ, 2), torch.ones(1, 1, SEQ, 2))
    request.add_bias(call, torch.ones(1, 1, 3, 2), torch.zeros(1, 2, SEQ, 2), first=4)
    assert request.empty and not request.biases


def test_rows_that_no_bias_reaches_are_bit_equal_to_those_of_a_request_without_one() -> None:
    call = attention_call(mask=MASKS["keys"]())
    plain, biased = with_layout(call), with_layout(call)
    biased.add_span_bias(call, slice(0, BEFORE), slice(30, 60), 1.5)
    a, b = run(call, plain), run(call, biased)
    assert torch.equal(a[:, BEFORE:], b[:, BEFORE:]) and not torch.equal(a[:, :BEFORE], b[:, :BEFORE])
    dense = Request()
    dense.add_span_bias(call, slice(3, 40), slice(30, 60), 1.5)
    a, b = run(call, Request()), run(call, dense)
    assert torch.equal(a[:, 40:], b[:, 40:]) and not torch.equal(a[:, 3:40], b[:, 3:40])


@pytest.mark.parametrize(
    "message, add",
    [
        ("must be finite", lambda r, c: r.add_span_bias(c, slice(0, 3), slice(0, 3), math.nan)),
        ("finite or -inf", lambda r, c: r.add_span_bias(c, slice(0, 3), slice(0, 3), INF)),
        ("number or", lambda r, c: r.add_span_bias(c, slice(0, 3), slice(0, 3), torch.ones(2, 3))),
        ("number or", lambda r, c: r.add_span_bias(c, slice(0, 3), slice(0, 3), torch.ones(3, 4))),
        ("number or", lambda r, c: r.add_span_bias(c, slice(0, 3), slice(0, 3), torch.ones(4))),
        ("tokens must be a slice", lambda r, c: r.add_span_bias(c, torch.ones(5).bool(), slice(0, 3), 1.0)),
        ("the rows of a bias", lambda r, c: r.add_bias(c, torch.ones(1, 3, 5, 1), torch.ones(1, 1, SEQ, 1))),
        ("the keys of a bias", lambda r, c: r.add_bias(c, torch.ones(1, 1, 5, 1), torch.ones(3, 1, SEQ, 1))),
        ("rows 0 to 5", lambda r, c: r.add_bias(c, torch.ones(1, 1, 5, 1), torch.ones(1, 1, SEQ, 2))),
        ("rows -1 to 4", lambda r, c: r.add_bias(c, torch.ones(1, 1, 5, 1), torch.ones(1, 1, SEQ, 1), first=-1)),
        (f"rows {SEQ} to", lambda r, c: r.add_bias(c, torch.ones(1, 1, 5, 1), torch.ones(1, 1, SEQ, 1), first=SEQ)),
    ],
)
def test_a_bias_that_does_not_fit_is_refused_with_the_reason(message: str, add: Any) -> None:
    with pytest.raises(DitAttnError, match=message):
        add(Request(), attention_call())


# -- dispatch ---------------------------------------------------------------------------------------------------------


class Lift:
    """A method that asks for a bias of all rows on the first keys, and nothing else."""

    role, min_tokens, sites = "", 0, ("self",)

    def __init__(self, value: float = 1.2) -> None:
        self.value = value

    def request(self, call: AttentionCall, request: Request) -> None:
        request.add_span_bias(call, slice(None), slice(0, 12), self.value)


def lifted(done: Dispatched) -> torch.Tensor:
    """The formula for what a dispatched call requested."""
    assert done.call is not None
    total = torch.zeros(2, 4, done.call.q.shape[1], done.call.q.shape[1], dtype=torch.float64)
    total[..., :12] = 1.2
    return reference(done.call, done.request, total)


SPARSE = dit_attn.BlockSparse(density=0.4, q_block=32, kv_block=32, dense_steps=0)


@pytest.mark.parametrize("first", [True, False])
def test_a_bias_joins_a_sparse_method_whichever_is_enabled_first(first: bool) -> None:
    methods = (Lift(), SPARSE) if first else (SPARSE, Lift())
    state, layer = host_run(methods)
    done = Dispatched(state, layer, random_args())
    assert done.request.layout is not None and done.stock_calls == 0
    torch.testing.assert_close(done.out.double(), lifted(done), atol=5e-6, rtol=2e-5)
    assert (layer.stats.sparse_calls, layer.stats.biased_calls) == (1, 1) and not layer.stats.fallbacks


def test_the_bias_stays_where_the_sparse_method_declines_and_the_reason_is_counted() -> None:
    state, layer = host_run((replace(SPARSE, dense_steps=1.0), Lift()))
    done = Dispatched(state, layer, random_args())
    torch.testing.assert_close(done.out.double(), lifted(done), atol=5e-6, rtol=2e-5)
    assert layer.stats.fallbacks == {"dense step": 1} and done.stock_calls == 0
    assert (layer.stats.sparse_calls, layer.stats.biased_calls) == (0, 1)


@pytest.mark.parametrize("seq_len", [40, 300])
def test_a_bias_works_at_any_length_and_with_visual_tokens_that_are_apart(seq_len: int) -> None:
    half = (seq_len - 10) // 2
    parts = (visual_span("image", (1, 1, half)), Span("text", None), visual_span("image", (1, 1, half)))
    state, layer = host_run((SPARSE, Lift()), TokenLayout(parts))
    done = Dispatched(state, layer, random_args(seq_len))
    torch.testing.assert_close(done.out.double(), lifted(done), atol=5e-6, rtol=2e-5)
    assert layer.stats.fallbacks == {"visual tokens are not consecutive": 1} and layer.stats.biased_calls == 1


def test_a_short_sequence_is_declined_only_by_methods_for_speed() -> None:
    layout = TokenLayout((visual_span("image", (1, 5, 8)),))
    state, layer = host_run((SPARSE,), layout)
    assert Dispatched(state, layer, random_args(40)).stock_calls == 1
    assert layer.stats.fallbacks == {"sequence under 256 tokens": 1}
    state, layer = host_run((Lift(),), layout)
    assert Dispatched(state, layer, random_args(40)).stock_calls == 0
    assert not layer.stats.fallbacks and layer.stats.biased_calls == 1


def test_a_bias_of_zero_is_bit_equal_to_stock_and_to_the_sparse_method_alone() -> None:
    state, layer = host_run((Lift(0.0),))
    done = Dispatched(state, layer, random_args())
    assert done.stock_calls == 1 and layer.stats.fallbacks == {"nothing requested": 1}
    alone = Dispatched(*host_run((SPARSE,)), random_args())
    assert torch.equal(Dispatched(*host_run((SPARSE, Lift(0.0))), random_args()).out, alone.out)


def test_methods_that_compute_or_compensate_without_the_bias_leave_the_call_dense_with_it() -> None:
    for method in (
        dit_attn.ReTtention(density=0.3, q_block=32, kv_block=32, dense_steps=0),
        dit_attn.RectifiedSpaAttn(density=0.3, q_block=32, kv_block=32, dense_steps=0, compensation="paper"),
    ):
        state, layer = host_run((method, Lift()))
        done = Dispatched(state, layer, random_args())
        torch.testing.assert_close(done.out.double(), lifted(done), atol=5e-6, rtol=2e-5)
        (reason,) = layer.stats.fallbacks
        assert "logit bias" in reason and layer.stats.sparse_calls == 0


def test_a_layer_whose_kernel_failed_keeps_its_bias(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(executor, "sparse_attention", broken)
    state, layer = host_run((SPARSE, Lift()))
    with pytest.warns(UserWarning, match="goes back to dense attention"):
        first = Dispatched(state, layer, random_args())
    for done in (first, Dispatched(state, layer, random_args())):
        assert done.request.layout is None and done.stock_calls == 0
        torch.testing.assert_close(done.out.double(), lifted(done), atol=5e-6, rtol=2e-5)
    assert sum(layer.stats.fallbacks.values()) == 2


def test_the_sampled_error_is_measured_against_biased_attention() -> None:
    call = attention_call()
    request = with_layout(call)
    request.layout = BlockLayout.dense(VISUAL, SEQ, 16, 16)
    request.add_span_bias(call, slice(None), slice(0, 12), 3.0)
    request.add_span_bias(call, slice(40, 60), slice(20, 90), 4.0)  # rows of a sample have their own
    assert executor.sampled_error(call, request, run(call, request), 20) < 1e-5


# -- heads that are split over devices, of a model with fewer key heads ------------------------------------------------


@pytest.mark.parametrize("of_the_model", (False, True))
def test_heads_of_keys_that_could_be_either_are_those_of_the_rows(of_the_model: bool) -> None:
    """Eight query heads and four key heads on two devices: four query heads here, as many as key heads in all."""
    q, k = torch.randn(1, 10, 4, 8), torch.randn(1, 10, 2, 8)
    keys = torch.arange(1.0, 5.0).view(1, 4, 1, 1).expand(-1, -1, 10, 1)
    rows = torch.ones(1, 8 if of_the_model else 4, 10, 1)
    found = factor_bias(q, k, rows, keys, 0, shard=(1, 2))
    assert found is not None and found.rows.shape[1] == 4
    assert found.keys[0, :, 0, 0].tolist() == ([3, 3, 4, 4] if of_the_model else [1, 2, 3, 4])


def test_heads_of_keys_that_could_be_either_are_refused_where_the_rows_have_none() -> None:
    q, k = torch.randn(1, 10, 4, 8), torch.randn(1, 10, 2, 8)
    rows, keys = torch.ones(1, 1, 10, 1), torch.ones(1, 4, 10, 1)
    with pytest.raises(dit_attn.DitAttnError, match="give keys of the model's 8 query heads, or rows with heads"):
        factor_bias(q, k, rows, keys, 0, shard=(1, 2))
    for heads, shard in ((8, (1, 2)), (2, (1, 2)), (4, (0, 1))):  # of the model, key heads here, one device
        assert factor_bias(q, k, rows, torch.ones(1, heads, 10, 1), 0, shard) is not None
