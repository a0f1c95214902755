"""Windows: exactly the pairs of the definition in any token order, windows of full tiles, and nothing of size S x S."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dit_attn.errors import DitAttnError
from dit_attn.kernels import inward_window, snapped_window, sparse_attention, token_order, window_tile
from dit_attn.kernels.layouts.element_masks import BandMask, SegmentMask, Tiles, WindowMask
from dit_attn.kernels.layouts.token_order import ORDERS
from dit_attn.kernels.layouts.windows import _exact
from tests._support.kernel_cases import holds

EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)
BLOCKS = st.sampled_from((4, 5, 8, 16))


def defined(
    grid: tuple[int, ...], window: tuple[int | None, ...], stride: tuple[int, ...], inward: bool
) -> torch.Tensor:
    """(S, S) bool, row-major, position by position as the definition has it."""
    pairs = torch.ones(1, 1, dtype=torch.bool)
    for n, size, step in zip(grid, window, stride):
        rows = torch.zeros(n, n, dtype=torch.bool)
        for p in range(n):
            center = p if step == 1 else min(step * (p // step) + step // 2, n - 1)
            if size is None:
                rows[p] = True
            elif inward:
                first = min(max(center - size // 2, 0), max(n - size, 0))
                rows[p, first : first + size] = True
            else:
                first = center - size // 2
                rows[p, max(0, first) : min(n - 1, first + size - 1) + 1] = True
        pairs = torch.kron(pairs.int(), rows.int()) > 0
    return pairs


@st.composite
def windows(draw: st.DrawFn) -> dict[str, Any]:
    grid = tuple(draw(st.lists(st.integers(1, 7), min_size=1, max_size=3)))
    sizes = [st.one_of(st.none(), st.integers(1, 2 * n + 2)) for n in grid]
    return {
        "grid": grid,
        "window": tuple(draw(size) for size in sizes),
        "stride": tuple(draw(st.sampled_from((1, 1, 2, 3, 9))) for _ in grid),
        "inward": draw(st.booleans()),
    }


@EXAMPLES
@given(
    windows(), st.sampled_from((None, *sorted(ORDERS))), st.tuples(*[st.integers(1, 4)] * 3), BLOCKS, BLOCKS,
    st.sampled_from((0, 3, 9)), st.sampled_from((0, 5)), st.booleans(),
)  # fmt: skip
def test_a_window_attends_to_the_neighbors_and_the_text_in_any_order(
    rule: dict[str, Any], name: str | None, tile: tuple[int, int, int], q_block: int, kv_block: int, before: int,
    after: int, text_rows: bool,
) -> None:  # fmt: skip
    grid = rule["grid"]
    cells, read = math.prod(grid), defined(**rule)
    order = None if name is None else token_order(name, (1,) * (3 - len(grid)) + grid, tile=tile)
    if order is not None:
        read = read[order.order][:, order.order]
    pairs = torch.ones(before + cells + after, before + cells + after, dtype=torch.bool)
    pairs[before : before + cells, before : before + cells] = read
    pairs = pairs if text_rows else pairs[before : before + cells]
    text: dict[str, Any] = {"text_before": before, "text_after": after, "text_rows": text_rows}
    holds(inward_window(**rule, order=order, **text, q_block=q_block, kv_block=kv_block), pairs)


@EXAMPLES
@given(windows())
def test_inward_windows_have_equally_many_keys(rule: dict[str, Any]) -> None:
    rule["inward"] = True
    layout = inward_window(**rule, q_block=8, kv_block=8)
    sizes = [n if k is None else min(k, n) for n, k in zip(rule["grid"], rule["window"])]
    assert (layout.materialize().sum(-1) == math.prod(sizes)).all()


@EXAMPLES
@given(
    st.tuples(*[st.integers(1, 4)] * 3), st.tuples(st.integers(1, 2), st.integers(1, 3), st.integers(1, 4)),
    st.tuples(*[st.one_of(st.none(), st.integers(1, 14))] * 3), st.sampled_from((0, 7)), st.booleans(),
)  # fmt: skip
def test_a_snapped_window_is_the_inward_window_of_the_tiles(
    counts: tuple[int, int, int], tile: tuple[int, int, int], window: tuple[int | None, ...], text: int, rows: bool
) -> None:
    grid = tuple(n * side for n, side in zip(counts, tile))
    block, order = math.prod(tile), token_order("tiles", grid, tile=tile)
    layout = snapped_window(
        grid, window, order=order, q_block=block, kv_block=block, text_after=text, text_rows=rows
    ).check()
    tiles = tuple(None if k is None else -(-k // side) for k, side in zip(window, tile))
    near = defined(counts, tiles, (1, 1, 1), True)
    visited = order.coordinates()[::block] // torch.tensor(tile)
    number = (visited[:, 0] * counts[1] + visited[:, 1]) * counts[2] + visited[:, 2]
    near = near[number][:, number].repeat_interleave(block, 0).repeat_interleave(block, 1)
    pairs = torch.ones(len(order) + (text if rows else 0), len(order) + text, dtype=torch.bool)
    pairs[: len(order), : len(order)] = near
    assert layout.elements is None and torch.equal(layout.materialize()[0, 0], pairs)


def test_a_snapped_window_of_larger_query_tiles_is_centered_and_never_smaller_than_asked_for() -> None:
    grid, order = (1, 48, 64), token_order("tiles", (48, 64), tile=(1, 8, 8))
    for size in (3, 16, 20, 32, 47):
        layout = snapped_window(grid, size, order=order, q_block=128, kv_block=64).check()
        assert layout.uniform is not None and layout.elements is None  # equally many, and all full
        queries, keys = order.coordinates().view(-1, 128, 3), order.coordinates().view(-1, 64, 3)
        for row in range(layout.nq):
            found = keys[layout.kv_indices[0, 0, row].long()].flatten(0, 1)
            low, high = found.amin(0), found.amax(0)
            assert (high - low + 1 >= torch.tensor([1, min(size, 48), min(size, 64)])).all()
            assert (queries[row].amin(0) >= low).all() and (queries[row].amax(0) <= high).all()
            if size == 32 and low[2] >= 16 and high[2] < 48:
                assert queries[row, :, 2].amin() - low[2] == high[2] - queries[row, :, 2].amax() == 8


@pytest.mark.parametrize("window", [(None, 6, 8), 99, None])
def test_a_window_as_large_as_the_grid_is_dense(window: Any) -> None:
    grid = (3, 6, 8)
    order = token_order("tiles", grid, tile=(3, 2, 2))
    exact = inward_window(grid, window, q_block=8, kv_block=8, text_after=3)
    snapped = snapped_window(grid, window, order=order, q_block=12, kv_block=12, text_after=3)
    assert exact.elements is None and exact.is_dense and snapped.is_dense
    q, k, v = torch.randn(3, 1, 147, 2, 8)
    dense = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))
    assert torch.equal(sparse_attention(q, k, v, snapped), dense.transpose(1, 2))


@pytest.mark.parametrize("backend", ("gather", "flex"))
@pytest.mark.parametrize("text", (0, 5))
def test_attention_in_tile_order_is_attention_with_the_mask(backend: str, text: int) -> None:
    grid, sizes = (2, 9, 10), (None, 4, 5)
    order = token_order("tiles", grid, tile=(2, 2, 4))  # does not divide the grid
    q, k, v = torch.randn(3, 1, 2, 180 + text, 16)
    mask = torch.ones(180 + text, 180 + text, dtype=torch.bool)
    mask[:180, :180] = defined(grid, sizes, (1, 1, 1), True)
    expected = torch.nn.functional.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    layout = inward_window(grid, sizes, order=order, q_block=16, kv_block=32, text_after=text)
    permuted = (order.apply(x, 2) for x in (q, k, v))
    out = sparse_attention(*permuted, layout, backend=backend, tensor_layout="bhsd")
    assert isinstance(out, torch.Tensor)
    torch.testing.assert_close(order.undo(out, 2).double(), expected, rtol=1e-5, atol=1e-5)


@EXAMPLES
@given(windows(), st.sampled_from(("identity", "tiles", "columns")), BLOCKS, BLOCKS, st.sampled_from((0, 3)))
def test_factors_allow_exactly_the_pairs_of_the_rule(
    rule: dict[str, Any], name: str, q_block: int, kv_block: int, before: int
) -> None:
    grid = rule["grid"]
    order = token_order(name, (1,) * (3 - len(grid)) + grid, tile=(2, 2, 3))
    layout = inward_window(**rule, order=order, text_before=before, text_after=2, q_block=q_block, kv_block=kv_block)
    if layout.elements is None:
        return
    rows, columns = torch.arange(layout.q_len // q_block), torch.arange(layout.nk).expand(layout.q_len // q_block, -1)
    tiles = Tiles(0, torch.zeros_like(rows), rows, columns, columns, q_block, q_block, kv_block)
    key = torch.arange(layout.nk * kv_block)
    expected = layout.elements.allowed_pairs(tiles) & (key < layout.kv_len)
    found = torch.ones_like(expected)
    for allowed, row in layout.elements.factors(tiles) or ():
        found &= allowed.gather(1, row.long()[..., None].expand(-1, -1, allowed.shape[2]))
    assert torch.equal(found, expected)


def test_only_windows_have_factors() -> None:
    nothing = torch.zeros(1, dtype=torch.int64)
    tiles = Tiles(0, nothing, nothing, nothing[:, None], nothing[:, None], 4, 4, 4)
    ids = torch.zeros(1, 4, dtype=torch.int32)
    assert BandMask(1, 1).factors(tiles) is None and SegmentMask(ids, ids).factors(tiles) is None


def test_time_inside_the_tile_leaves_most_blocks_full() -> None:
    grid = (21, 68, 120)  # 1088 x 1920, 81 frames; a window of the training size
    order = token_order("tiles", grid, tile=window_tile(grid))
    layout = inward_window(grid, (None, 31, 53), order=order, q_block=126, kv_block=126)
    assert layout.density == pytest.approx(0.2255, abs=1e-4)
    full = float(layout.full_kv_num_blocks.sum() / layout.kv_num_blocks.sum())  # type: ignore[union-attr]
    assert full == pytest.approx(0.832, abs=1e-3)
    assert isinstance(layout.elements, WindowMask) and layout.elements.places.shape == (1, 21 * 68 * 120, 3)


class Largest(TorchDispatchMode):
    """Records the largest tensor that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


@pytest.mark.parametrize(("name", "tile"), [("identity", None), ("tiles", (4, 4, 8)), ("tiles", (4, 5, 7))])
def test_nothing_of_the_size_of_the_attention_matrix_is_made(name: str, tile: tuple[int, int, int] | None) -> None:
    grid = (4, 60, 64)
    order = token_order(name, grid, tile=tile)
    _exact.cache_clear()
    with Largest() as largest:
        inward_window(grid, (None, 15, 15), order=order)
    assert 0 < largest.numel < len(order) ** 2 / 50


def test_windows_are_made_once() -> None:
    layout = inward_window((5, 23, 20), (3, 9, 11))
    assert inward_window((5, 23, 20), (3, 9, 11)) is layout
    assert layout.token_density == pytest.approx(3 * 9 * 11 / (5 * 23 * 20), rel=1e-9)
    order = token_order("tiles", (32, 32), tile=(1, 8, 16))
    assert snapped_window((32, 32), 16, order=order) is snapped_window((1, 32, 32), (1, 16, 16), order=order)


def test_the_tile_of_a_window_divides_the_grid_and_holds_all_frames() -> None:
    assert window_tile((64, 64)) == (1, 8, 16) and window_tile((64, 64), 64) == (1, 8, 8)
    assert window_tile((21, 68, 120)) == (21, 2, 3) and window_tile((21, 30, 52)) == (21, 3, 2)
    assert window_tile((21, 67, 119)) == (21, 1, 7)  # a prime number of rows
    assert window_tile((200, 4, 4)) == (100, 1, 1)


def test_a_window_that_cannot_be_is_refused() -> None:
    order = token_order("tiles", (1, 12, 20), tile=(1, 8, 8))
    for call, message in (
        (lambda: inward_window((4, 4), (3,)), "one size for each"),
        (lambda: inward_window((2, 2, 2, 2), 1), "one size for each"),
        (lambda: inward_window((4, 0), 1), "must be positive"),
        (lambda: inward_window((4, 4), (3, 0)), "must be positive"),
        (lambda: inward_window((4, 4), 3, stride=(1, 0)), "stride .* must be positive"),
        (lambda: inward_window((4, 4), 3, stride=None), "stride None must be positive"),  # type: ignore[arg-type]
        (lambda: inward_window((4, 4), 3, text_after=-1), "not negative"),
        (lambda: inward_window((4, 4), 3, order=order), "order must be one of the grid"),
        (lambda: snapped_window((12, 20), 3, order=order, q_block=64, kv_block=64), "no boxes of one shape"),
        (lambda: snapped_window((12, 20), 3, order=order, text_after=-1), "text_after -1"),
        (lambda: window_tile((4, 0)), "must be positive"),
    ):
        with pytest.raises(DitAttnError, match=message):
            call()
