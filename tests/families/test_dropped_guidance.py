"""A pipeline that was asked for true classifier-free guidance and runs without it is told of, on stock pipelines."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.processors.attach import attention_processor, pipeline_call
from tests.families.test_flux import TestFlux as FluxCase
from tests.families.test_framepack import TestFramepack as FramepackCase
from tests.families.test_hunyuan_video import TestHunyuanVideo as HunyuanVideoCase
from tests.families.test_qwen_image import TestQwenImage as QwenImageCase
from tests.families.test_wan import TestWan as WanCase

CASES = {
    "flux": FluxCase,
    "qwen-image": QwenImageCase,
    "hunyuan-video": HunyuanVideoCase,
    "framepack": FramepackCase,
}
WAYS: dict[str, Callable[[Any], Any]] = {"watched": dit_attn.watch, "enabled": dit_attn.enable}
NOTHING_NEGATIVE = "true_cfg_scale 3 had no effect: the pipeline ran no unconditional branch; give negative_prompt"


def made(case: Any) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """A pipeline, its arguments with guidance, and the same without anything negative."""
    torch.manual_seed(0)
    pipe, kwargs = case().pipeline()
    pipe.set_progress_bar_config(disable=True)
    return pipe, kwargs, {name: value for name, value in kwargs.items() if not name.startswith("negative")}


def run(pipe: Any, kwargs: dict[str, Any], **more: Any) -> torch.Tensor:
    with torch.no_grad():
        return pipe(
            **copy.deepcopy({**kwargs, **more}), num_inference_steps=2, generator=torch.Generator().manual_seed(0),
            output_type="latent", return_dict=False,
        )[0]  # fmt: skip


def warnings(pipe: Any, kwargs: dict[str, Any], **more: Any) -> tuple[str, ...]:
    run(pipe, kwargs, **more)
    return dit_attn.summary(pipe).warnings


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", CASES)
def test_true_guidance_without_a_negative_prompt_is_told(name: str, way: str) -> None:
    pipe, guided, bare = made(CASES[name])
    WAYS[way](pipe)
    assert warnings(pipe, guided) == ()
    (warning,) = warnings(pipe, bare)
    assert warning.startswith(NOTHING_NEGATIVE) and warning in " ".join(str(dit_attn.summary(pipe)).split())
    assert warnings(pipe, bare, true_cfg_scale=1.0) == ()
    assert warnings(pipe, guided) == ()


def test_a_default_that_is_dropped_is_told() -> None:
    pipe, _, bare = made(CASES["qwen-image"])
    del bare["true_cfg_scale"]  # 4 by default, and without a negative prompt it does nothing
    dit_attn.watch(pipe)
    assert warnings(pipe, bare)[0].startswith("true_cfg_scale 4 had no effect")


def test_half_a_negative_prompt_is_told() -> None:
    pipe, guided, _ = made(CASES["hunyuan-video"])
    dit_attn.watch(pipe)
    (warning,) = warnings(pipe, {**guided, "negative_pooled_prompt_embeds": None})
    assert "negative_prompt_embeds, negative_prompt_attention_mask alone is not enough" in warning
    assert "give negative_pooled_prompt_embeds too" in warning


def test_an_embedded_scale_that_the_model_does_not_read_is_told() -> None:
    pipe, guided, bare = made(CASES["flux"])
    bare["true_cfg_scale"] = 1.0
    dit_attn.watch(pipe)
    assert warnings(pipe, bare) == warnings(pipe, bare, guidance_scale=0.0) == ()
    (warning,) = warnings(pipe, bare, guidance_scale=7.0)
    assert warning.startswith("guidance_scale 7 had no effect: this FluxTransformer2DModel takes no guidance")
    assert warnings(pipe, guided, guidance_scale=7.0) == ()
    distilled, _, bare = made(CASES["hunyuan-video"])
    dit_attn.watch(distilled)
    assert warnings(distilled, bare, true_cfg_scale=1.0, guidance_scale=7.0) == ()


@pytest.mark.parametrize("case", [CASES["flux"], WanCase], ids=["flux", "wan"])
def test_watching_touches_no_layer_and_no_bit(case: Any) -> None:
    pipe, guided, _ = made(case)
    stock = run(pipe, guided)
    dit_attn.watch(pipe)
    processors = [getattr(module, "processor", None) for module in pipe.transformer.modules()]
    assert not any(map(attention_processor.is_wrapped, processors))
    assert torch.equal(run(pipe, guided), stock) and dit_attn.summary(pipe).steps == 2
    dit_attn.disable(pipe)
    assert torch.equal(run(pipe, guided), stock)
    with pytest.raises(dit_attn.DitAttnError, match="no method is enabled"):
        dit_attn.summary(pipe)


def test_a_watched_pipeline_is_watched_again_after_a_method() -> None:
    pipe, _, bare = made(CASES["flux"])
    dit_attn.watch(pipe)
    with dit_attn.enabled(pipe, dit_attn.SoftPAG(heads="0:0")):
        pass
    processors = [getattr(module, "processor", None) for module in pipe.transformer.modules()]
    assert not any(map(attention_processor.is_wrapped, processors))
    assert warnings(pipe, bare)[0].startswith(NOTHING_NEGATIVE)


def test_a_compiled_transformer_is_watched_too() -> None:
    pipe, guided, bare = made(CASES["flux"])
    dit_attn.watch(pipe)
    torch.compiler.reset()
    pipe.transformer.compile(backend="eager", fullgraph=True)
    assert warnings(pipe, guided) == ()
    assert warnings(pipe, bare)[0].startswith(NOTHING_NEGATIVE)


def test_the_push_on_the_conditional_branch_knows_a_scale_that_is_kept_nowhere() -> None:
    pipe, guided, bare = made(CASES["flux"])
    base = dit_attn.SoftPAG(heads="0:0", scale=1.5)
    for kwargs in (guided, bare):  # the second drops its scale, which then divides nothing
        found = []
        for inject in ("shift", "cond"):
            dit_attn.enable(pipe, dataclasses.replace(base, inject=inject))
            found.append(run(pipe, kwargs))
        torch.testing.assert_close(found[1], found[0], atol=2e-3, rtol=1e-3)


class Outer:
    """A pipeline that only hands its call on."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner()

    def inner(self) -> Any:
        return pipeline_call.running_call(self)


class Inner(Outer):
    """One that hands its call on to its base."""

    def __call__(self, scale: float = 2.0, *, negative_prompt: Any = None) -> Any:  # type: ignore[override]
        return super().__call__(scale)


def test_the_arguments_of_a_running_call_are_found_and_others_are_not() -> None:
    assert Inner()(3.0, negative_prompt="blue") == {"scale": 3.0, "negative_prompt": "blue"}
    assert pipeline_call.running_call(Inner()) == {} and pipeline_call.running_call(None) == {}

    class Alone(Outer):
        @torch.no_grad()
        def __call__(self, scale: float = 2.0, *, negative_prompt: Any = None) -> Any:  # type: ignore[override]
            other = Alone.__new__(Alone)
            assert pipeline_call.running_call(other) == {}  # its own call does not run
            return self.inner()

    assert Alone()(3.0, negative_prompt="blue") == {"scale": 3.0, "negative_prompt": "blue"}
