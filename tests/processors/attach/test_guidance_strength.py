"""The strength of guidance from the inner products of a run."""

from __future__ import annotations

import pytest
import torch

from dit_attn.processors.attach.guidance_delta import GuidanceDelta
from dit_attn.processors.attach.guidance_strength import StrengthLog


def update(delta: torch.Tensor, cond: torch.Tensor, weight: float = 1.0) -> GuidanceDelta:
    return GuidanceDelta(run=1, step=0, weight=weight, delta=[delta], cond=[cond])


def test_an_update_is_split_into_the_direction_of_guidance_and_the_rest() -> None:
    log, uncond, cond = StrengthLog(), torch.zeros(1, 2), torch.tensor([[2.0, 0.0]])
    log.add(update(torch.tensor([[1.0, 3.0]]), cond, weight=2.0), (torch.cat([uncond, cond]),), ("uncond", "cond"))
    found = log.strength
    assert found.parallel == [pytest.approx(1.0)] and found.orthogonal == [pytest.approx(3.0)]
    assert found.relative == [pytest.approx(10.0**0.5)] and found.steps == 1 and log.unmoved == 0


def test_branches_that_come_in_turns_are_one_measurement() -> None:
    log, cond = StrengthLog(), torch.tensor([[2.0, 0.0]])
    given = update(torch.tensor([[1.0, 0.0]]), cond)
    log.add(given, (cond,), ("cond",))
    assert log.strength.parallel == []  # u is not known yet
    log.add(given, (torch.zeros(1, 2),), ("uncond",))
    assert log.strength.parallel == [pytest.approx(0.5)] and log.strength.steps == 1


def test_an_update_of_exactly_0_is_counted() -> None:
    log, cond = StrengthLog(), torch.ones(1, 2)
    for delta in (torch.zeros(1, 2), torch.full((1, 2), 1e-3)):
        log.add(update(delta, cond), (cond,), ("cond",))
    assert (log.unmoved, log.strength.steps) == (1, 2)


def test_a_learned_variance_does_not_count() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3, 5)
    found = []
    for cond in (x, x[:, :4]):
        log = StrengthLog()
        log.add(update(cond + 1.0, cond), (cond,), ("cond", "cond"), channels=4)
        found.append(log.strength.relative)
    log.add(update(x + 1.0, x), (x,), ("cond", "cond"))
    assert found[0] == found[1] != log.strength.relative[1:]
