"""Guiders call the transformer once a branch, in modular pipelines of families that stack branches elsewhere too."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance, PerturbedAttentionGuidance

import dit_attn
from dit_attn import models
from dit_attn.processors.attach.guider_context import guider_context, guider_scale

AutoBlocks = getattr(diffusers, "StableDiffusion3AutoBlocks", None)
CALL = {"height": 64, "width": 64, "num_inference_steps": 3, "max_sequence_length": 16, "output_type": "np"}
SCALE = 3.0


@pytest.fixture(scope="module")
def pipes() -> tuple[Any, Any]:
    """A modular pipeline and the stock one around the same parts."""
    if AutoBlocks is None:
        pytest.skip("this diffusers has no modular Stable Diffusion 3")
    modular, stock = AutoBlocks().init_pipeline(), models.load("tiny-joint")
    names = set(modular.component_names)
    parts = {name: part for name, part in stock.components.items() if name in names and part is not None}
    modular.update_components(**parts, guider=ClassifierFreeGuidance(guidance_scale=SCALE))
    return modular, stock


def run(pipe: Any) -> np.ndarray:
    """One image; without a negative prompt, these blocks guide nothing."""
    more = {"output": "images"} if hasattr(pipe, "guider") else {"guidance_scale": SCALE}
    noise = torch.Generator().manual_seed(0)
    made = pipe(prompt="a large red circle", negative_prompt="", generator=noise, **CALL, **more)
    return np.asarray(made if hasattr(pipe, "guider") else made.images)[0]


@pytest.mark.parametrize(
    "method",
    [
        dit_attn.ReTtention(density=0.3, dense_steps=0, period=2, q_block=16, kv_block=16),
        *(dit_attn.SoftPAG(heads="3", scale=1.0, inject=inject) for inject in ("shift", "cond", "step")),
    ],
    ids=["re-ttention", "softpag shift", "softpag cond", "softpag step"],
)
def test_methods_with_state_and_guidance_do_what_they_do_in_the_stock_pipeline(pipes: Any, method: Any) -> None:
    made, summaries = [], []
    for pipe in pipes:
        with dit_attn.enabled(pipe, method):
            made.append(run(pipe))
            summaries.append(dit_attn.summary(pipe))
    assert np.abs(made[0] - made[1]).max() < 0.01
    modular, stock = summaries
    assert not modular.warnings and modular.steps == stock.steps == 3
    assert modular.sparse_calls == 2 * stock.sparse_calls  # one branch a call
    if modular.guidance is not None:
        for name in ("steps", "parallel", "orthogonal"):
            assert getattr(modular.guidance, name) == pytest.approx(getattr(stock.guidance, name), abs=0.02)


def test_a_guider_names_the_branches_that_run() -> None:
    pipe = type("Pipe", (), {})()
    assert guider_context(None) is guider_context(pipe) is guider_scale(pipe) is None
    pipe.guider = ClassifierFreeGuidance(guidance_scale=4.5, use_original_formulation=True, stop=0.5)
    found = []
    for step in range(2):
        pipe.guider.set_state(step, 2, torch.tensor(9))
        assert guider_context(pipe) is None  # nothing is prepared yet
        for _ in range(pipe.guider.num_conditions):
            pipe.guider.prepare_models(None)
            said = guider_context(pipe)
            assert said is not None and (said.step_index, said.num_inference_steps) == (step, 2)
            found.append((said.name, guider_scale(pipe)))
    assert found == [("pred_cond", 5.5), ("pred_uncond", 5.5), ("pred_cond", 1.0)]


@pytest.mark.parametrize(
    ("scale", "names"),
    [(1.0, ["pred_cond", "pred_cond_skip"]), (3.0, ["pred_cond", "pred_uncond", "pred_cond_skip"])],
)
def test_a_perturbed_branch_of_a_guider_is_told_from_the_unconditional_one(scale: float, names: list[str]) -> None:
    pipe = type("Pipe", (), {})()
    settings = {"perturbed_guidance_layers": [0], "perturbed_guidance_start": 0.0, "perturbed_guidance_stop": 1.0}
    pipe.guider = PerturbedAttentionGuidance(guidance_scale=scale, **settings)
    pipe.guider.set_state(1, 4, torch.tensor(9))
    found = []
    for number in range(pipe.guider.num_conditions):
        pipe.guider._count_prepared = number + 1
        said = guider_context(pipe)
        found.append(said.name if said else None)
    assert found == names
