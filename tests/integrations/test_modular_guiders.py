"""Guiders call the transformer once a branch, in modular pipelines of families that stack branches elsewhere too."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ClassifierFreeGuidance

import dit_attn
from dit_attn import models

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
    made = pipe(prompt="a large red circle on white", negative_prompt="blue", generator=noise, **CALL, **more)
    return np.asarray(made if hasattr(pipe, "guider") else made.images)[0]


SUBJECTS = ({"piece": "red circle", "box": (0, 0, 0.5, 1)}, {"piece": "white", "box": (0.5, 0, 1, 1)})


@pytest.mark.parametrize(
    "method",
    [
        dit_attn.ReTtention(density=0.3, dense_steps=0, period=2, q_block=16, kv_block=16),
        *(dit_attn.SoftPAG(heads="3", scale=1.0, inject=inject) for inject in ("shift", "cond", "step")),
        dit_attn.NAG(),
        dit_attn.GAG(),
        dit_attn.SaaS(pieces=("red circle", "white"), target=0.5, min_quality=0.0),
        dit_attn.SubjectIsolation(subjects=SUBJECTS),
    ],
    ids=["re-ttention", "softpag shift", "softpag cond", "softpag step", "nag", "gag", "saas", "isolation"],
)
def test_methods_with_state_guidance_and_words_do_what_they_do_in_the_stock_pipeline(
    pipes: Any, method: Any, caplog: pytest.LogCaptureFixture
) -> None:
    made, summaries = [], []
    for pipe in pipes:
        with dit_attn.enabled(pipe, method):
            made.append(run(pipe))
            summaries.append(dit_attn.summary(pipe))
    apart, moved = (np.abs(made[0] - other).max() for other in (made[1], run(pipes[0])))
    assert apart < 1e-5 and moved > 10 * apart
    assert not [record for record in caplog.records if record.levelname == "ERROR"]  # of a block that was stopped
    modular, stock = summaries
    assert not modular.warnings and modular.steps == stock.steps == 3
    assert modular.sparse_calls == 2 * stock.sparse_calls  # one branch a call
    if modular.guidance is not None:
        for name in ("steps", "parallel", "orthogonal"):
            assert getattr(modular.guidance, name) == pytest.approx(getattr(stock.guidance, name), abs=0.02)
