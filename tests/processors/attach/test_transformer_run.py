"""What the forward arguments of a transformer and the running pipeline say of a run."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit_attn.processors.attach.families import Family
from dit_attn.processors.attach.pipeline_call import PipelineCall
from dit_attn.processors.attach.transformer_run import TransformerRun
from dit_attn.processors.core.cfg import BATCHED, SEPARATE, CFGRule
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.tokens import TokenLayout, visual_span
from dit_attn.processors.guidance.perturbation import Perturbation

THREE = CFGRule("batched", ("cond", "uncond"), longer=("cond", "uncond", "image"))


def layout(config: Any, values: dict[str, Any]) -> TokenLayout:
    """(B, H, W) latents are the image."""
    return TokenLayout((visual_span("image", (1, *values["hidden_states"].shape[1:])),))


def family(rule: CFGRule, **more: Any) -> Family:
    """A row for a model that does not exist."""
    return Family("made-up", "", (), (), (), layout, cfg=rule, **more)


class Pipe:
    """A pipeline that shows its transformer's calls to a run."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)
        self.run: Any = None

    def __call__(
        self, calls: list[dict[str, Any]], prompt: Any = None, guidance_scale: float = 3.0, read: Any = None
    ) -> list[Any]:
        seen = []
        for values in calls:
            self.run.on_forward(values)
            seen.append(self.run.rows_by_branch() if read is None else read())
        return seen


def made(rule: CFGRule = SEPARATE, pipe: Any = None, **more: Any) -> tuple[TransformerRun, torch.nn.Module]:
    """A run, and its transformer, which it does not keep alive."""
    model = torch.nn.Module()
    model.config = SimpleNamespace()
    run = TransformerRun(model, family(rule, **more), [], Clock(), pipe)
    run.add_layer("blocks.0")
    if pipe is not None:
        pipe.run, pipe.transformer = run, model
    return run, model


def values(timestep: float, latents: Any = None, **more: Any) -> dict[str, Any]:
    """Arguments of a forward call; every row has noise of its own."""
    latents = torch.randn(2, 4, 5) if latents is None else latents
    return {"timestep": torch.tensor([timestep, timestep / 2]), "hidden_states": latents, **more}


def repeated(times: int, samples: int = 1) -> torch.Tensor:
    """Latents of some samples, once for every branch."""
    return torch.randn(samples, 4, 5).repeat(times, 1, 1)


# -- the clock, the layout and the statistics -------------------------------------------------------------------------


def test_the_largest_timestep_and_the_context_set_the_clock() -> None:
    run, _model = made()
    run.on_forward(values(900.0))
    assert run.clock.timestep == 900.0 and run.clock.run == 1 and run.ran
    run.context = SimpleNamespace(name="uncond", step_index=0, num_inference_steps=4)
    run.on_forward(values(900.0))
    assert (run.clock.total, run.rows_by_branch()) == (4, ("uncond", "uncond"))
    run.on_forward({**values(0.0), "timestep": 3})
    run.on_forward({**values(0.0), "timestep": None})
    assert run.clock.timestep == 0.0


def test_the_layout_of_every_call_is_taken_or_the_reason_is_recorded() -> None:
    run, _model = made()
    run.on_forward(values(900.0))
    tokens = run.tokens(20)
    assert tokens is not None and tokens.grid == (1, 4, 5)
    run.on_forward({"timestep": 500.0, "x": torch.zeros(3, 1)})
    assert run.layout is None and run.layout_error == "layout of made-up: KeyError: 'hidden_states'"
    run.on_forward(values(400.0, torch.randn(2, 3, 3)))
    assert run.layout_error is None and run.tokens(9) is not None


def test_a_new_run_empties_the_layers_and_a_later_step_does_not() -> None:
    run, _model = made()
    run.on_forward(values(900.0))
    layer = run.layers[0]
    layer.stats.calls, layer.state["probe"] = 5, 1
    run.on_forward(values(500.0))
    assert layer.stats.calls == 5 and layer.state
    run.on_forward(values(900.0))
    assert (run.clock.run, layer.stats.calls, layer.state) == (2, 0, {})
    layer.disabled, layer.stats.calls = "kernel failed", 4
    run.reset()
    assert (run.clock, layer.disabled, layer.stats.calls) == (Clock(), None, 0) and not run.clock.run


def test_a_transformer_that_was_not_called_in_the_run_did_not_run() -> None:
    first, _one = made()
    other = torch.nn.Module()
    second = TransformerRun(other, family(SEPARATE), [], first.clock)
    assert first.ran and second.ran  # nothing did: both agree with the clock
    first.on_forward(values(900.0))
    assert first.ran and not second.ran


def test_a_perturbed_pass_does_not_advance_the_clock_but_appended_rows_do() -> None:
    run, _model = made()
    latents = torch.randn(2, 4, 5)
    run.on_forward(values(900.0, latents))
    with run.perturbing(Perturbation({}), 1):
        run.on_forward(values(900.0, latents))
        assert run.clock.call == 0 and run.rows_by_branch() == ("perturbed",)
    run.append_perturbed(Perturbation({}), 1)
    run.on_forward(values(900.0, latents))  # the pass failed and the next call begins
    assert run.perturbed is None and run.rows_by_branch() == ("uncond", "uncond")


def test_a_pass_of_the_pipeline_s_own_guidance_is_perturbed_as_a_whole() -> None:
    run, _model = made(replace(BATCHED, own="skip_layers"))
    run.on_forward(values(900.0, skip_layers=[1]))
    assert run.rows_by_branch() == ("perturbed",) * 2 and run.seen_branches == {"perturbed"}
    run.on_forward(values(900.0, skip_layers=None))
    assert run.rows_by_branch() == ("cond",) * 2


# -- branches ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "latents", "branches"),
    [
        (BATCHED, repeated(2), ("uncond", "cond")),
        (BATCHED, repeated(2, samples=2), ("uncond", "uncond", "cond", "cond")),
        (BATCHED, torch.randn(2, 4, 5), ("cond", "cond")),
        (BATCHED, torch.randn(3, 4, 5), ("cond",) * 3),
        (THREE, repeated(3), ("cond", "uncond", "image")),
        (THREE, repeated(2), ("cond", "uncond")),
        (BATCHED, [torch.randn(4, 5)] * 2, ("cond", "cond")),
        (BATCHED, None, ("cond",)),
    ],
    ids=["two", "two of two samples", "other noise", "odd", "three", "two of three", "a list", "nothing"],
)
def test_without_a_pipeline_the_batch_tells_how_many_branches_it_stacks(
    rule: CFGRule, latents: Any, branches: tuple[str, ...]
) -> None:
    run, _model = made(rule)
    run.on_forward({"timestep": 900.0, "hidden_states": latents})
    assert run.rows_by_branch() == branches and run.seen_branches == set(branches)


@pytest.mark.parametrize(
    ("pipe", "given", "branches"),
    [
        (Pipe(do_classifier_free_guidance=False), {}, ("cond", "cond")),
        (Pipe(do_classifier_free_guidance=True), {}, ("uncond", "cond")),
        (Pipe(), {"guidance_scale": 1.0}, ("cond", "cond")),
        (Pipe(), {"guidance_scale": 3.0}, ("uncond", "cond")),
    ],
    ids=["off by the pipeline", "on by the pipeline", "off by the call", "on by the call"],
)
def test_a_running_pipeline_says_whether_equal_latents_are_branches(
    pipe: Pipe, given: dict[str, Any], branches: tuple[str, ...]
) -> None:
    _run, _model = made(BATCHED, pipe)
    assert pipe([values(900.0, repeated(2))], **given) == [branches]


def test_samples_of_the_same_noise_are_no_branches_where_the_prompts_say_so() -> None:
    pipe = Pipe()
    _run, _model = made(THREE, pipe)
    assert pipe([values(900.0, repeated(3))], prompt=["a"] * 3) == [("cond",) * 3]
    assert pipe([values(900.0, repeated(3))], prompt="a") == [("cond", "uncond", "image")]


def test_guidance_that_is_truncated_leaves_a_batch_of_the_samples() -> None:
    pipe = Pipe(do_classifier_free_guidance=True)
    _run, _model = made(BATCHED, pipe)
    calls = [values(900.0, repeated(2, 2)), values(500.0, torch.randn(2, 4, 5))]
    assert pipe(calls) == [("uncond", "uncond", "cond", "cond"), ("cond", "cond")]


def test_separate_calls_are_all_conditional_where_the_pipeline_does_not_guide() -> None:
    pipe = Pipe(do_classifier_free_guidance=False, scheduler=SimpleNamespace(timesteps=[900.0, 500.0], step_index=None))
    run, _model = made(SEPARATE, pipe)
    assert pipe([values(900.0), values(900.0)]) == [("cond",) * 2] * 2
    assert pipe([values(900.0)], read=lambda: run.branch_count(2)) == [1] and run.pipeline_call.running
    pipe.do_classifier_free_guidance = True
    assert pipe([values(900.0)], read=lambda: run.branch_count(2)) == [2]


# -- the scale --------------------------------------------------------------------------------------------------------


def scale_of(pipe: Pipe) -> float | None:
    """The scale that a call finds; a report finds it after the call too."""
    (found,) = pipe([values(900.0)], read=pipe.run.guidance_scale)
    assert pipe.run.scale == found
    return found


def test_the_scale_is_the_running_pipeline_s_attribute_with_the_rule_of_its_family() -> None:
    pipe = Pipe(_guidance_scale=4.0)
    run, _model = made(replace(SEPARATE, scale_offset=1.0, off=0.0), pipe)
    assert run.guidance_scale() is None  # it does not run
    assert scale_of(pipe) == 5.0
    pipe._guidance_scale = 0.0
    assert scale_of(pipe) == 1.0
    pipe._guidance_scale = None
    assert scale_of(pipe) is None


def test_the_second_transformer_has_a_scale_of_its_own() -> None:
    pipe = Pipe(_guidance_scale=4.0, _guidance_scale_2=2.0)
    _run, model = made(SEPARATE, pipe)
    assert scale_of(pipe) == 4.0
    pipe.transformer, pipe.transformer_2 = None, model
    assert scale_of(pipe) == 2.0


def test_a_scale_that_no_attribute_stores_is_that_of_the_call() -> None:
    run, _model = made(replace(SEPARATE, scale="", argument="true_cfg_scale"), Pipe(_guidance_scale=4.0))
    assert run.guidance_scale() is None
    run.pipeline_call = PipelineCall(running=True, scale=2.5)
    assert run.guidance_scale() == 2.5


# -- what the calls of a step tell ------------------------------------------------------------------------------------


def calls_of(run: TransformerRun, *calls: tuple[Any, ...]) -> list[tuple[int, int, str]]:
    """Run, step and branch of calls (timestep, latents, name of the cache context or none)."""
    seen = []
    for timestep, latents, *name in calls:
        run.context = SimpleNamespace(name=name[0]) if name else None
        run.on_forward(values(timestep, latents))
        seen.append((run.clock.run, run.clock.step, run.rows_by_branch()[0]))
    return seen


X, Y = torch.randn(1, 4, 5), torch.randn(1, 4, 5)


def test_branches_of_a_step_share_their_latents() -> None:
    run, _model = made()
    seen = calls_of(run, (900.0, X), (900.0, X.clone()), (500.0, Y), (500.0, Y))
    assert seen == [(1, 0, "cond"), (1, 0, "uncond"), (1, 1, "cond"), (1, 1, "uncond")]
    assert (run.doubt, run.branch_doubt, run.source) == (None, None, "time steps")


@pytest.mark.parametrize("name", [(), ("cond",)], ids=["unnamed", "named"])
def test_a_model_of_one_step_begins_a_new_run_with_every_sample(name: tuple[str, ...]) -> None:
    run, _model = made()
    assert calls_of(run, (900.0, X, *name), (900.0, Y, *name)) == [(1, 0, "cond"), (2, 0, "cond")]
    assert run.doubt is None


@pytest.mark.parametrize("name", [("cond", "uncond"), ()], ids=["named", "unnamed"])
def test_windows_that_nobody_named_store_nothing(name: tuple[str, ...]) -> None:
    run, _model = made()
    for timestep in (900.0, 500.0):
        for window in (X, Y):
            calls_of(run, *((timestep, window, *name[i : i + 1]) for i in range(2)))
            run.layers[0].state["probe"] = 1
    assert run.doubt and run.layers[0].stateless == run.doubt
    calls_of(run, (900.0, X))
    assert run.doubt is run.layers[0].stateless is None  # a new run, a new chance


def test_windows_that_begin_late_are_noticed_at_their_first_step() -> None:
    run, _model = made()
    calls_of(run, (900.0, X), (900.0, X), (500.0, X), (500.0, X))
    assert run.doubt is None
    run.layers[0].state["probe"] = 1
    calls_of(run, (300.0, X), (300.0, Y))
    assert run.doubt == "the latents changed within step 2" and not run.layers[0].state


def test_branches_in_turns_on_a_family_that_stacks_them_are_noticed() -> None:
    run, _model = made(BATCHED)
    calls_of(run, (900.0, X), (900.0, X), (500.0, X), (500.0, X))
    assert run.doubt is not None


def test_stacked_branches_on_a_family_that_runs_them_in_turns_are_noticed() -> None:
    run, _model = made(SEPARATE)
    calls_of(run, (900.0, repeated(2)))
    assert run.branch_doubt is not None and run.doubt is None
    run, _model = made(SEPARATE)
    calls_of(run, (900.0, repeated(2), "cond"))
    assert run.branch_doubt is None  # two samples of the same noise, the caller says


def test_a_branch_that_a_pipeline_runs_twice_in_a_step_is_noticed() -> None:
    pipe = Pipe(scheduler=SimpleNamespace(timesteps=[900.0, 500.0], step_index=0))
    run, _model = made(SEPARATE, pipe)
    pipe([values(900.0), values(900.0)])
    assert (run.doubt, run.source) == (None, "pipeline call")
    pipe([values(900.0), values(900.0), values(900.0)])
    assert run.doubt == "the branch cond came again in step 0"


def test_a_new_pipeline_call_is_a_new_run_whatever_its_schedule() -> None:
    pipe, other = Pipe(scheduler=None), Pipe(scheduler=None)
    run, model = made(SEPARATE, pipe)
    other.run, other.transformer = run, model
    for expected, running in enumerate((pipe, pipe, other, pipe), 1):
        assert running([values(900.0), values(500.0)], read=lambda: run.clock.run) == [expected] * 2
        assert run.pipe is running
