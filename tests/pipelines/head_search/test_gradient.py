"""Gradients of all heads in one backward pass equal finite differences, and leave the pipeline as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

import dit_attn
from dit_attn.pipelines.head_search import gradient
from dit_attn.pipelines.head_search.evaluation import Pair
from dit_attn.pipelines.head_search.pipeline_runner import PipelineRunner, searchable_layers
from tests._support.compose import tiny_pipeline

STEP = 1e-3  # of a strength, for differences


def light(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
    weights = torch.linspace(0.5, 1.5, images.shape[-1], dtype=images.dtype)
    return (images * weights).flatten(1).mean(1)


class Embedded(PipelineRunner):
    """Tiny pipelines of the tests have no text encoder: the prompt is there as embeddings."""

    def run(self, pairs: Sequence[Pair], steps: int | None, **changes: Any) -> Any:
        noise = torch.Generator().manual_seed(pairs[0].seed)
        return self.pipe(**{**self.call, "output_type": "np", "generator": noise, **changes})


@pytest.mark.parametrize("name", ["sd3", "flux", "pixart"])
def test_slopes_of_all_heads_equal_finite_differences(name: str) -> None:
    pipe, kwargs = tiny_pipeline(name)
    for part in vars(pipe).values():
        if isinstance(part, torch.nn.Module):
            part.double()
    wide = {key: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for key, x in kwargs.items()}
    runner = Embedded(pipe, dit_attn.SoftPAG(heads="0:0", scale=2.0), {**wide, "num_inference_steps": 2})
    pairs, layers = [Pair("", 3)], searchable_layers(pipe)
    found = gradient.strength_gradients(runner, light, (), pairs, 0.5)
    layer = list(layers)[-1]
    ours = [float(found[layer][0, head]) for head in range(layers[layer])]

    def at(head: int, u: float) -> float:
        return float(gradient.predicted_scores(runner, light, ((layer, head, u),), pairs, 0.5)[0].detach())

    theirs = [(at(head, STEP) - at(head, 0.0)) / STEP for head in range(layers[layer])]
    assert any(ours) and np.argsort(ours).tolist() == np.argsort(theirs).tolist()
    np.testing.assert_allclose(ours, theirs, rtol=0.02, atol=0.02 * max(map(abs, theirs)))
    assert not torch.is_grad_enabled() or pipe.transformer.proj_out.weight.requires_grad
    assert type(pipe.scheduler).__module__.startswith("diffusers")
