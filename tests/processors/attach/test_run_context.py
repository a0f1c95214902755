"""A loop says what its transformer calls are: bit-equal to the pipeline, a state for every window, nothing guessed."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import models
from dit_attn.processors.attach import attach
from dit_attn.processors.attach.run_context import declared_position
from dit_attn.processors.core.clock import RunPosition
from tests._support.compose import forward, tiny

STEPS, SCALE = 4, 3.0
BLOCKS = {"q_block": 36, "kv_block": 36}
SPARSE = dit_attn.BlockSparse(density=0.25, dense_steps=0.25, **BLOCKS)
STATEFUL = dit_attn.ReTtention(density=0.25, dense_steps=1, period=3, **BLOCKS)
GUIDED = dit_attn.SoftPAG(heads="2", scale=2.0, interval=2)
METHODS = {"block-sparse": SPARSE, "re-ttention": STATEFUL, "softpag": GUIDED}


@pytest.fixture(scope="module")
def video() -> Any:
    """The embedded video pipeline, and the embeddings of the two branches."""
    pipe = models.load("tiny-video")
    pipe.set_progress_bar_config(disable=True)
    texts = ("a large purple circle moving left fast on black", "")
    encoded = [pipe.encode_prompt(t, do_classifier_free_guidance=False, max_sequence_length=16)[0] for t in texts]
    yield pipe, dict(zip(("cond", "uncond"), encoded))
    dit_attn.disable(pipe)


def noise(frames: int) -> torch.Tensor:
    """Latents of 12 x 12 places."""
    return torch.randn(1, 16, frames, 12, 12, generator=torch.Generator().manual_seed(0))


def denoised(
    pipe: Any,
    prompts: dict[str, torch.Tensor],
    context: Callable[..., Any],
    windows: tuple[int, ...] = (0,),
    frames: int = 9,
    order: Callable[[list[Any]], list[Any]] = list,
    steps: int = STEPS,
) -> torch.Tensor:
    """A loop over windows of nine frames; ``context(step=, steps=, branch=, window=)`` is around every call."""
    transformer, scheduler = pipe.transformer, copy.deepcopy(pipe.scheduler)
    latents = noise(frames)[:, : transformer.config.in_channels]
    scheduler.set_timesteps(steps)
    for step, t in enumerate(scheduler.timesteps):
        predicted = {}
        for start, branch in order([(start, branch) for start in windows for branch in prompts]):
            number = windows.index(start)
            with torch.no_grad(), context(step=step, steps=steps, branch=branch, window=number) as model:
                predicted[start, branch] = (transformer if model is None else model)(
                    latents[:, :, start : start + 9],
                    timestep=t.expand(1), encoder_hidden_states=prompts[branch], return_dict=False,
                )[0]  # fmt: skip
        total, count = torch.zeros_like(latents), torch.zeros(1, 1, frames, 1, 1)
        for start in windows:
            cond, uncond = predicted[start, "cond"], predicted[start, "uncond"]
            total[:, :, start : start + 9] += uncond + SCALE * (cond - uncond)
            count[:, :, start : start + 9] += 1
        latents = scheduler.step(total / count, t, latents, return_dict=False)[0]
    return latents


def said(pipe: Any) -> Callable[..., Any]:
    """A context that says everything."""
    return lambda **position: dit_attn.run_context(pipe.transformer, **position)


def unsaid(**position: Any) -> Any:
    """A context that says nothing."""
    return nullcontext()


@pytest.mark.parametrize("name", METHODS)
def test_a_loop_gives_the_bits_of_the_pipeline(video: Any, name: str) -> None:
    pipe, prompts = video
    dit_attn.enable(pipe, METHODS[name])
    expected = pipe(
        prompt_embeds=prompts["cond"], negative_prompt_embeds=prompts["uncond"], guidance_scale=SCALE,
        latents=noise(9)[:, : pipe.transformer.config.in_channels], num_frames=pipe_frames(pipe), height=48, width=48,
        num_inference_steps=STEPS, output_type="latent",
    ).frames  # fmt: skip
    stock = dit_attn.summary(pipe)
    dit_attn.enable(pipe.transformer, METHODS[name])
    assert torch.equal(denoised(pipe, prompts, said(pipe)), expected)
    found = dit_attn.summary(pipe)
    assert (found.runs, found.steps, found.calls) == (1, STEPS, stock.calls)
    assert (found.fallbacks, found.guidance) == (stock.fallbacks, stock.guidance)
    assert (found.source, found.warnings) == ("run_context", ())


def pipe_frames(pipe: Any) -> int:
    """Frames of nine latent ones."""
    return 8 * pipe.vae_scale_factor_temporal + 1


def branch_by_branch(calls: list[Any]) -> list[Any]:
    """All windows of a branch, then those of the next."""
    return sorted(calls, key=lambda call: call[1])


@pytest.mark.parametrize("order", [list, branch_by_branch], ids=["by window", "by branch"])
@pytest.mark.parametrize("name", METHODS)
def test_windows_have_the_bits_of_a_session_for_each(video: Any, name: str, order: Any) -> None:
    pipe, prompts = video
    dit_attn.disable(pipe)
    dense = denoised(pipe, prompts, unsaid, (0, 5), 14)
    copies = [copy.deepcopy(pipe.transformer) for _ in range(2)]
    for model in copies:
        dit_attn.enable(model, METHODS[name])

    def own(window: int, **position: Any) -> Any:
        return _Entered(copies[window], **position)

    expected = denoised(pipe, prompts, own, (0, 5), 14, order)
    dit_attn.enable(pipe.transformer, METHODS[name])
    found = denoised(pipe, prompts, said(pipe), (0, 5), 14, order)
    assert torch.equal(found, expected) and not torch.equal(found, dense)
    summary, single = dit_attn.summary(pipe), dit_attn.summary(copies[0])
    assert (summary.runs, summary.warnings) == (1, ())
    assert (summary.calls, summary.sparse_calls) == (2 * single.calls, 2 * single.sparse_calls)
    if summary.guidance is not None and single.guidance is not None:
        assert summary.guidance.evaluations == 2 * single.guidance.evaluations


class _Entered:
    """A context of one model that hands the model to the loop."""

    def __init__(self, model: torch.nn.Module, **position: Any) -> None:
        self.model, self.context = model, dit_attn.run_context(model, **position)

    def __enter__(self) -> torch.nn.Module:
        self.context.__enter__()
        return self.model

    def __exit__(self, *error: Any) -> Any:
        return self.context.__exit__(*error)


@pytest.mark.parametrize("name", METHODS)
def test_windows_that_nobody_names_are_never_silently_wrong(video: Any, name: str) -> None:
    pipe, prompts = video
    dit_attn.disable(pipe)
    dense = denoised(pipe, prompts, unsaid, (0, 5), 14)
    dit_attn.enable(pipe.transformer, METHODS[name])
    found = denoised(pipe, prompts, unsaid, (0, 5), 14)
    summary = dit_attn.summary(pipe)
    assert summary.source == "time steps"
    assert any("window=" in text for text in summary.warnings)
    if name == "re-ttention":  # nothing was stored: stock attention, or a refresh, which is dense
        torch.testing.assert_close(found, dense, rtol=1e-4, atol=1e-4)
        assert summary.fallbacks["the first step came again before the second"] == summary.calls - 2 * 6


def test_a_window_that_is_not_named_inside_the_context_is_noticed(video: Any) -> None:
    pipe, prompts = video
    dit_attn.enable(pipe.transformer, STATEFUL)

    def without_window(window: int, **position: Any) -> Any:
        return dit_attn.run_context(pipe.transformer, **position)

    denoised(pipe, prompts, without_window, (0, 5), 14)
    assert any("window=" in text for text in dit_attn.summary(pipe).warnings)


# -- what the positions mean ------------------------------------------------------------------------------------------


def test_runs_begin_where_steps_begin_again() -> None:
    model, args = tiny("wan")
    session = dit_attn.enable(model, dit_attn.BlockSparse(density=0.5, q_block=32, kv_block=32, dense_steps=0))

    def call(step: int, steps: int = 3, **more: Any) -> tuple[int, int, int | None]:
        with dit_attn.run_context(model, step=step, steps=steps, **more):
            forward(model, args)
        return session.clock.run, session.clock.step, session.clock.total

    assert [call(0), call(1), call(2), call(0)] == [(1, 0, 3), (1, 1, 3), (1, 2, 3), (2, 0, 3)]
    assert call(1, 4) == (3, 1, 4)  # of another length
    assert call(0, 1) == (4, 0, 1) and call(0, 1) == (5, 0, 1)  # a model of one step
    assert call(0, 1, branch="uncond") == (5, 0, 1) and call(0, 1, window=2) == (5, 0, 1)
    forward(model, args)
    assert session.clock.run == 6 and session.source == "time steps"


def test_a_run_that_an_exception_ended_leaves_no_doubt_about_the_next() -> None:
    model, args = tiny("wan")
    session = dit_attn.enable(model, dit_attn.ReTtention(density=0.5, dense_steps=0, q_block=32, kv_block=32))
    with pytest.raises(InterruptedError), dit_attn.run_context(model, step=0, steps=3):
        forward(model, args)
        raise InterruptedError
    assert declared_position(model) is None
    for step in range(3):
        with dit_attn.run_context(model, step=step, steps=3):
            forward(model, args)
    assert (session.clock.run, session.clock.step, session.doubt) == (2, 2, None)


def test_a_call_that_comes_again_with_other_latents_is_noticed() -> None:
    model, args = tiny("wan")
    session = dit_attn.enable(model, dit_attn.ReTtention(density=0.5, dense_steps=0, q_block=32, kv_block=32))
    for step, factor in ((0, 1.0), (1, 1.0), (1, 1.0), (1, 2.0)):  # the very same call may be made again
        assert session.doubt is None
        with dit_attn.run_context(model, step=step, steps=3):
            forward(model, args, hidden_states=factor * args["hidden_states"])
    assert session.clock.run == 1 and session.doubt == "the branch cond came again in step 1"


@pytest.mark.parametrize(
    ("name", "branch", "rows"),
    [
        ("wan", None, ("cond", "cond")),
        ("wan", "uncond", ("uncond", "uncond")),
        ("wan", ("uncond", "cond"), ("uncond", "cond")),  # stacked on a family that runs them in turns
        ("pixart", "cond", ("cond", "cond")),  # and in turns on a family that stacks them
        ("pixart", ["cond", "perturbed"], ("cond", "perturbed")),
    ],
)
def test_the_rows_of_a_batch_are_of_the_branches_that_are_named(name: str, branch: Any, rows: tuple[str, ...]) -> None:
    model, args = tiny(name)
    session = dit_attn.enable(model)
    with dit_attn.run_context(model, step=0, steps=2, branch=branch):
        forward(model, args)
        assert session.rows_by_branch() == rows


def test_a_branch_may_come_from_the_cache_context() -> None:
    model, args = tiny("wan")
    session: Any = dit_attn.enable(model)
    with dit_attn.run_context(model, step=0, steps=2), model.cache_context("uncond"):
        forward(model, args)
        assert session.rows_by_branch() == ("uncond", "uncond")
    with dit_attn.run_context(model, branch="cond", step=0, steps=2), model.cache_context("uncond"):
        forward(model, args)
        assert session.rows_by_branch() == ("cond", "cond")


def test_stacked_branches_are_guided_as_in_turns() -> None:
    model, args = tiny("wan")
    args = {name: value[:1] for name, value in args.items()}
    other = {**args, "encoder_hidden_states": -args["encoder_hidden_states"]}
    dit_attn.enable(model, dit_attn.SoftPAG(heads="1:0", scale=2.0))
    single = []
    for branch, given in (("cond", args), ("uncond", other)):
        with dit_attn.run_context(model, step=0, steps=2, branch=branch):
            single.append(forward(model, given))
    both = {name: torch.cat([other[name], args[name]]) for name in args}
    with dit_attn.run_context(model, step=1, steps=2, branch=("uncond", "cond")):
        uncond, cond = forward(model, both).chunk(2)
    torch.testing.assert_close(cond, single[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(uncond, single[1], rtol=1e-4, atol=1e-5)


def test_both_experts_of_a_pipeline_are_told_at_once() -> None:
    pipe = models.load("tiny-video")
    pipe.transformer_2 = copy.deepcopy(pipe.transformer)
    dit_attn.enable(pipe, SPARSE)
    experts = [pipe.transformer, pipe.transformer_2]
    with dit_attn.run_context(pipe, step=3, steps=8, window=(1, 2)):
        assert {declared_position(model) for model in experts} == {RunPosition(3, 8, (), (1, 2))}
        with dit_attn.run_context(pipe.transformer_2, step=4, branch="uncond"):
            assert declared_position(pipe.transformer) == RunPosition(3, 8, (), (1, 2))
            assert declared_position(pipe.transformer_2) == RunPosition(4, 8, ("uncond",), (1, 2))
    assert [declared_position(model) for model in experts] == [None, None]


def test_a_method_that_is_enabled_inside_knows_the_position_and_without_one_nothing_happens() -> None:
    model, args = tiny("wan")
    stock = forward(model, args)
    with dit_attn.run_context(model, step=1, steps=2):
        assert torch.equal(forward(model, args), stock)
        session = dit_attn.enable(model, dit_attn.BlockSparse(density=0.5, q_block=32, kv_block=32, dense_steps=0))
        forward(model, args)
    assert (session.clock.step, session.clock.total, session.source) == (1, 2, "run_context")


# -- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "step is missing"),
        ({"step": 1}, "steps is missing"),
        ({"step": -1, "steps": 4}, "step must be a whole number of at least 0, got -1"),
        ({"step": True, "steps": 4}, "step must be a whole number of at least 0, got True"),
        ({"step": 0.5, "steps": 4}, "step must be a whole number"),
        ({"step": 0, "steps": 0}, "steps must be a whole number of at least 1, got 0"),
        ({"step": 4, "steps": 4}, "step must be under steps"),
        ({"step": 0, "steps": "x" * 500}, "steps must be a whole number"),
        ({"step": 0, "steps": 4, "branch": "condd"}, "Did you mean 'cond'"),
        ({"step": 0, "steps": 4, "branch": ()}, "branch must be a name"),
        ({"step": 0, "steps": 4, "branch": 3}, "branch must be a name"),
        ({"step": 0, "steps": 4, "branch": "image"}, "unknown branch 'image'"),
        ({"step": 0, "steps": 4, "window": -1}, "window must be an index"),
        ({"step": 0, "steps": 4, "window": ()}, "window must be an index"),
        ({"step": 0, "steps": 4, "window": "left"}, "window must be an index"),
    ],
)
def test_a_field_out_of_range_costs_one_short_line(given: dict[str, Any], message: str) -> None:
    model, _ = tiny("wan")
    with pytest.raises(dit_attn.DitAttnError, match=message) as found, dit_attn.run_context(model, **given):
        pass
    assert "\n" not in str(found.value) and len(str(found.value)) < 200
    assert declared_position(model) is None


def test_whole_numbers_of_other_libraries_count() -> None:
    model, _ = tiny("wan")
    with dit_attn.run_context(model, step=torch.tensor(2), steps=torch.tensor(4), window=torch.tensor(1)):  # type: ignore[arg-type]
        assert declared_position(model) == RunPosition(2, 4, (), (1,))


def test_a_batch_that_does_not_divide_into_the_branches_is_refused() -> None:
    model, args = tiny("wan")
    dit_attn.enable(model)
    args = {name: torch.cat([value, value[:1]]) for name, value in args.items()}
    refused = pytest.raises(dit_attn.DitAttnError, match="a batch of 3 does not divide into the branches uncond, cond")
    with refused, dit_attn.run_context(model, step=0, steps=2, branch=("uncond", "cond")):
        forward(model, args)


def test_two_threads_on_one_transformer_are_refused() -> None:
    model, args = tiny("wan")
    dit_attn.enable(model)
    errors: list[str] = []

    def call(enter: bool) -> None:
        try:
            with dit_attn.run_context(model, step=0, steps=2) if enter else nullcontext():
                forward(model, args)
        except dit_attn.DitAttnError as error:
            errors.append(str(error))

    with dit_attn.run_context(model, step=0, steps=2):
        for enter in (True, False):
            thread = threading.Thread(target=call, args=(enter,))
            thread.start()
            thread.join()
    assert len(errors) == 2 and all("another thread is inside a run_context" in error for error in errors)
    call(True)
    assert len(errors) == 2


def test_a_copy_of_the_transformer_is_not_told() -> None:
    model, _ = tiny("wan")
    dit_attn.enable(model)
    with dit_attn.run_context(model, step=0, steps=2):
        clone = copy.deepcopy(model)
        assert declared_position(clone) is None
    assert attach.session_of(clone) is not None
