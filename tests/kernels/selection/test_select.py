"""Pooling and plans in plain torch: what is pooled, what a plan says about its choice, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_attn.errors import DitAttnError
from dit_attn.kernels import sparse_attention
from dit_attn.kernels.layouts import block_layout
from dit_attn.kernels.layouts.block_layout import selected_bits
from dit_attn.kernels.selection import pooling, select
from dit_attn.kernels.selection.dispatch import unsupported_reason_fused
from dit_attn.kernels.selection.pooling import block_counts, pool_blocks, pool_stats
from dit_attn.kernels.selection.select import (
    block_scores,
    plan_blocks,
    plan_scores,
    select_blocks,
    selected_mass,
    unpack_bits,
)

EXAMPLES = settings(max_examples=30, deadline=None, derandomize=True)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@EXAMPLES
@given(st.integers(1, 60), st.integers(1, 17), st.booleans(), st.sampled_from((torch.float32, torch.bfloat16)))
def test_statistics_of_a_block_are_those_of_its_valid_tokens(
    seq: int, block: int, masked: bool, dtype: torch.dtype
) -> None:
    x = random(2, seq, 3, 5, seed=seq).to(dtype)
    mask = random(2, seq, seed=block) > 0 if masked else torch.ones(2, seq, dtype=torch.bool)
    mean, distance = pool_stats(x, block, mask if masked else None)
    counts = block_counts(x, block, mask if masked else None)
    for b in range(2):
        for j in range(mean.shape[2]):
            tokens = x[b, j * block : (j + 1) * block][mask[b, j * block : (j + 1) * block]].double()
            assert counts.expand(2, 1, -1)[b, 0, j] == len(tokens)
            centre = tokens.mean(0) if len(tokens) else torch.zeros(3, 5, dtype=torch.float64)
            spread = (tokens - centre).abs().mean(0) if len(tokens) else centre
            assert torch.allclose(mean[b, :, j].double(), centre, atol=1e-5)
            assert torch.allclose(distance[b, :, j].double(), spread, atol=1e-5)
    assert torch.allclose(mean, pool_blocks(x, block, mask if masked else None), atol=1e-6)


def test_a_long_sequence_is_pooled_in_chunks_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    x, mask = random(1, 103, 2, 8).bfloat16(), random(1, 103) > 0
    expected = pool_stats(x, 8, mask)
    monkeypatch.setattr("dit_attn.kernels.selection.pooling.CPU_CHUNK", 1)
    pooled = pool_stats(x, 8, mask)
    assert torch.equal(pooled[0], expected[0]) and torch.equal(pooled[1], expected[1])


@EXAMPLES
@given(st.integers(1, 100), st.floats(0.05, 1.0), st.booleans())
def test_bits_and_mass_say_what_the_layout_holds(nk: int, fraction: float, by_mass: bool) -> None:
    scores = 2 * random(2, 2, 3, nk, seed=nk)
    budget = {"top_p": fraction} if by_mass else {"density": fraction}
    sizes = {"q_len": 12, "kv_len": 4 * nk, "q_block": 4, "kv_block": 4}
    plan = plan_scores(scores, stats=True, **budget, **sizes)  # type: ignore[arg-type]
    assert plan.bits is not None and plan.selected_mass is not None
    selected_mass = plan.layout.block_mask()
    assert torch.equal(unpack_bits(plan.bits, nk), selected_mass)
    mass = torch.softmax(scores, -1).masked_fill(~selected_mass, 0.0).sum(-1)
    assert torch.allclose(plan.selected_mass, mass, atol=1e-6)
    if by_mass:
        assert (plan.selected_mass >= fraction - 1e-5).all()


def test_bits_of_a_shared_layout_keep_their_broadcast_shape() -> None:
    layout = select_blocks(random(1, 1, 2, 33), density=0.5, q_len=8, kv_len=132, q_block=4, kv_block=4)
    assert selected_bits(layout).shape == (1, 1, 2, 2)
    assert selected_mass(random(3, 2, 2, 33), layout).shape == (3, 2, 2)


@pytest.mark.parametrize("budget", [{"density": 0.3}, {"top_p": 0.6, "k_min": 2}])
def test_a_plan_is_the_layout_of_its_scores(budget: dict[str, float]) -> None:
    q, k, mask = random(2, 30, 4, 8), random(2, 50, 2, 8, seed=1), random(2, 50, seed=2) > -1
    scores = block_scores(q, k, 8, 4, key_mask=mask)
    layout = select_blocks(scores, q_len=30, kv_len=50, q_block=8, kv_block=4, **budget)  # type: ignore[arg-type]
    plan = plan_blocks(q, k, q_block=8, kv_block=4, key_mask=mask, **budget)  # type: ignore[arg-type]
    assert plan.layout == layout and plan.bits is None and plan.selected_mass is None


def test_plans_carry_no_gradient() -> None:
    q = random(1, 16, 1, 8).requires_grad_()
    plan = plan_blocks(q, q, q_block=8, kv_block=8, density=0.5, stats=True)
    assert plan.selected_mass is not None and not plan.selected_mass.requires_grad


def test_autocast_does_not_coarsen_the_scores() -> None:
    q, k = random(1, 64, 1, 16), random(1, 256, 1, 16, seed=1)
    expected = block_scores(q, k, 8, 4)
    with torch.autocast("cpu", torch.bfloat16):
        scores = block_scores(q, k, 8, 4)
    assert scores.dtype == torch.float32 and torch.equal(scores, expected)


def test_scores_can_be_planned_on_a_device_without_data() -> None:
    q = torch.empty(1, 32, 2, 8, device="meta")
    assert block_scores(q, q, 8, 8).shape == (1, 2, 4, 4)


@pytest.mark.parametrize(
    "x, blocks, head_dim, reason",
    [
        (torch.zeros(1, dtype=torch.float64), 1, 64, "float64"),
        (torch.zeros(1), 1, 320, "head size 320 is above 256"),
        (torch.zeros(1), 9000, 64, "9000 key blocks are more than 8192"),
        (torch.zeros(1, device="meta"), 1, 64, "NVIDIA"),
    ],
)
def test_the_fused_kernels_say_why_they_refuse(x: torch.Tensor, blocks: int, head_dim: int, reason: str) -> None:
    assert reason in (unsupported_reason_fused(x, blocks, head_dim) or "")


@pytest.mark.parametrize(
    "changed, message",
    [
        ({"backend": "cuda"}, "selection backend"),
        ({"density": None}, "exactly one of density and top_p"),
        ({"density": 1.5}, "in (0, 1], got 1.5"),
        ({"forced": torch.ones(1, 1, 2, 4)}, "forced must be bool"),
        ({"forced": torch.ones(1, 1, 2, 3, dtype=torch.bool)}, "forced must expand to (B, H, nq, nk) = (1, 2, 2, 4)"),
        ({"key_mask": torch.ones(1, 31, dtype=torch.bool)}, "key_mask must be bool (1, 32)"),
        ({"key_mask": torch.ones(1, 32)}, "key_mask must be bool (1, 32)"),
    ],
)
def test_bad_input_is_named_with_what_would_fit(changed: dict[str, object], message: str) -> None:
    q, k = random(1, 16, 2, 8), random(1, 32, 1, 8)
    options = {"q_block": 8, "kv_block": 8, "density": 0.5, **changed}
    with pytest.raises(DitAttnError) as error:
        plan_blocks(q, k, **options)  # type: ignore[arg-type]
    assert message in str(error.value)


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(DitAttnError, match="3 heads, which is not a multiple of the 2 heads of k"):
        plan_blocks(random(1, 16, 3, 8), random(1, 16, 2, 8), q_block=8, kv_block=8, density=0.5)


CHECKS = ("check_budget", "check_blocks", "check_choices", "check_tokens", "check_heads", "check_key_mask")


@pytest.mark.parametrize(
    "call, expected",
    [
        (
            lambda: plan_blocks(random(1, 40, 2, 8), random(1, 40, 2, 8), q_block=8, kv_block=8, density=0.4),
            ["check_budget", "check_choices", "check_heads", "check_key_mask", "check_tokens", "check_tokens"],
        ),
        (
            lambda: plan_scores(random(1, 2, 5, 5), top_p=0.5, q_len=40, kv_len=40, q_block=8, kv_block=8, stats=True),
            ["check_blocks", "check_budget", "check_choices"],
        ),
        (
            lambda: select_blocks(random(1, 2, 5, 5), density=0.4, q_len=40, kv_len=40, q_block=8, kv_block=8),
            ["check_blocks", "check_budget", "check_choices"],
        ),
        (
            lambda: block_scores(random(1, 40, 2, 8), random(1, 40, 2, 8), 8, 8),
            ["check_heads", "check_key_mask", "check_tokens", "check_tokens"],
        ),
        (lambda: pool_blocks(random(1, 40, 2, 8), 8), ["check_key_mask", "check_tokens"]),
    ],
    ids=["plan_blocks", "plan_scores", "select_blocks", "block_scores", "pool_blocks"],
)
def test_a_public_function_checks_each_argument_once(
    monkeypatch: pytest.MonkeyPatch, call: Callable[[], Any], expected: list[str]
) -> None:
    """The two of ``check_tokens`` are for q and for k."""
    ran: list[str] = []

    def counted(name: str, check: Callable[..., None]) -> Callable[..., None]:
        return lambda *args, **kwargs: ran.append(name) or check(*args, **kwargs)

    for module in (select, pooling, block_layout):
        for name in CHECKS:
            if hasattr(module, name):
                monkeypatch.setattr(module, name, counted(name, getattr(module, name)))
    call()
    assert sorted(ran) == expected


# -- budgets per head --------------------------------------------------------------------------------------------------

SIZES: dict[str, Any] = {"q_len": 40, "kv_len": 80, "q_block": 8, "kv_block": 4}
HEADS = (0.07, 0.4, 1.0, 0.23)


@pytest.mark.parametrize("with_forced", (False, True))
@pytest.mark.parametrize("name", ("density", "top_p"))
def test_a_head_gets_the_blocks_of_its_own_budget(name: str, with_forced: bool) -> None:
    scores = 2 * random(2, 4, 5, 20)
    forced = random(1, 4, 5, 20, seed=1) > 1 if with_forced else None
    given = {"tuple": HEADS, "tensor": torch.tensor(HEADS), "row": torch.tensor([HEADS], dtype=torch.float64)}
    plans = [plan_scores(scores, **{name: value}, forced=forced, **SIZES).layout for value in given.values()]
    assert plans[0] == plans[1] == plans[2] == select_blocks(scores, **{name: HEADS}, forced=forced, **SIZES)
    for head, value in enumerate(HEADS):
        fixed = None if forced is None else forced[:, head : head + 1]
        alone = plan_scores(scores[:, head : head + 1], **{name: value}, forced=fixed, **SIZES).layout
        assert torch.equal(plans[0].block_mask()[:, head], alone.block_mask()[:, 0])
    assert plans[0].block_mask()[:, 2].all()
    assert plans[0].kv_indices.shape[-1] == int(plans[0].kv_num_blocks.max())


def test_samples_may_have_budgets_of_their_own_as_fractions_or_counts() -> None:
    scores = random(2, 3, 5, 20)
    counts = torch.tensor([[1, 20, 7], [3, 2, 40]], dtype=torch.int32)
    by_count = plan_scores(scores, density=counts, **SIZES).layout
    assert by_count.kv_num_blocks[..., 0].tolist() == [[1, 20, 7], [3, 2, 20]]
    assert by_count == plan_scores(scores, density=counts.clamp(max=20) / 20, **SIZES).layout


def test_a_mass_of_each_head_has_a_least_count_of_each_head() -> None:
    scores = random(1, 3, 5, 20)
    layout = plan_scores(scores, top_p=(0.01, 0.01, 0.8), k_min=(1, 4, 2), **SIZES).layout
    assert layout.kv_num_blocks[0, 0].eq(1).all() and layout.kv_num_blocks[0, 1].eq(4).all()
    assert layout.kv_num_blocks[0, 2].gt(4).all()


def test_the_budgets_are_those_of_the_query_heads() -> None:
    q, k = random(1, 40, 4, 8), random(1, 80, 2, 8, seed=1)
    grouped = plan_blocks(q, k, q_block=8, kv_block=4, density=HEADS).layout
    repeated = plan_blocks(q, k.repeat_interleave(2, 2), q_block=8, kv_block=4, density=HEADS).layout
    assert grouped == repeated and grouped.kv_num_blocks[0, :, 0].tolist() == [2, 8, 20, 5]


def test_a_head_with_budget_1_is_dense() -> None:
    q, k, v = (random(1, 80, heads, 8, seed=heads).double() for heads in (4, 2, 2))
    layout = plan_blocks(q, k, q_block=8, kv_block=4, density=(0.1, 1.0, 0.3, 1.0)).layout
    out = sparse_attention(q, k, v, layout)
    x, y, z = q.transpose(1, 2), *(t.repeat_interleave(2, 2).transpose(1, 2) for t in (k, v))
    exact = torch.softmax(x @ y.transpose(-1, -2) * 8**-0.5, -1) @ z
    assert isinstance(out, torch.Tensor)
    error = (out.transpose(1, 2) - exact).abs().amax((0, 2, 3))
    assert error[1] < 1e-14 and error[3] < 1e-14 and error[0] > 1e-3 and error[2] > 1e-3


@pytest.mark.parametrize(
    "given, message",
    [
        ({"density": (0.5, 0.5, 0.5)}, "density must be a number, or 2 numbers, one for each query head"),
        ({"density": (0.5, "a")}, "or 2 numbers"),
        ({"density": "ab"}, "or 2 numbers"),
        ({"density": (0.5, 0.0)}, "in (0, 1], got 0.0"),
        ({"density": (0.5, float("nan"))}, "in (0, 1], got nan"),
        ({"top_p": (0.5, 1.5)}, "in (0, 1], got 1.5"),
        ({"density": torch.tensor([0.5, 2.0])}, "in (0, 1], got 2.0"),
        ({"density": torch.full((2, 2), 0.5)}, "(2,) or (B|1, 2), got (2, 2) float32"),
        ({"top_p": torch.tensor([1, 2])}, "got (2,) int64"),
        ({"density": torch.tensor([1, 0])}, "counts key blocks, at least 1, got 0"),
        ({"top_p": 0.5, "k_min": (1, 2, 3)}, "k_min must be a number, or 2 numbers"),
    ],
)
def test_a_budget_that_does_not_fit_the_heads_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(DitAttnError) as error:
        plan_blocks(random(1, 16, 2, 8), random(1, 32, 1, 8), q_block=8, kv_block=8, **given)
    assert message in str(error.value)
