"""Whatever does not fit is one line that names the argument and the fix, whichever door it comes in by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels import (
    BlockLayout,
    Compensation,
    Epilogue,
    LogitBias,
    band,
    block_scores,
    choose_backend,
    from_flex,
    from_lengths,
    from_segments,
    inward_window,
    numeric_guard,
    plan_blocks,
    plan_scores,
    pool_blocks,
    pooled_compensation,
    sampled_compensation,
    sparse_attention,
)
from dit_attn.kernels.layouts.element_masks import BitMask, SegmentMask
from dit_attn.kernels.layouts.patterns import from_rule

Q, K, V = (torch.randn(1, 20, 2, 8) for _ in range(3))
SIZES = {"q_len": 20, "kv_len": 20, "q_block": 8, "kv_block": 8}
LAYOUT = BlockLayout.from_mask(torch.eye(3, dtype=torch.bool)[None, None], **SIZES)
SCORES = torch.randn(1, 1, 3, 3)
NO, ALL = torch.zeros(1, 1, 3, 3, dtype=torch.bool), torch.ones(1, 1, 3, 3, dtype=torch.bool)
NAN, ONE, ZEROS = float("nan"), torch.ones(1, 2), torch.zeros(2, dtype=torch.int64)
POOLED = torch.randn(1, 2, 5, 8), torch.randn(1, 2, 5, 8), torch.zeros(1, 1, 5)
ONE_BIT = BitMask(torch.zeros(1, 1, 3, 1, 8, 1, dtype=torch.int32))


def attend(**change: Any) -> Callable[[], Any]:
    return lambda: sparse_attention(**{"q": Q, "k": K, "v": V, "layout": LAYOUT, **change})


def plan(**change: Any) -> Callable[[], Any]:
    return lambda: plan_blocks(**{"q": Q, "k": K, "q_block": 8, "kv_block": 8, "density": 0.5, **change})


def lists(idx: torch.Tensor, cnt: torch.Tensor) -> Callable[[], Any]:
    return lambda: BlockLayout(8, 8, 20, 20, idx, cnt)


def parts(elements: Any, full: torch.Tensor = NO) -> BlockLayout:
    return BlockLayout.from_parts(full, ALL, elements, **SIZES)


def ids(q: int, k: int) -> SegmentMask:
    return SegmentMask(*(torch.zeros(1, n, dtype=torch.int32) for n in (q, k)))


BAD: list[tuple[Callable[[], Any], str]] = [
    # the call
    (attend(q=None), "q must be a Tensor, got NoneType"),
    (attend(layout=plan_blocks(Q, K, q_block=8, kv_block=8, density=0.5)), "got BlockPlan; pass its .layout"),
    (attend(layout=ALL), "layout must be a BlockLayout, got Tensor; make one with"),
    (attend(key_mask=True), "key_mask must be a Tensor, got bool"),
    (attend(key_lengths=5), "key_lengths must be a Tensor"),
    (attend(bias=(Q, K)), "bias must be a LogitBias, got tuple"),
    (attend(bias=LogitBias(Q, None)), "bias.k must be a Tensor"),  # type: ignore[arg-type]
    (attend(compensation=K), "compensation must be a Compensation"),
    (attend(compensation=Compensation(K, V, None, 8)), "compensation.log_weight must be a Tensor"),  # type: ignore
    (attend(epilogue={}), "epilogue must be a Epilogue, got dict"),
    (attend(scale=-1.0), "scale must be a finite number of at least 0, got -1.0"),
    (attend(scale=float("nan")), "scale must be a finite number"),
    (attend(scale="1"), "scale must be a finite number of at least 0, got '1'"),
    (attend(scale=True), "scale must be a finite number of at least 0, got True"),
    (attend(scale=1e308), "scale must be 0, or between 1e-30 and 1e+30, got 1e+308"),
    (attend(scale=10**400), "scale must be 0, or between 1e-30 and 1e+30"),
    (attend(scale=1e-320), "scale must be 0, or between 1e-30 and 1e+30"),
    (attend(q=Q.to_sparse()), "q must be a dense (strided) tensor"),
    (attend(key_lengths=torch.tensor([3 + 0j])), "key_lengths must be of an integer dtype, got complex64"),
    (attend(compensation=Compensation(*POOLED, None)), "compensation.tokens must divide"),  # type: ignore[arg-type]
    (attend(compensation=Compensation(*POOLED, 2.0)), "compensation.tokens must divide"),  # type: ignore[arg-type]
    (attend(compensation=Compensation(*POOLED, 4, 1.0)), "compensation.variance must be a Tensor"),  # type: ignore
    (attend(compensation=Compensation(*POOLED, 4, cap=NAN)), "compensation.cap must be a number, got nan"),
    (attend(epilogue=Epilogue(np.ones((1, 1, 3)))), "epilogue.row_scale must be a Tensor, got ndarray"),  # type: ignore
    (attend(epilogue=Epilogue(cap=None)), "epilogue.cap must be a number, got None"),  # type: ignore[arg-type]
    (attend(epilogue=Epilogue(cap=NAN)), "epilogue.cap must be a number, got nan"),
    (attend(epilogue=Epilogue(blend=ONE, value_shift=None)), "epilogue.value_shift None"),  # type: ignore[arg-type]
    (attend(epilogue=Epilogue(blend=ONE, value_shift=0.5)), "epilogue.value_shift 0.5"),  # type: ignore[arg-type]
    (attend(epilogue=Epilogue(blend=2 * ONE)), "epilogue.blend must be in [0, 1]"),
    (attend(epilogue=Epilogue(blend=NAN * ONE)), "epilogue.blend must be in [0, 1]"),
    (attend(q=Q[..., :0], k=K[..., :0]), "q has heads of size 0"),
    (attend(v=V[..., :0]), "v has heads of size 0"),
    (attend(q=Q[:, :, :0]), "q has 0 heads"),
    (attend(q=Q.long()), "q has dtype int64; cast it to one of"),
    (attend(layout=parts(ids(7, 20))), "elements do not fit the layout: segment numbers of 7 x 20 tokens for 20 x 20"),
    (attend(layout=parts(BitMask(ONE_BIT.bits[..., :4, :]))), "elements do not fit the layout: bits"),
    (attend(layout=parts(ids(20, 20).to("meta"))), "they are not on cpu"),
    (lambda: choose_backend(Q, None), "layout must be a BlockLayout, got NoneType"),  # type: ignore[arg-type]
    # lists
    (
        lists(LAYOUT.kv_indices.long(), LAYOUT.kv_num_blocks),
        "kv_indices to be int32 on the device of kv_indices, cpu, got int64",
    ),
    (lists(LAYOUT.kv_indices, LAYOUT.kv_num_blocks.float()), "kv_num_blocks to be int32"),
    (
        lists(LAYOUT.kv_indices, LAYOUT.kv_num_blocks.to("meta")),
        "kv_num_blocks to be int32 on the device of kv_indices, cpu, got int32 on",
    ),
    (lists(LAYOUT.kv_indices[..., :0], LAYOUT.kv_num_blocks), "needs kv_indices"),
    (lambda: parts(ONE_BIT).check(), "has bits for 1 partial blocks a row, and a row has 3"),
    (lambda: parts(ids(20, 9)).check(), "segment numbers of 20 x 9 tokens"),
    (lambda: parts(ONE_BIT, NO[..., :2]), "full must be (B|1, H|1, 3, 3)"),
    (lambda: parts(ONE_BIT, NO.int()), "full must be bool, got int32"),
    # constructors
    (lambda: BlockLayout.from_topk(SCORES, 0.25, **SIZES), "k is a number of key blocks, got 0.25"),  # type: ignore
    (lambda: BlockLayout.from_topk(SCORES, 2, ALL[..., :2], **SIZES), "forced must expand to"),
    (lambda: BlockLayout.from_topp(SCORES, 0.5, 1, SCORES, **SIZES), "forced must be bool"),
    (lambda: BlockLayout.dense(20, 20, 0), "q_block must be at least 1"),
    (lambda: BlockLayout.dense(20.5, 20), "q_len must be at least 1, a whole number, got 20.5"),  # type: ignore
    (lambda: inward_window(16, 3), "one size for each of 1 to 3 grid axes, got grid 16"),  # type: ignore[arg-type]
    (lambda: inward_window((4, 4), (1.5, 2)), "positive whole numbers"),  # type: ignore[arg-type]
    (lambda: inward_window((4, 4), 3, q_block=0), "q_block must be at least 1"),
    (lambda: band(4, 4, 1, 1, kv_block=0), "kv_block must be at least 1"),
    (lambda: band(4, 4, 1.5, 1), "all of them whole numbers"),  # type: ignore[arg-type]
    (lambda: from_segments(torch.zeros(1, 4)), "q_ids must be of an integer dtype, got float32"),
    (lambda: from_segments(torch.tensor([[2**31]])), "q_ids must fit int32, got 2147483648"),
    (lambda: from_segments(torch.zeros(1, 0, dtype=torch.int32)), "Sq must be at least 1"),
    (lambda: from_segments(torch.zeros(1, 4, dtype=torch.int32), q_block=0), "q_block must be at least 1"),
    (lambda: from_lengths(torch.tensor([[3]]), 7), "lengths must be (n,)"),
    (lambda: from_lengths(torch.tensor([3, 9]), 7), "sum to at most total 7"),
    (lambda: from_lengths(torch.tensor([3, -1]), 7), "lengths must be at least 0"),
    (lambda: from_rule(lambda n, m: n + m, **SIZES), "rule must return bool (8, 20)"),
    (lambda: from_rule(lambda n, m: n >= 0, **SIZES), "rule must return bool (8, 20)"),
    (lambda: from_flex(None), "mask must be FlexAttention's BlockMask, got NoneType"),  # type: ignore[arg-type]
    # selection
    (plan(q=Q[0]), "q must be (B, S, H, D), got 3 dimensions"),
    (plan(k=K[..., :4]), "q and k must share the head size D, got 8 and 4"),
    (plan(k=K.expand(2, -1, -1, -1)), "q has batch 1 and k has batch 2"),
    (plan(k=K[:, :, :0]), "not a multiple of the 0 heads of k"),
    (plan(k=K.to("meta")), "k is on meta and q on cpu"),
    (plan(q=Q.long()), "q must be of a floating-point dtype"),
    (plan(q_block=0), "q_block must be at least 1"),
    (plan(kv_block=-8), "kv_block must be at least 1"),
    (lambda: block_scores(Q, K, 8, 8, key_mask=torch.ones(1, 3, dtype=torch.bool)), "key_mask must be bool (1, 20)"),
    (lambda: plan_scores(SCORES[0], density=0.5, **SIZES), "scores must be (B|1, H|1, 3, 3)"),
    (lambda: pool_blocks(Q, 0), "block must be at least 1"),
    (lambda: pool_blocks(Q[0], 8), "x must be (B, S, H, D)"),
    (lambda: pooled_compensation(K, V, 0), "tokens must be at least 1"),
    (lambda: sampled_compensation(K, V[:, :10], 4, ZEROS[:2]), "must be of one shape"),
    (lambda: sampled_compensation(K, V, 4, ZEROS[:1]), "places must be (2,) int64, one for each head, got (1,)"),
    (lambda: pooled_compensation(K, V[:, :10], 4), "must be of one shape"),
    (lambda: pooled_compensation(K, V, 4, key_mask=torch.ones(1, 3, dtype=torch.bool)), "key_mask must be bool"),
    (lambda: numeric_guard(-1.0).__enter__(), "tolerance must be above 0"),
]


@pytest.mark.parametrize("call, words", BAD, ids=[words[:40] for _, words in BAD])
def test_it_is_named_in_one_line(call: Callable[[], Any], words: str) -> None:
    with pytest.raises(DitAttnError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message and words in message, message


def test_what_fits_at_the_edge_is_taken() -> None:
    uniform = sparse_attention(Q, K, V, LAYOUT, scale=0)
    assert isinstance(uniform, torch.Tensor)
    torch.testing.assert_close(uniform[0, :8], V[0, :8].mean(0).expand(8, -1, -1))
    assert sparse_attention(Q[:0], K[:0], V[:0], LAYOUT, epilogue=Epilogue()).shape == (0, 20, 2, 8)  # type: ignore
    assert inward_window([4, 4], [3, 3]) is inward_window((4, 4), (3, 3))  # type: ignore[arg-type]
