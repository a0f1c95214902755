"""Guidance arguments of a running pipeline call, read from the stack of the call."""

from __future__ import annotations

import contextlib
import functools
import gc
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from tqdm import tqdm

from dit_attn.processors.attach.pipeline_call import (
    PipelineCall,
    find_running,
    on_run_end,
    read_pipeline_call,
    running_call,
)
from dit_attn.processors.core.cfg import SEPARATE

RULE = replace(SEPARATE, rescaled_by=("guidance_rescale",), bent_by=("use_dynamic_cfg", "skip_guidance_layers"))
DISTILLED = replace(RULE, argument="true_cfg_scale")


class Pipe:
    """A pipeline that reads its own call from inside."""

    def __call__(
        self,
        prompt: Any = None,
        guidance_scale: float | None = 3.5,
        true_cfg_scale: float | None = 1.0,
        negative_prompt: Any = None,
        negative_prompt_embeds: Any = None,
        negative_prompt_attention_mask: Any = None,
        num_images_per_prompt: int | None = 1,
        guidance_rescale: float = 0.0,
        use_dynamic_cfg: bool = False,
        skip_guidance_layers: Any = None,
        read: Callable[[Any], Any] = running_call,
    ) -> Any:
        later = "a local variable"  # noqa: F841
        return self.denoise(read)

    def denoise(self, read: Callable[[Any], Any]) -> Any:
        """What the pipeline's transformer would find."""
        return read(self)


def read_by(rule: Any, **given: Any) -> PipelineCall:
    """The call with some arguments, as the transformer of the pipeline reads it."""
    found: PipelineCall = Pipe()(read=lambda pipe: read_pipeline_call(pipe, rule), **given)
    return found


def test_without_a_running_call_nothing_is_known() -> None:
    assert read_pipeline_call(None, RULE) == read_pipeline_call(Pipe(), RULE) == PipelineCall()


def test_arguments_are_found_by_name_without_the_local_variables() -> None:
    found = Pipe()("a circle", guidance_scale=7.0)
    assert (found["prompt"], found["guidance_scale"], found["num_images_per_prompt"]) == ("a circle", 7.0, 1)
    assert "later" not in found and "self" not in found


def test_the_call_of_another_pipeline_object_is_not_taken() -> None:
    other = Pipe()
    assert Pipe()(read=lambda pipe: running_call(other)) == {}


def test_a_decorated_call_and_a_call_of_the_base_class_are_found() -> None:
    def decorated(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            return function(*args, **kwargs)

        return call

    class Wrapped(Pipe):
        """The call of the base class with another default."""

        @decorated
        def __call__(self, guidance_scale: float = 5.0, *, strength: float = 0.5, **rest: Any) -> Any:
            return super().__call__(guidance_scale=9.0, **rest)

    found = Wrapped()(guidance_scale=6.0)
    assert (found["guidance_scale"], found["strength"], found["prompt"]) == (
        6.0,
        0.5,
        None,
    )  # what the user gave counts


def test_scale_and_negative_prompts_of_a_call() -> None:
    call = read_by(RULE, negative_prompt=" ", guidance_scale=4)
    assert call.running and call.scale == 4.0 and isinstance(call.scale, float) and call.embedded is None
    assert call.given == ("negative_prompt",)
    assert call.missing == ("negative_prompt_embeds", "negative_prompt_attention_mask")
    assert read_by(RULE, guidance_scale=None).scale is None


def test_a_distilled_model_has_a_scale_of_its_own() -> None:
    assert read_by(DISTILLED, true_cfg_scale=2.0).scale == 2.0
    assert read_by(DISTILLED).embedded is None  # the default
    assert read_by(DISTILLED, guidance_scale=7).embedded == 7.0
    assert read_by(DISTILLED, guidance_scale=None).embedded is None


@pytest.mark.parametrize(
    ("given", "samples"),
    [
        ({}, None),
        ({"prompt": "a circle"}, 1),
        ({"prompt": ["a", "b"], "num_images_per_prompt": 3}, 6),
        ({"prompt": ["a", "b"], "num_images_per_prompt": None}, 2),
    ],
)
def test_samples_are_those_of_the_prompts(given: dict[str, Any], samples: int | None) -> None:
    assert read_by(RULE, **given).samples == samples


def test_arguments_that_change_the_rule_are_noticed() -> None:
    assert (read_by(RULE).rescaled, read_by(RULE).bent_by) == (False, "")
    assert read_by(RULE, guidance_rescale=0.7).rescaled and not read_by(SEPARATE, guidance_rescale=0.7).rescaled
    assert read_by(RULE, skip_guidance_layers=[1]).bent_by == "skip_guidance_layers"
    assert read_by(RULE, skip_guidance_layers=[1], use_dynamic_cfg=True).bent_by == "use_dynamic_cfg"


@pytest.mark.parametrize(
    ("given", "remedy"),
    [
        ({}, 'give negative_prompt (" " will do)'),
        (
            {"negative_prompt_embeds": 1},
            "negative_prompt_embeds alone is not enough, give negative_prompt_attention_mask",
        ),
        ({"negative_prompt": " "}, "although negative_prompt was given; this pipeline guides in another way"),
        (
            {"negative_prompt_embeds": 1, "negative_prompt_attention_mask": 1},
            "although negative_prompt_embeds, negative_prompt_attention_mask was given",
        ),
    ],
)
def test_the_remedy_names_what_is_missing(given: dict[str, Any], remedy: str) -> None:
    assert remedy in read_by(DISTILLED, true_cfg_scale=3.0, **given).remedy


# -- which pipeline is running ----------------------------------------------------------------------------------------


def with_part(name: str = "transformer") -> tuple[Pipe, torch.nn.Module]:
    """A pipeline with a component."""
    pipe, model = Pipe(), torch.nn.Linear(1, 1)
    setattr(pipe, name, model)
    return pipe, model


@pytest.mark.parametrize("name", ["transformer", "transformer_2"])
def test_the_pipeline_that_calls_its_transformer_is_found(name: str) -> None:
    pipe, model = with_part(name)
    found, number = pipe(read=lambda _: find_running(model))
    assert found is pipe and number
    assert find_running(model) == (None, 0) == pipe(read=lambda _: find_running(torch.nn.Linear(1, 1)))


def test_a_transformer_behind_a_compiled_module_is_that_transformer() -> None:
    pipe, model = with_part()
    pipe.transformer = torch.compile(model)  # type: ignore[attr-defined]
    assert pipe(read=lambda _: find_running(model))[0] is pipe


def test_the_innermost_pipeline_that_has_the_transformer_counts() -> None:
    outer, model = with_part()
    inner, other = Pipe(), Pipe()
    inner.transformer = model  # type: ignore[attr-defined]
    found = outer(read=lambda _: inner(read=lambda _: other(read=lambda _: find_running(model))))
    assert found[0] is inner
    before, after = [], []

    def read(_: Any) -> Any:
        before.append(find_running(model))
        inner(read=lambda _: None)
        after.append(find_running(model))

    outer(read=read)
    assert before == after and before[0][0] is outer  # the number is that of the call, all along


def test_a_call_that_a_class_forwards_to_its_base_class_is_one_call() -> None:
    class Forwarding(Pipe):
        """Calls its base class twice."""

        def __call__(self, **given: Any) -> Any:
            return [super(Forwarding, self).__call__(**given) for _ in range(2)]

    pipe, model = Forwarding(), torch.nn.Linear(1, 1)
    pipe.transformer = model  # type: ignore[attr-defined]
    first, second = pipe(read=lambda _: find_running(model))
    assert first == second and first[0] is pipe


def test_a_function_of_that_name_and_modules_that_hold_the_transformer_are_no_pipelines() -> None:
    model = torch.nn.Linear(1, 1)

    class Holder(torch.nn.Module):
        """A module around the transformer."""

        def __call__(self, read: Any) -> Any:
            return read()

    holder = Holder()
    holder.transformer = model

    def __call__(self: Any) -> Any:
        return find_running(model)

    pipe, _ = with_part()
    pipe.transformer = model  # type: ignore[attr-defined]
    assert holder(lambda: find_running(model)) == (None, 0) == __call__(pipe)


class Looping:
    """A pipeline whose denoising loop ends before its call does."""

    def __call__(self, bar: Any, ended: list[str], broken: bool = False) -> None:
        with bar as progress_bar:
            for name in ("first", "second"):
                assert on_run_end(self, lambda name=name: ended.append(name))
            progress_bar.update()
            if broken:
                raise RuntimeError("in the loop")
        ended.append("decoded")


@pytest.mark.parametrize("broken", [False, True])
def test_the_end_of_a_loop_is_seen_once(broken: bool) -> None:
    bar, ended = tqdm(total=1, disable=True), []
    with contextlib.suppress(RuntimeError):
        Looping()(bar, ended, broken)
    assert ended == ["first", "second"] + ["decoded"] * (not broken)
    bar.close()
    assert "close" not in vars(bar) and len(ended) == 3 - broken


def test_a_bar_that_nobody_closes_ends_the_loop_when_it_is_deleted() -> None:
    class Loose:
        def __call__(self, ended: list[str]) -> None:
            progress_bar = tqdm(total=1, disable=True)
            assert on_run_end(self, lambda: ended.append("end"))
            progress_bar.update()

    class Bare:
        def __call__(self) -> bool:
            return on_run_end(self, lambda: None)

    ended: list[str] = []
    gc.disable()
    try:
        Loose()(ended)
    finally:
        gc.enable()
    assert ended == ["end"] and not Bare()()


def test_a_scale_that_the_call_reads_from_itself_is_fixed() -> None:
    class Own:
        def __call__(self, prompt: str = "", guidance_scale: float = 3.0) -> Any:
            self._guidance_scale = guidance_scale
            return read_pipeline_call(self, SEPARATE)

    class Asks(Own):
        def __call__(self, prompt: str = "", guidance_scale: float = 3.0) -> Any:
            assert self._guidance_scale
            return read_pipeline_call(self, SEPARATE)

    pipe = Asks()
    pipe._guidance_scale = 2.0
    assert Own()(guidance_scale=4.0).fixed == {"_guidance_scale": 4.0} and pipe().fixed == {}
