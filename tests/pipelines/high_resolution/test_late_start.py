"""A late start: which step of a schedule it is, how latents are noised for it, and that the scheduler is given back."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch

from dit_attn import DitAttnError
from dit_attn.pipelines.high_resolution.late_start import ScheduleCall, beginning_at, late_start, recorded

FLOW = {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": 3.0}
SCHEDULERS = {
    "euler": lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    "dpm-flow": lambda: diffusers.DPMSolverMultistepScheduler(**FLOW),
    "unipc-flow": lambda: diffusers.UniPCMultistepScheduler(**FLOW),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(),
    "ddim": lambda: diffusers.DDIMScheduler(clip_sample=False),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_it_is_the_first_step_at_most_as_noisy_as_asked_for(name: str) -> None:
    scheduler, call = SCHEDULERS[name](), ScheduleCall((20,))
    before = dict(vars(scheduler))
    starts = [late_start(scheduler, call, sigma) for sigma in (1.0, 0.8, 0.5)]
    assert [start.first for start in starts] == sorted({start.first for start in starts}) and starts[0].first == 0
    for start, sigma in zip(starts, (1.0, 0.8, 0.5)):
        assert start.level <= sigma + 1e-6 and start.first + start.steps == 20
    assert {key: id(value) for key, value in vars(scheduler).items()} == {key: id(x) for key, x in before.items()}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_latents_are_noised_as_the_scheduler_does_it(name: str) -> None:
    scheduler, call = SCHEDULERS[name](), ScheduleCall((20,))
    start = late_start(scheduler, call, 0.6)
    scheduler.set_timesteps(20)
    clean, noise = torch.randn(2, 1, 3, 4, 4, dtype=torch.float64)
    step = scheduler.timesteps[start.first : start.first + 1]
    if name == "euler":
        expected = scheduler.scale_noise(clean, step, noise)
    else:
        expected = scheduler.add_noise(clean, noise, step)
    torch.testing.assert_close(start.noised(clean, noise), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_what_is_left_of_the_schedule_removes_the_noise_of_a_perfect_model(name: str) -> None:
    scheduler, call = SCHEDULERS[name](), ScheduleCall((20,))
    start = late_start(scheduler, call, 0.6)
    clean, noise = torch.randn(2, 1, 3, 4, 4)
    x = start.noised(clean, noise)
    with beginning_at(scheduler, call, start):
        scheduler.set_timesteps(7)  # the pipeline may ask for anything
        assert len(scheduler.timesteps) == start.steps
        for step in scheduler.timesteps:
            if name in ("dpm", "ddim"):
                kept = scheduler.alphas_cumprod[int(step)]
                predicted = (x - kept.sqrt() * clean) / (1 - kept).sqrt()
            else:
                predicted = noise - clean
            x = scheduler.step(predicted, step, x).prev_sample
    torch.testing.assert_close(x, clean, atol=0.06, rtol=0.05)


def test_the_scheduler_is_given_back_after_an_exception_too() -> None:
    scheduler = SCHEDULERS["euler"]()
    stock = scheduler.set_timesteps
    start = late_start(scheduler, ScheduleCall((20,)), 0.5)
    with pytest.raises(RuntimeError), beginning_at(scheduler, ScheduleCall((20,)), start):
        raise RuntimeError
    assert scheduler.set_timesteps == stock and "set_timesteps" not in vars(scheduler)
    scheduler.set_timesteps(20)
    assert len(scheduler.timesteps) == 20


def test_the_arguments_that_a_pipeline_sets_the_steps_with_are_noted() -> None:
    scheduler = SCHEDULERS["euler"]()
    with recorded(scheduler) as call:
        scheduler.set_timesteps(8, device="cpu")
    assert (call.args, call.kwargs) == ((8,), {"device": "cpu"}) and len(scheduler.timesteps) == 8


@pytest.mark.parametrize(
    "scheduler, sigma, message",
    [
        (SCHEDULERS["euler"], 0.001, "sigma 0.001 leaves no step: the lowest of 20 noise levels is"),
        (diffusers.FlowMatchHeunDiscreteScheduler, 0.5, "FlowMatchHeunDiscreteScheduler cannot start late"),
        (diffusers.EulerDiscreteScheduler, 0.5, "EulerDiscreteScheduler cannot start late"),
    ],
)
def test_a_schedule_that_cannot_start_late_is_refused(scheduler: Any, sigma: float, message: str) -> None:
    with pytest.raises(DitAttnError, match=message):
        late_start(scheduler(), ScheduleCall((20,)), sigma)
