"""The fused selection in Triton's interpreter against plain torch; run by test_triton_selection with the flag set."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from dit_attn.errors import DitAttnError
from dit_attn.kernels.layouts.block_layout import BlockLayout, ceil_div, selected_bits
from dit_attn.kernels.selection import triton_pool, triton_select
from dit_attn.kernels.selection.pooling import pool_stats
from dit_attn.kernels.selection.select import (
    BlockPlan,
    block_probabilities,
    block_scores,
    plan_blocks,
    plan_scores,
    unpack_bits,
)

assert os.environ.get("TRITON_INTERPRET") == "1", "these cases run in Triton's interpreter"
EXAMPLES = settings(max_examples=6, deadline=None, derandomize=True, phases=(Phase.generate,))
INF = float("inf")


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def heads_first(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, stored (B, H, S, D)."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def padded_rows(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, in rows that are longer than they are."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + 5), float("nan"))
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


STORED = {"plain": lambda x: x, "heads first": heads_first, "padded rows": padded_rows, "strided": lambda x: spread(x)}


def spread(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, every other one of a tensor."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), float("nan"))
    wide[..., ::2] = x
    return wide[..., ::2]


def same_plan(ours: BlockPlan, theirs: BlockPlan) -> None:
    """Equal lists, counts, mass and bits; the lists ascend and hold nothing twice."""
    assert ours.layout.check() == theirs.layout
    if theirs.bits is None or theirs.selected_mass is None:
        assert ours.bits is None and ours.selected_mass is None
        return
    assert ours.bits is not None and ours.selected_mass is not None
    assert torch.equal(ours.bits, theirs.bits)
    assert torch.allclose(ours.selected_mass, theirs.selected_mass, atol=1e-5)


# -- pooling -----------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(
    st.integers(1, 40), st.sampled_from((5, 12, 16, 33)), st.sampled_from((8, 20)), st.booleans(),
    st.sampled_from(tuple(STORED)), st.sampled_from((torch.float32, torch.bfloat16, torch.float16)),
)  # fmt: skip
def test_pooling_equals_plain_torch(
    seq: int, block: int, dim: int, masked: bool, stored: str, dtype: torch.dtype
) -> None:
    x = STORED[stored](random(2, seq, 2, dim, seed=seq)).to(dtype)
    mask = random(2, seq, seed=seq + 1) > 0 if masked else None
    mean, distance, counts = triton_pool.fused_pool(x, block, mask, deviation=True)
    expected_mean, expected_distance = pool_stats(x, block, mask)
    assert distance is not None
    assert torch.allclose(mean, expected_mean, atol=1e-5)
    assert torch.allclose(distance, expected_distance, atol=1e-5)
    present = torch.ones(2, seq, dtype=torch.bool) if mask is None else mask
    assert counts.tolist() == [[float(part.sum()) for part in row.split(block)] for row in present]


def test_a_block_larger_than_a_program_holds_is_pooled_in_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    x, mask = random(1, 100, 2, 16), random(1, 100) > 0
    expected = pool_stats(x, 48, mask)
    monkeypatch.setattr(triton_pool, "POOLED", 16 * 8)
    mean, distance, counts = triton_pool.fused_pool(x, 48, mask, deviation=True)
    assert distance is not None
    assert torch.allclose(mean, expected[0], atol=1e-6) and torch.allclose(distance, expected[1], atol=1e-6)
    assert counts.sum() == mask.sum()


def test_one_key_mask_serves_every_sample() -> None:
    x, mask = random(3, 20, 1, 8), random(1, 20) > 0
    mean, _, _ = triton_pool.fused_pool(x, 8, mask)
    assert torch.allclose(mean, pool_stats(x, 8, mask.expand(3, 20))[0], atol=1e-6)


def test_masked_tokens_never_reach_the_mean_even_as_nan() -> None:
    x, mask = random(1, 16, 1, 8), torch.arange(16)[None] < 11
    x[:, 11:] = float("nan")
    mean, distance, _ = triton_pool.fused_pool(x, 8, mask, deviation=True)
    assert distance is not None and mean.isfinite().all() and distance.isfinite().all()


# -- the choice --------------------------------------------------------------------------------------------------------


@EXAMPLES
@given(
    st.integers(1, 50), st.integers(1, 140), st.sampled_from((1, 2)), st.floats(0.02, 1.0), st.booleans(),
    st.booleans(), st.sampled_from(tuple(STORED)),
)  # fmt: skip
def test_a_density_chooses_the_blocks_plain_torch_chooses(
    q_len: int, kv_len: int, key_heads: int, density: float, with_forced: bool, masked: bool, stored: str
) -> None:
    q, k = random(2, q_len, 2, 20, seed=q_len), random(2, kv_len, key_heads, 20, seed=kv_len)
    forced = random(1, 2, 1, ceil_div(kv_len, 4), seed=7) > 1.5 if with_forced else None
    mask = random(2, kv_len, seed=9) > -1 if masked else None
    options = {"q_block": 16, "kv_block": 4, "density": density, "forced": forced, "key_mask": mask, "stats": True}
    ours = plan_blocks(STORED[stored](q), STORED[stored](k), backend="triton", **options)  # type: ignore[arg-type]
    same_plan(ours, plan_blocks(q, k, backend="torch", **options))  # type: ignore[arg-type]


@EXAMPLES
@given(st.integers(1, 40), st.integers(1, 70), st.floats(0.05, 0.99), st.integers(1, 5), st.booleans(), st.booleans())
def test_top_p_keeps_the_fewest_blocks_that_reach_the_mass(
    nq: int, nk: int, top_p: float, k_min: int, with_forced: bool, holes: bool
) -> None:
    scores = 3 * random(1, 2, nq, nk, seed=nk)
    if holes:
        scores = scores.masked_fill(random(1, 2, nq, nk, seed=1) > 1, -INF)
    forced = random(1, 1, nq, nk, seed=3) > 1.5 if with_forced else None
    sizes = {"q_len": nq * 8, "kv_len": nk * 8, "q_block": 8, "kv_block": 8}
    options = {"top_p": top_p, "k_min": k_min, "forced": forced, "stats": True, **sizes}
    ours = plan_scores(scores, backend="triton", **options)  # type: ignore[arg-type]
    same_plan(ours, plan_scores(scores, backend="torch", **options))  # type: ignore[arg-type]
    mass, selected_mass = block_probabilities(scores), ours.layout.block_mask()
    assert (mass.masked_fill(~selected_mass, 0.0).sum(-1) >= torch.where(mass.sum(-1) > 0, top_p - 1e-5, 0.0)).all()


@pytest.mark.parametrize("p, chosen", [(0.45, 5), (0.95, 10), (1.0, 10)])
def test_equal_blocks_are_taken_from_the_front_as_far_as_the_mass_needs(p: float, chosen: int) -> None:
    layout = plan_scores(
        torch.zeros(1, 1, 2, 10), top_p=p, q_len=16, kv_len=80, q_block=8, kv_block=8, backend="triton"
    ).layout
    assert layout.block_mask()[0, 0].tolist() == [[j < chosen for j in range(10)]] * 2


def test_ties_at_the_edge_of_the_budget_go_to_the_lower_index() -> None:
    scores = torch.tensor([0.0, 2.0, -0.0, 0.0, 1.0, 0.0, -3.0]).expand(1, 1, 1, 7)
    layout = plan_scores(scores, density=4 / 7, q_len=8, kv_len=56, q_block=8, kv_block=8, backend="triton").layout
    assert layout.kv_indices[0, 0, 0].tolist() == [0, 1, 2, 4]


def test_extreme_scores_keep_their_order() -> None:
    values = torch.tensor([1e-45, -1e-45, 3.4e38, -3.4e38, INF, -INF, 0.0, 1e-38])
    order = values.sort(descending=True, stable=True).indices.tolist()
    for count in range(1, 8):
        layout = plan_scores(
            values.expand(1, 1, 1, 8), density=count / 8, q_len=8, kv_len=64, q_block=8, kv_block=8, backend="triton"
        ).layout
        assert layout.kv_indices[0, 0, 0, : layout.kv_num_blocks].tolist() == sorted(order[:count])


def test_a_row_without_a_key_chooses_nothing_and_keeps_no_mass() -> None:
    q, k, mask = random(2, 16, 1, 8), random(2, 32, 1, 8), torch.zeros(2, 32, dtype=torch.bool)
    mask[1] = True
    for budget in ({"density": 0.5}, {"top_p": 0.9}):
        plan = plan_blocks(q, k, q_block=8, kv_block=8, key_mask=mask, stats=True, backend="triton", **budget)  # type: ignore[arg-type]
        assert plan.selected_mass is not None and plan.bits is not None
        assert plan.layout.kv_num_blocks[0].eq(0).all() and plan.layout.kv_num_blocks[1].ge(1).all()
        assert plan.selected_mass[0].eq(0).all() and plan.bits[0].eq(0).all()


def test_forced_blocks_are_chosen_past_the_budget_and_where_no_key_is() -> None:
    scores = torch.arange(40.0).expand(1, 1, 2, 40).clone()
    scores[..., 3] = -INF
    forced = torch.zeros(1, 1, 2, 40, dtype=torch.bool)
    forced[..., 0, 3] = True
    forced[..., 1, 10:30] = True
    options = {"density": 0.1, "forced": forced, "q_len": 16, "kv_len": 320, "q_block": 8, "kv_block": 8, "stats": True}
    ours = plan_scores(scores, backend="triton", **options)  # type: ignore[arg-type]
    assert ours.layout.kv_num_blocks[0, 0].tolist() == [4, 20]
    assert ours.layout.kv_indices[0, 0, 0, :4].tolist() == [3, 37, 38, 39]
    same_plan(ours, plan_scores(scores, backend="torch", **options))  # type: ignore[arg-type]


def test_every_bit_of_a_word_can_be_set() -> None:
    plan = plan_scores(
        torch.zeros(1, 1, 1, 70), density=1.0, q_len=8, kv_len=560, q_block=8, kv_block=8, stats=True, backend="triton"
    )
    assert plan.bits is not None and plan.bits[0, 0, 0].tolist() == [-1, -1, 63]
    assert torch.equal(unpack_bits(plan.bits, 70), plan.layout.block_mask())
    assert torch.equal(plan.bits, selected_bits(plan.layout))


PER_HEAD = {
    "density": {"density": (0.1, 0.5, 1.0, 0.26)},
    "top_p": {"top_p": (0.3, 0.7, 1.0, 0.9), "k_min": 2},
    "top_p and a least count": {"top_p": (0.3, 0.7, 0.2, 0.9), "k_min": (1, 5, 2, 7)},
    "counts of each sample": {"density": torch.tensor([[1, 4, 50, 2], [3, 1, 2, 9]])},
    "masses of each sample": {"top_p": torch.tensor([[0.5, 1.0, 0.2, 0.9], [0.1, 0.6, 0.9, 0.3]])},
}


@pytest.mark.parametrize("long", (False, True), ids=("short rows", "long rows"))
@pytest.mark.parametrize("with_forced", (False, True), ids=("", "forced"))
@pytest.mark.parametrize("name", PER_HEAD)
def test_every_head_has_its_own_budget(
    name: str, with_forced: bool, long: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if long:
        monkeypatch.setattr(triton_select, "MAX_SCORED_ROW", 4)
        monkeypatch.setattr(triton_select, "SCORE_BYTES", 1)
    q, k = random(2, 24, 4, 16), random(2, 50, 2, 16, seed=1)
    forced = random(1, 4, 3, 13, seed=2) > 1 if with_forced else None
    options = {"q_block": 8, "kv_block": 4, "forced": forced, "stats": True, **PER_HEAD[name]}
    ours = plan_blocks(q, k, backend="triton", **options)  # type: ignore[arg-type]
    same_plan(ours, plan_blocks(q, k, backend="torch", **options))  # type: ignore[arg-type]
    sizes = {"q_len": 24, "kv_len": 50, "q_block": 8, "kv_block": 4}
    given = {"forced": forced, "stats": True, **PER_HEAD[name], **sizes}
    scores = random(2, 4, 3, 13, seed=5)
    ours = plan_scores(scores, backend="triton", **given)  # type: ignore[arg-type]
    same_plan(ours, plan_scores(scores, backend="torch", **given))  # type: ignore[arg-type]


def test_the_lists_are_as_wide_as_the_head_with_most_blocks() -> None:
    scores, sizes = random(1, 3, 2, 20), {"q_len": 16, "kv_len": 160, "q_block": 8, "kv_block": 8}
    for backend in ("triton", "torch"):
        layout = plan_scores(scores, density=(0.1, 0.3, 0.2), backend=backend, **sizes).layout  # type: ignore[arg-type]
        assert layout.kv_indices.shape == (1, 3, 2, 6)
        assert layout.kv_num_blocks[0].tolist() == [[2, 2], [6, 6], [4, 4]]
        equal = plan_scores(scores, density=(0.3,) * 3, backend=backend, **sizes).layout  # type: ignore[arg-type]
        assert equal == plan_scores(scores, density=0.3, backend=backend, **sizes).layout  # type: ignore[arg-type]


@pytest.mark.parametrize("key_heads", (1, 2))
def test_rows_too_long_for_registers_are_scored_apart_with_the_same_result(
    key_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(triton_select, "MAX_SCORED_ROW", 8)
    monkeypatch.setattr(triton_select, "SCORE_BYTES", 1)
    q, k = random(2, 24, 2, 16), random(2, 100, key_heads, 16, seed=1)
    forced, mask = random(2, 2, 3, 25, seed=2) > 1, random(2, 100, seed=3) > -1
    options = {"q_block": 8, "kv_block": 4, "density": 0.3, "forced": forced, "key_mask": mask, "stats": True}
    ours = plan_blocks(q, k, backend="triton", **options)  # type: ignore[arg-type]
    same_plan(ours, plan_blocks(q, k, backend="torch", **options))  # type: ignore[arg-type]


def test_scores_may_be_stored_in_any_order() -> None:
    scores = random(2, 6, 5, 3).permute(0, 2, 3, 1)
    options = {"density": 0.4, "q_len": 24, "kv_len": 48, "q_block": 8, "kv_block": 8, "stats": True}
    ours = plan_scores(scores, backend="triton", **options)  # type: ignore[arg-type]
    same_plan(ours, plan_scores(scores, backend="torch", **options))  # type: ignore[arg-type]


def test_autocast_does_not_coarsen_the_choice() -> None:
    q, k = random(1, 64, 1, 16), random(1, 256, 1, 16, seed=1)
    expected = block_scores(q, k, 8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        scores = block_scores(q, k, 8, 4)
    assert scores.dtype == torch.float32 and torch.equal(scores, expected)


# -- operators ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("top_p, stats, with_forced", [(None, False, False), (0.8, True, True)])
def test_the_operators_keep_the_rules_of_the_compiler(top_p: float | None, stats: bool, with_forced: bool) -> None:
    q, k = random(1, 20, 2, 16), random(1, 24, 1, 16, seed=1)
    forced = random(1, 1, 1, 3) > 0 if with_forced else None
    mask = random(1, 24, seed=2) > -1
    torch.library.opcheck(triton_select.select_op, (q, k, forced, mask, 2, top_p, None, None, 0.25, 8, 8, stats))
    torch.library.opcheck(triton_select.select_scores_op, (random(1, 2, 3, 3), forced, 2, top_p, None, None, stats))
    head_count = torch.tensor([[2, 1]], dtype=torch.int32)
    head_mass = None if top_p is None else torch.tensor([[top_p]])
    tables = (head_count, head_mass)
    torch.library.opcheck(triton_select.select_op, (q, k, forced, mask, 3, top_p, *tables, 0.25, 8, 8, stats))


def test_a_change_of_density_does_not_compile_for_ever() -> None:
    q, k = random(1, 16, 1, 16), random(1, 64, 1, 16, seed=1)
    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    def choose(density: float) -> tuple[torch.Tensor, torch.Tensor]:
        layout = plan_blocks(q, k, q_block=8, kv_block=8, density=density, backend="triton").layout
        return layout.kv_indices, layout.kv_num_blocks

    compiled = torch.compile(choose, backend=count, fullgraph=True)
    for density in (0.25, 0.5, 0.75):
        assert torch.equal(compiled(density)[0], choose(density)[0])
    assert len(graphs) <= 2


@pytest.mark.parametrize("name, with_forced", [("density", False), ("density", True), ("top_p", True)])
def test_a_budget_in_a_tensor_is_one_graph_and_the_same_choice(name: str, with_forced: bool) -> None:
    q, k = random(1, 16, 1, 16), random(1, 64, 1, 16, seed=1)
    forced = random(1, 1, 1, 8, seed=2) > 0 if with_forced else None
    counter = CompileCounterWithBackend("aot_eager")

    def choose(fraction: torch.Tensor | float) -> torch.Tensor:
        sizes: dict[str, Any] = {"q_block": 8, "kv_block": 8, "forced": forced, "backend": "triton"}
        return plan_blocks(q, k, **{name: fraction}, **sizes).layout.block_mask()

    compiled = torch.compile(choose, backend=counter, fullgraph=True)
    for fraction in (0.25, 0.5, 0.8, 1.0):
        assert torch.equal(compiled(torch.tensor(fraction)), choose(fraction))
    assert counter.frame_count == 1


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_a_forced_backend_says_why_it_cannot_run() -> None:
    x = random(1, 16, 1, 8).double()
    with pytest.raises(DitAttnError, match="float64"):
        plan_blocks(x, x, q_block=8, kv_block=8, density=0.5, backend="triton")
    wide = random(1, 16, 1, 264)
    with pytest.raises(DitAttnError, match="head size 264 is above 256"):
        plan_blocks(wide, wide, q_block=8, kv_block=8, density=0.5, backend="triton")


def test_scores_of_another_length_are_refused() -> None:
    with pytest.raises(DitAttnError, match=r"scores must be \(B\|1, H\|1, 2, 4\)"):
        plan_scores(random(1, 1, 2, 3), density=0.5, q_len=16, kv_len=32, q_block=8, kv_block=8, backend="triton")


def test_the_lists_know_their_count_without_a_look_at_the_device() -> None:
    q = random(1, 64, 1, 8)
    layout = plan_blocks(q, q, q_block=8, kv_block=8, density=0.5, backend="triton").layout
    assert isinstance(layout, BlockLayout) and layout.uniform == 4 == layout.kv_indices.shape[-1]
