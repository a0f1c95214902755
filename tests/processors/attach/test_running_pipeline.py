"""The pipeline that runs a transformer decides steps, scale and scheduler, whatever was given to ``enable``."""

from __future__ import annotations

import copy
import gc
import time
from typing import Any

import diffusers
import pytest
import torch

import dit_attn
from dit_attn import models
from dit_attn.processors.attach import attach
from dit_attn.processors.attach.pipeline_call import find_running
from tests._support.compose import pipeline_run, same, tiny_pipeline
from tests._support.pipeline_runs import real, run
from tests.families.test_qwen_image import TestQwenImage as QwenImageCase

PROMPT = "a large red circle at the left on white"
SPARSE = dit_attn.BlockSparse(density=0.25, dense_steps=0.25, q_block=32, kv_block=32)


def load(name: str) -> tuple[Any, dict[str, Any]]:
    """An embedded pipeline, and arguments of a call of four steps at half of its size."""
    pipe = models.load(name)
    pipe.set_progress_bar_config(disable=True)
    call = {**models.call_defaults(name), "num_inference_steps": 4, "output_type": "latent", "prompt": PROMPT}
    call |= {"height": 64, "width": 64}
    return pipe, call


def request_of(pipe: Any) -> Any:
    """A copy of a pipeline around the same components, with a scheduler of its own."""
    request = copy.copy(pipe)
    request.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    return request


def made(pipe: Any, call: dict[str, Any], **more: Any) -> torch.Tensor:
    """Latents of a run."""
    return pipe(**{**call, **more}, generator=torch.Generator().manual_seed(0))[0]


@pytest.mark.parametrize("fresh", [True, False], ids=["first use", "after a run of its own"])
def test_a_copy_for_every_request_counts_its_own_steps(fresh: bool) -> None:
    pipe, call = load("tiny-image")
    dit_attn.enable(pipe, SPARSE)
    expected = made(pipe, call)
    calls = dit_attn.summary(pipe).sparse_calls
    if fresh:
        pipe, call = load("tiny-image")
        dit_attn.enable(pipe, SPARSE)
    for number in range(1, 3):
        request = request_of(pipe)
        assert same(made(request, call), expected)
        del request
        gc.collect()
        found = dit_attn.summary(pipe)
        assert (found.sparse_calls, found.steps, found.runs) == (calls, 4, number + (not fresh))
        assert found.source == "pipeline call" and found.warnings == ()


@pytest.mark.parametrize("way", ["shift", "cond", "step", "auto"])
def test_guidance_reaches_the_scheduler_of_the_pipeline_that_runs(way: str) -> None:
    pipe, kwargs = real(QwenImageCase)
    stock = run(pipe, kwargs)
    dit_attn.enable(pipe, dit_attn.SoftPAG(heads="1", scale=3.0, inject=way))
    expected = run(pipe, kwargs)
    assert not same(expected, stock)
    request = request_of(pipe)
    assert same(run(request, kwargs), expected)
    assert "step" not in vars(pipe.scheduler) and "step" not in vars(request.scheduler)


def test_a_pipeline_of_another_task_counts_its_own_steps_and_scale() -> None:
    pipe, call = load("tiny-joint")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    other = diffusers.StableDiffusion3Img2ImgPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(5))
    arguments = {**call, "num_inference_steps": 8, "image": image, "strength": 0.75, "guidance_scale": 4.0}
    for method in (SPARSE, dit_attn.SLG(layers="3", scale=2.0, start=0.0, stop=0.34, inject="cond")):
        dit_attn.enable(other, method)
        expected = made(other, arguments)
        steps = dit_attn.summary(other).steps
        dit_attn.enable(pipe, method)
        made(pipe, call, guidance_scale=1.5)
        assert same(made(other, arguments), expected)
        assert dit_attn.summary(pipe).steps == steps == 6


def test_two_pipelines_in_turns_are_runs_of_their_own() -> None:
    pipe, kwargs = tiny_pipeline("wan")
    method = dit_attn.ReTtention(density=0.25, dense_steps=1, period=3, q_block=32, kv_block=32)
    session = dit_attn.enable(pipe, method)
    expected = [pipeline_run(pipe, kwargs, steps) for steps in (3, 4)]
    request = request_of(pipe)
    for number, (running, steps) in enumerate(((request, 4), (pipe, 3), (request, 3), (pipe, 4)), 3):
        assert same(pipeline_run(running, kwargs, steps), expected[steps - 3])
        assert (session.clock.run, session.clock.total) == (number, steps)


def test_a_run_inside_the_callback_of_another_one_is_a_run_of_its_own() -> None:
    pipe, call = load("tiny-joint")
    dit_attn.enable(pipe, SPARSE)
    plain = made(pipe, call)
    request = request_of(pipe)
    inner = []

    def callback(running: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        if step == 1:
            inner.append(made(request, call, guidance_scale=1.0))
        return {}

    outer = made(pipe, call, callback_on_step_end=callback)
    assert same(outer, plain) and same(inner[0], made(request, call, guidance_scale=1.0))


def test_a_method_on_the_transformer_alone_knows_the_run() -> None:
    pipe, kwargs = real(QwenImageCase)
    pipe.scheduler = type(pipe.scheduler)(shift=12.0)  # most steps remove little noise
    method = dit_attn.BlockSparse(density=0.5, dense_steps=0.25, q_block=16, kv_block=16)
    counts = []
    for target in (pipe, pipe.transformer):
        dit_attn.enable(target, method)
        run(pipe, kwargs, steps=8)
        counts.append(dit_attn.summary(target).fallbacks)
    assert counts[0] == counts[1]


def test_a_pipeline_that_took_over_the_components_of_one_that_is_gone_is_found() -> None:
    pipe, call = load("tiny-image")
    dit_attn.enable(pipe, SPARSE)
    expected = made(pipe, call)
    heir = type(pipe)(**pipe.components)
    heir.set_progress_bar_config(disable=True)
    del pipe
    gc.collect()
    assert same(made(heir, call), expected)


def test_the_call_of_this_diffusers_is_found_on_the_stack() -> None:
    """What the search relies on: ``__call__`` of the class, its own frame, ``self`` as its first argument."""
    pipe, call = load("tiny-image")
    seen = []
    handle = pipe.transformer.register_forward_pre_hook(lambda model, _: seen.append(find_running(model)))
    for _ in range(2):
        made(pipe, call)
    handle.remove()
    assert all(found is pipe and number for found, number in seen)
    assert len({number for _, number in seen[: len(seen) // 2]}) == 1  # one call, one number
    assert find_running(pipe.transformer) == (None, 0)


def test_finding_the_pipeline_costs_next_to_nothing() -> None:
    pipe, call = load("tiny-image")
    costs, began = [], time.perf_counter()

    def measure(model: torch.nn.Module, _: Any) -> None:
        start = time.perf_counter()
        find_running(model)
        costs.append(time.perf_counter() - start)

    handle = pipe.transformer.register_forward_pre_hook(measure)
    made(pipe, call)
    handle.remove()
    assert sorted(costs)[len(costs) // 2] * len(costs) < 0.01 * (time.perf_counter() - began)


def test_nothing_of_a_running_pipeline_is_kept_alive() -> None:
    pipe, call = load("tiny-image")
    dit_attn.enable(pipe.transformer, SPARSE)
    request = request_of(pipe)
    made(request, call)
    session = attach.session_of(pipe.transformer)
    assert session is not None and session.pipe is request
    del request
    gc.collect()
    assert session.pipe is None
