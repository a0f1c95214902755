"""Guiders of modular pipelines say which branch a call is."""

from __future__ import annotations

import pytest
import torch
from diffusers import ClassifierFreeGuidance, PerturbedAttentionGuidance

from dit_attn.processors.attach.guider_context import guider_context, guider_scale


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
