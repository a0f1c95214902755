"""The clock finds step, run and branch from whatever the pipeline tells, and resets itself."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dit_attn.processors.core.cfg import BATCHED, SEPARATE, CFGRule
from dit_attn.processors.core.clock import Clock, RunPosition


def scheduler(timesteps: list[float], **extra: Any) -> SimpleNamespace:
    return SimpleNamespace(timesteps=timesteps, **extra)


def test_timestep_alone_gives_steps_and_branches() -> None:
    clock, seen = Clock(), []
    for timestep in (900.0, 900.0, 500.0, 500.0):
        clock.tick(timestep, SEPARATE)
        seen.append((clock.step, clock.branches(1, SEPARATE)[0]))
    assert seen == [(0, "cond"), (0, "uncond"), (1, "cond"), (1, "uncond")]
    assert clock.total is None and clock.progress == pytest.approx(0.5)


def test_timestep_that_goes_back_up_begins_a_new_run() -> None:
    clock = Clock()
    for timestep in (900.0, 500.0, 900.0):
        clock.tick(timestep, BATCHED)
    assert (clock.run, clock.step) == (2, 0)


def test_growing_timesteps_are_not_a_new_run() -> None:
    clock = Clock()
    for timestep in (0.0, 0.3, 0.6):
        clock.tick(timestep, BATCHED, grows=True)
    assert (clock.run, clock.step) == (1, 2)


def test_new_schedule_begins_a_new_run_after_a_run_that_died_early() -> None:
    clock = Clock()
    clock.tick(900.0, SEPARATE, scheduler=scheduler([900.0, 500.0]))
    clock.tick(900.0, SEPARATE, scheduler=scheduler([900.0, 500.0]))
    assert (clock.run, clock.step, clock.branches(1, SEPARATE)) == (2, 0, ("cond",))


def test_scheduler_step_index_wins_over_counting() -> None:
    plan, clock = [900.0, 500.0, 500.0, 100.0], Clock()
    for index, timestep in ((None, 900.0), (1, 500.0), (2, 500.0), (3, 100.0)):
        source = SimpleNamespace(timesteps=plan, step_index=index)
        clock.tick(timestep, BATCHED, scheduler=source)
    assert (clock.step, clock.total) == (3, 4)


@pytest.mark.parametrize("begin", [2, None], ids=["told", "looked up"])
def test_a_run_that_begins_late_in_its_schedule_is_counted_from_there(begin: int | None) -> None:
    plan, clock, seen = [900.0, 700.0, 500.0, 300.0, 100.0], Clock(), []
    for index, timestep in ((None, 500.0), (None, 500.0), (3, 300.0), (3, 300.0), (4, 100.0)):
        source = SimpleNamespace(timesteps=plan, step_index=index, begin_index=begin)
        clock.tick(timestep, SEPARATE, scheduler=source)
        seen.append(clock.step)
    assert seen == [0, 0, 1, 1, 2] and (clock.run, clock.total) == (1, 3)


def test_a_method_that_is_enabled_in_mid_run_knows_the_step() -> None:
    clock = Clock()
    clock.tick(300.0, SEPARATE, scheduler=SimpleNamespace(timesteps=[900.0, 300.0], step_index=1, begin_index=None))
    assert (clock.step, clock.total) == (1, 2)


def test_a_pipeline_may_say_that_its_run_is_shorter_than_the_schedule() -> None:
    clock = Clock()
    clock.tick(500.0, BATCHED, scheduler=scheduler([900.0, 500.0, 100.0]), length=2)
    assert clock.total == 2


def test_context_name_wins_over_call_order() -> None:
    clock = Clock()
    clock.tick(900.0, SEPARATE, context=SimpleNamespace(name="uncond", step_index=2, num_inference_steps=7))
    assert clock.branches(2, SEPARATE) == ("uncond", "uncond")
    assert (clock.step, clock.total) == (2, 7)


@pytest.mark.parametrize(
    "batch, stacked, expected",
    [
        (4, 2, ("uncond", "uncond", "cond", "cond")),
        (4, 1, ("cond",) * 4),
        (3, 2, ("cond",) * 3),
        (4, None, ("cond",) * 4),
    ],
)
def test_batched_branches_fill_the_batch_in_order(batch: int, stacked: int, expected: tuple[str, ...]) -> None:
    clock = Clock()
    clock.tick(900.0, BATCHED)
    assert clock.branches(batch, BATCHED, stacked) == expected


def test_a_third_branch_has_its_own_order() -> None:
    clock, guidance = Clock(), CFGRule("batched", ("cond", "uncond"), ("cond", "uncond", "image"))
    clock.tick(0.5, guidance)
    assert clock.branches(3, guidance, 3) == ("cond", "uncond", "image")
    assert clock.branches(2, guidance, 2) == ("cond", "uncond")


def test_unguided_separate_calls_are_conditional() -> None:
    clock = Clock()
    clock.tick(900.0, SEPARATE)
    clock.tick(500.0, SEPARATE)
    assert clock.branches(1, SEPARATE, 1) == ("cond",)


@pytest.mark.parametrize(
    ("timestep", "grows", "progress"),
    [(750.0, False, 0.25), (0.75, False, 0.25), (0.25, True, 0.25), (1200.0, False, 0.0), (-3.0, False, 1.0)],
)
def test_progress_without_a_number_of_steps_is_the_noise_that_is_gone(
    timestep: float, grows: bool, progress: float
) -> None:
    clock = Clock()
    assert clock.progress == 0.0
    clock.tick(timestep, SEPARATE, grows=grows)
    assert clock.progress == pytest.approx(progress)


def test_progress_of_a_known_number_of_steps_is_counted_in_steps() -> None:
    clock, schedule = Clock(), scheduler([900.0, 899.0, 898.0, 1.0])
    seen = []
    for timestep in schedule.timesteps:
        clock.tick(timestep, BATCHED, scheduler=schedule)
        seen.append(clock.progress)
    assert seen == [0.0, 0.25, 0.5, 0.75]


def test_calls_of_a_step_are_counted_and_names_of_the_pipeline_are_translated() -> None:
    clock, calls = Clock(), []
    for name in ("pred_cond", "pred_uncond", "uncond_stg", "uncond_modality", "other"):
        clock.tick(900.0, SEPARATE, scheduler=None, context=SimpleNamespace(name=name, step_index=0))
        calls.append((clock.call, clock.branches(1, SEPARATE)[0]))
    assert calls == [(0, "cond"), (1, "uncond"), (2, "perturbed"), (3, "perturbed"), (4, "cond")]


def test_another_pipeline_call_is_a_new_run_and_nothing_of_the_last_counts() -> None:
    clock, source = Clock(), SimpleNamespace(timesteps=[900.0, 500.0], step_index=1, begin_index=None)
    seen = []
    for caller in (1, 1, 2, 2, None):
        clock.tick(500.0, SEPARATE, scheduler=source if caller else None, caller=caller)
        seen.append((clock.run, clock.call, clock.total))
    assert seen == [(1, 0, 2), (1, 1, 2), (2, 0, 2), (2, 1, 2), (3, 0, None)]
    assert not clock.restarted


def test_a_first_step_that_comes_again_is_a_new_run_and_may_be_the_same() -> None:
    clock = Clock()
    for again, run, restarted in ((False, 1, False), (False, 1, False), (True, 2, True)):
        clock.tick(900.0, SEPARATE, again=again)
        assert (clock.run, clock.restarted) == (run, restarted)
    clock.tick(500.0, SEPARATE)
    assert (clock.run, clock.step, clock.restarted) == (2, 1, True)
    clock.tick(500.0, SEPARATE, again=True)  # later steps do not begin a run
    assert (clock.run, clock.step) == (2, 1)
    clock.tick(900.0, SEPARATE)
    assert (clock.run, clock.restarted) == (3, False)


def test_a_position_that_the_caller_says_is_taken_as_it_is() -> None:
    clock, seen = Clock(), []
    for step, steps, branch in ((2, 5, ()), (2, 5, ("uncond",)), (4, 5, ("uncond", "cond")), (0, 5, ()), (1, 6, ())):
        clock.place(RunPosition(step, steps, branch), 900.0)
        seen.append((clock.run, clock.step, clock.call, clock.total, clock.branches(2, SEPARATE, 2)))
    assert seen == [
        (1, 2, 0, 5, ("cond", "cond")), (1, 2, 1, 5, ("uncond", "uncond")), (1, 4, 0, 5, ("uncond", "cond")),
        (2, 0, 0, 5, ("cond", "cond")), (3, 1, 0, 6, ("cond", "cond")),
    ]  # fmt: skip
    assert clock.progress == pytest.approx(1 / 6)
    clock.tick(900.0, SEPARATE)
    assert clock.run == 4 and clock.position is None and clock.total is None


def test_a_run_whose_position_is_said_begins_again_by_its_first_step_or_after_an_end() -> None:
    clock = Clock()
    calls = ((0, False, False, 1), (0, True, False, 2), (1, True, False, 2), (1, False, True, 3))
    for step, again, ended, run in calls:
        clock.place(RunPosition(step, 3), 900.0, again=again, ended=ended)
        assert clock.run == run
