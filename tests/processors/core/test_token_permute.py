"""Token permutations: undone exactly, attention unchanged, and the blocks that are always computed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_attn.processors.core.token_permute import forced_blocks, permute_tokens, token_permutation
from dit_attn.processors.core.tokens import Span, TokenLayout, Tokens, visual_span

GRID = (5, 6, 8)
CPU = torch.device("cpu")


def resolved(*spans: Span) -> Tokens:
    """The tokens of some spans that have lengths."""
    tokens = TokenLayout(spans).resolve(sum(span.length or 0 for span in spans))
    assert tokens is not None
    return tokens


GRIDS = st.tuples(st.integers(1, 4), st.integers(1, 6), st.integers(1, 6))


@st.composite
def sequences(draw: st.DrawFn) -> Tokens:
    """Text, a video, perhaps a reference image, and text."""
    spans = [Span("text", draw(st.integers(0, 9))), visual_span("video", draw(GRIDS))]
    spans += [visual_span("reference", (1, *draw(GRIDS)[1:]))] * draw(st.integers(0, 1))
    return resolved(*spans, Span("text", draw(st.integers(0, 9))))


@pytest.mark.parametrize("order", ["hilbert", "tiles"])
def test_a_token_permutation_is_undone(order: str) -> None:
    spans = (Span("text", 7), visual_span("video", GRID), visual_span("reference", (1, 4, 4)))
    tokens = TokenLayout(spans).resolve(7 + 240 + 16)
    assert tokens is not None
    plan = token_permutation(tokens, order, (2, 2, 2), torch.device("cpu"))
    assert plan.rows is not None and plan.inverse is not None and plan.keys is not None
    assert torch.equal(plan.rows[plan.inverse], torch.arange(256))
    assert torch.equal(plan.keys.sort().values, torch.arange(263))
    assert torch.equal(plan.keys[256:], torch.arange(7))
    assert int(plan.rows[:240].max()) == 239  # the clip's tokens stay together


@settings(deadline=None)
@given(tokens=sequences(), name=st.sampled_from(["none", "hilbert", "tiles", "columns"]))
def test_attention_of_permuted_tokens_is_attention(tokens: Tokens, name: str) -> None:
    assert tokens.visual_range is not None
    visual = slice(*tokens.visual_range)
    draw = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 1, tokens.seq_len, 1, 4, generator=draw, dtype=torch.float64)
    bias = torch.randn(1, 1, tokens.seq_len, generator=draw)
    mask = torch.rand(1, tokens.seq_len, generator=draw) < 0.7
    mask[:, visual] = True

    def attention(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor, mask: torch.Tensor
    ) -> torch.Tensor:
        logits = torch.einsum("bqhd,bkhd->bhqk", q, k) + bias[:, :, None]
        return torch.einsum("bhqk,bkhd->bqhd", logits.masked_fill(~mask[:, None, None], -torch.inf).softmax(-1), v)

    rows = permute_tokens(tokens, q[:, visual], k, v, mask, bias, name, (1, 2, 2))
    assert rows.key_mask is not None and rows.key_bias is not None
    out = rows.unpermute(attention(rows.q, rows.k, rows.v, rows.key_bias, rows.key_mask))
    torch.testing.assert_close(out, attention(q[:, visual], k, v, bias, mask), atol=1e-12, rtol=1e-12)


def test_the_identity_moves_nothing_and_text_before_the_video_goes_behind_it() -> None:
    x = torch.randn(1, 247, 2, 4)
    alone = permute_tokens(resolved(visual_span("video", GRID)), x[:, :240], x[:, :240], x[:, :240], None, None, "none")
    assert alone.k.data_ptr() == x.data_ptr() and alone.unpermute(alone.q) is alone.q
    assert alone.order.rows is alone.order.inverse is alone.order.keys is None
    last = permute_tokens(resolved(Span("text", 7), visual_span("video", GRID)), x[:, 7:], x, x, None, None, "none")
    assert torch.equal(last.k, torch.cat([x[:, 7:], x[:, :7]], 1)) and last.order.rows is None


def test_a_permutation_is_computed_once() -> None:
    tokens = resolved(Span("text", 7), visual_span("video", GRID))
    assert token_permutation(tokens, "hilbert", None, CPU) is token_permutation(tokens, "hilbert", None, CPU)
    assert token_permutation(tokens, "tiles", (1, 2, 2), CPU) is not token_permutation(tokens, "tiles", (1, 3, 2), CPU)


# -- blocks that are always computed ----------------------------------------------------------------------------------


def blocks_of(rows: torch.Tensor, columns: torch.Tensor, q_block: int, kv_block: int) -> set[tuple[int, int]]:
    """The blocks that hold pairs of positions."""
    return {(int(row) // q_block, int(column) // kv_block) for row, column in zip(rows, columns, strict=True)}


def chosen(mask: torch.Tensor) -> set[tuple[int, int]]:
    """The blocks of a (1, 1, nq, nk) mask."""
    assert mask.shape[:2] == (1, 1)
    return {(int(i), int(j)) for i, j in mask[0, 0].nonzero()}


def pairs(rows: torch.Tensor, columns: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """All pairs of some rows and some columns."""
    grid = torch.meshgrid(rows, columns, indexing="ij")
    return grid[0].flatten(), grid[1].flatten()


def first_frames(tokens: Tokens) -> torch.Tensor:
    """Tokens of the sequence in the first frame of its video."""
    found = [
        torch.arange(s.start, s.start + s.grid[1] * s.grid[2]) for s in tokens.spans if s.kind == "video" and s.grid
    ]
    return torch.cat(found)


KEEP = st.sets(st.sampled_from(["text", "first-frame", "diagonal"]), min_size=1).map(lambda names: tuple(sorted(names)))
BLOCKS = st.sampled_from([4, 7, 16])


@settings(deadline=None)
@given(tokens=sequences(), keep=KEEP, q_block=BLOCKS, kv_block=BLOCKS)
def test_forced_blocks_hold_the_tokens_they_are_kept_for_and_no_others(
    tokens: Tokens, keep: tuple[str, ...], q_block: int, kv_block: int
) -> None:
    assert tokens.visual_range is not None
    start, stop = tokens.visual_range
    rows, everything = torch.arange(stop - start), torch.arange(tokens.seq_len)
    wanted: set[tuple[int, int]] = set()
    if "text" in keep:
        wanted |= blocks_of(*pairs(rows, everything[(everything < start) | (everything >= stop)]), q_block, kv_block)
    if "first-frame" in keep:
        wanted |= blocks_of(*pairs(rows, first_frames(tokens)), q_block, kv_block)
    if "diagonal" in keep:  # columns from the first to the last token of a row block
        last = torch.tensor([min(((int(row) // q_block) + 1) * q_block, stop - start) - 1 for row in rows])
        for columns in (rows + start, last + start):
            wanted |= blocks_of(rows, columns, q_block, kv_block)
    found = forced_blocks(tokens, keep, q_block, kv_block, CPU)
    assert found is not None and chosen(found) == wanted


def test_nothing_is_forced_where_nothing_is_kept() -> None:
    assert forced_blocks(resolved(Span("text", 7), visual_span("video", GRID)), (), 16, 16, CPU) is None


@settings(deadline=None)
@given(tokens=sequences(), keep=st.sampled_from([(), ("diagonal",), ("first-frame",), ("diagonal", "first-frame")]),
       name=st.sampled_from(["none", "hilbert"]), q_block=BLOCKS, kv_block=BLOCKS)  # fmt: skip
def test_forced_blocks_of_a_permutation_hold_what_is_not_visual_and_what_is_kept(
    tokens: Tokens, keep: tuple[str, ...], name: str, q_block: int, kv_block: int
) -> None:
    order = token_permutation(tokens, name, None, CPU)
    rows = torch.arange(order.visual)
    wanted = blocks_of(*pairs(rows, torch.arange(order.visual, tokens.seq_len)), q_block, kv_block)
    if "diagonal" in keep:
        wanted |= blocks_of(rows, rows, q_block, kv_block)
    if "first-frame" in keep:
        assert tokens.visual_range is not None
        keys = torch.arange(tokens.seq_len) if order.keys is None else order.keys
        places = torch.isin(keys, first_frames(tokens)).nonzero()[:, 0]
        wanted |= blocks_of(*pairs(rows, places), q_block, kv_block)
    assert chosen(order.forced(keep, tokens.seq_len, q_block, kv_block)) == wanted


def test_neighbors_are_the_tokens_around_each_token_of_the_grid() -> None:
    tokens = resolved(visual_span("video", GRID), Span("text", 5))
    order = token_permutation(tokens, "hilbert", None, CPU)
    places = order.parts[0].coordinates()
    near = ((places[:, None] - places[None]).abs().amax(-1) <= 1).nonzero()
    text = pairs(torch.arange(240), torch.arange(240, 245))
    wanted = blocks_of(near[:, 0], near[:, 1], 16, 12) | blocks_of(*text, 16, 12)
    assert chosen(order.forced(("neighbors",), 245, 16, 12)) == wanted
