"""The estimated error of sampled rows: that of its definition in float64, whatever the method, mask and bias."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dit_attn import BlockSparse, RectifiedSpaAttn
from dit_attn.processors.core import executor
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.layer import Layer
from dit_attn.processors.core.output_error import sampled_errors, sampled_places
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span
from tests._support.core_calls import random_args
from tests._support.recorded_calls import reference

TEXT, VISUAL = 20, 288
LAYOUT = TokenLayout((Span("text", TEXT), visual_span("video", (4, 8, 9))))
KEYS = torch.rand(2, TEXT + VISUAL, generator=torch.Generator().manual_seed(2)) < 0.8
ADDITIVE = torch.randn(2, 4, 1, TEXT + VISUAL, generator=torch.Generator().manual_seed(5))
BLOCKS: dict[str, Any] = {"q_block": 32, "kv_block": 32, "dense_steps": 0}


def attention_call(mask: torch.Tensor | None = None) -> AttentionCall:
    args = random_args()
    q, k, v = (2.0 * x.double() for x in (args.q, args.k, args.v))
    return AttentionCall(
        q, k, v, mask, 0.2, False, Layer("blocks.0", 0), LAYOUT.resolve(TEXT + VISUAL), Clock(), ("uncond", "cond")
    )


def planned(method: Any, call: AttentionCall, biased: bool) -> Request:
    request = Request()
    assert executor.read_mask(call, request) is None
    if biased:
        request.add_span_bias(call, slice(TEXT, TEXT + 150), slice(0, TEXT), 1.5)
    method.plan(call, request)
    assert request.sparse
    return request


def defined_error(call: AttentionCall, request: Request, places: torch.Tensor, biased: bool) -> float:
    """The definition: full sparse attention against full exact attention, the rows picked out afterwards."""
    logits = torch.zeros(1, 1, TEXT + VISUAL, TEXT + VISUAL)
    logits[:, :, TEXT : TEXT + 150, :TEXT] = 1.5 if biased else 0.0
    exact = reference(call, Request(), logits)[:, call.visual]
    found = executor.run(call, request, executor.dense_rows(call))[:, call.visual]
    order = None if request.permuted is None else request.permuted.order.rows
    rows = places if order is None else order[places]
    apart, size = ((x[:, rows]).flatten(1).norm(dim=1) for x in (found - exact, exact))
    return float((apart / size).max())


@pytest.mark.parametrize("mask", [None, KEYS, ADDITIVE], ids=["no mask", "boolean", "additive"])
@pytest.mark.parametrize(
    "method",
    [
        BlockSparse(density=0.3, **BLOCKS),
        BlockSparse(density=0.3, selector="sub-block", spread="head", **BLOCKS),
        RectifiedSpaAttn(density=0.3, order="hilbert", variance=True, **BLOCKS),
        RectifiedSpaAttn(density=0.3, order="hilbert", fine=0.2, first_order=True, **BLOCKS),
        RectifiedSpaAttn(density=0.3, compensation="paper", **BLOCKS),
        RectifiedSpaAttn(density=0.3, compensation="repo", order="tiles", **BLOCKS),
    ],
    ids=["pooled", "spread", "merge", "two levels", "paper", "repo"],
)
def test_the_estimate_is_the_error_of_the_sampled_rows_in_the_worst_batch_row(
    method: Any, mask: torch.Tensor | None
) -> None:
    biased = getattr(method, "compensation", "") not in ("paper", "repo")
    call = attention_call(mask)
    requests = [planned(replace(method, density=density), call, biased) for density in (0.3, 0.6)]
    for turn in (0, 1):
        places, tile = sampled_places(call, method.q_block, turn)
        assert tile == 1
        errors = sampled_errors(call, requests, places, tile)
        expected = [defined_error(call, request, places, biased) for request in requests]
        assert errors.tolist() == pytest.approx(expected, rel=1e-5)
        assert expected[0] > expected[1] > 1e-3
        tiles = (places[:8, None] // 4 * 4 + torch.arange(4)).flatten()  # four rows of the same query block each
        errors = sampled_errors(call, requests[:1], tiles, 4)
        assert float(errors) == pytest.approx(defined_error(call, requests[0], tiles, biased), rel=1e-5)


def test_every_turn_samples_other_rows_spread_over_the_picture() -> None:
    call = attention_call()
    turns = [sampled_places(call, 32, turn)[0] for turn in range(4)]
    for places in turns:
        assert len(places) == len(set(places.tolist())) == 32
        assert min(places.tolist()) >= 0 and max(places.tolist()) < VISUAL
        assert torch.histc(places.double(), 8, 0, VISUAL).min() >= 3
    assert len({int(x) for places in turns for x in places}) > 90
    assert torch.equal(turns[1], sampled_places(call, 32, 1)[0])
