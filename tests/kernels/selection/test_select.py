"""Pooling and plans in plain torch: what is pooled, what a plan says about its choice, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_attn.errors import DitAttnError
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
