"""One attention call and the request of the methods: what they say of themselves, and tensors in another order."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, fields
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_attn.errors import DitAttnError
from dit_attn.kernels import BlockLayout
from dit_attn.processors.core.call import AttentionCall, Request, SDPAArgs
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.layer import Layer
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span

GRID = (3, 4, 6)
VISUAL = 72


def attention_call(before: int = 0, after: int = 0, scale: float | None = None) -> AttentionCall:
    """A call over a video with text before and after it; every token carries its own number."""
    spans = [span for span in (Span("text", before), visual_span("video", GRID), Span("text", after)) if span.length]
    tokens = TokenLayout(tuple(spans)).resolve(before + VISUAL + after)
    assert tokens is not None
    q, k, v = (torch.arange(2 * 2 * tokens.seq_len * 4.0).reshape(2, tokens.seq_len, 2, 4) + i for i in range(3))
    return AttentionCall(q, k, v, None, scale, False, Layer("blocks.0", 0), tokens, Clock())


def test_a_call_asks_its_host_for_the_tokens_of_a_prompt() -> None:
    call = attention_call(after=3)
    with pytest.raises(DitAttnError, match="the prompts of this run are not known"):
        call.prompt_tokens("red")
    asked = []
    call.find_piece = lambda *given: asked.append(given) or torch.ones(2, 75, dtype=torch.bool)
    assert call.prompt_tokens("red").all() and asked[0][1] == "red" and asked[0][0] is call


@pytest.mark.parametrize(
    ("given_by_host", "split"),
    [({}, False), ({"mesh": object()}, True), ({"unsupported": "ring attention"}, True)],
)
def test_a_sequence_is_split_where_a_mesh_or_a_reason_is_given(given_by_host: dict[str, Any], split: bool) -> None:
    x = torch.zeros(1, 4, 2, 8)
    assert SDPAArgs(x, x, x, **given_by_host).split is split


def test_arguments_of_a_call_cannot_be_changed_and_default_to_plain_attention() -> None:
    x = torch.zeros(1, 4, 2, 8)
    args = SDPAArgs(x, x, x)
    rest = [getattr(args, spec.name) for spec in fields(args)[3:]]
    assert rest == [None, None, False, 0.0, False, None, False, None, 0]
    with pytest.raises(FrozenInstanceError):
        args.scale = 1.0  # type: ignore[misc]


def test_the_visual_rows_and_the_softmax_scale_of_a_call() -> None:
    assert attention_call(5, 2).visual == slice(5, 5 + VISUAL)
    assert attention_call().softmax_scale == 0.5  # of 4 channels
    assert attention_call(scale=0.125).softmax_scale == 0.125


def test_a_request_is_empty_until_it_says_how_the_visual_rows_are_computed() -> None:
    request = Request()
    request.decline("dense step")
    request.decline("dense layer")
    assert request.empty and request.declined == ["dense step", "dense layer"]
    assert not Request(layout=BlockLayout.dense(64, 64, 32, 32)).empty
    assert not Request(compute_visual=lambda: torch.zeros(1)).empty


@given(
    before=st.integers(0, 5),
    after=st.integers(0, 5),
    order=st.sampled_from(["none", "hilbert", "tiles", "columns"]),
    masked=st.booleans(),
)
def test_a_permuted_call_carries_every_token_with_its_mask_and_is_undone(
    before: int, after: int, order: str, masked: bool
) -> None:
    call, request = attention_call(before, after), Request()
    seq_len = call.k.shape[1]
    if masked:
        request.key_mask = (torch.arange(seq_len) % 3 > 0).expand(2, -1)
        request.key_bias = call.k[:1, :, :, 0].transpose(1, 2) * 2.0  # (1, H, S), tells the token it belongs to
    permuted = request.permute(call, order, (1, 2, 3))
    assert torch.equal(permuted.unpermute(permuted.q), call.q[:, call.visual])
    assert torch.equal(permuted.v - permuted.k, torch.ones_like(call.k))  # keys and values move together
    assert torch.equal(permuted.k.sort(1).values, call.k)  # each token once
    assert torch.equal(permuted.k[:, :VISUAL], permuted.q + 1.0)  # visual keys in the order of the queries
    assert torch.equal(permuted.k[:, VISUAL:], torch.cat([call.k[:, :before], call.k[:, before + VISUAL :]], 1))
    if masked:
        assert request.key_mask is not None and permuted.key_mask is not None and permuted.key_bias is not None
        number = (permuted.k[0, :, 0, 0] - 1.0) / 8.0  # of the token at each position
        assert torch.equal(permuted.key_mask[0], number % 3 > 0)
        assert torch.equal(permuted.key_bias[0], permuted.k[0, :, :, 0].T * 2.0)
    else:
        assert permuted.key_mask is permuted.key_bias is None
