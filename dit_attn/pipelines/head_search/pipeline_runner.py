"""Run a stock pipeline with some heads perturbed, and find the heads that can be."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from dit_attn.api import disable, enabled
from dit_attn.errors import DitAttnError, unknown
from dit_attn.pipelines.head_search.evaluation import Arm, Layers, Pair, format_arm
from dit_attn.pipelines.output import batch_of
from dit_attn.pipelines.transformers import count_passes, transformers_of
from dit_attn.processors.attach.attach import session_of
from dit_attn.processors.methods.softpag import SoftPAG


def searchable_layers(pipe: Any) -> Layers:
    """Return the layers of a pipeline whose heads can be perturbed, with their number of heads.

    Raises:
        DitAttnError: unsupported family, or a layer of unknown number of heads.
    """
    found: dict[str, int | None] = {}

    class LayerProbe(SoftPAG):
        def perturbation(self, layers: dict[str, int | None], blocks: list[str]) -> Any:
            found.update(layers)
            return super().perturbation(layers, blocks)

    with enabled(pipe, LayerProbe(heads="0:0")):
        pass
    unknown_count = [layer for layer, count in found.items() if count is None]
    if unknown_count:
        raise DitAttnError(f"{unknown_count[0]} does not say how many heads it has, so they cannot be searched")
    return {layer: int(count or 0) for layer, count in found.items()}


class PipelineRunner:
    """Runs a stock pipeline with the heads of an arm perturbed.

    Args:
        pipe: the pipeline; enabled methods are disabled.
        method: settings of the guidance; the arm replaces its heads.
        call: further arguments of the pipeline's call.

    Attributes:
        parameters: parameters of the pipeline's call by name.

    Raises:
        DitAttnError: an argument that the pipeline does not have.
    """

    def __init__(self, pipe: Any, method: SoftPAG, call: dict[str, Any]) -> None:
        self.pipe, self.method, self.call = pipe, method, dict(call)
        self.parameters = inspect.signature(type(pipe).__call__).parameters
        if wrong := [name for name in call if name not in self.parameters]:
            raise unknown(f"argument of {type(pipe).__name__}", wrong[0], list(self.parameters)[1:])
        disable(pipe)

    def __call__(self, arm: Arm, pairs: Sequence[Pair], steps: int | None) -> tuple[list[np.ndarray | None], float]:
        """Run an arm; see :class:`~dit_attn.pipelines.head_search.evaluation.Runner`."""
        if not arm:
            with count_passes(self.pipe) as count:
                result = self.run(pairs, steps)
            return output_frames(result), count.samples / len(pairs)
        with enabled(self.pipe, replace(self.method, heads=format_arm(arm))), count_passes(self.pipe) as count:
            result = self.run(pairs, steps)
            sessions = [session_of(model) for model in transformers_of(self.pipe).values()]
            guiders = [session.guider for session in sessions if session is not None]
            perturbed = sum(guider.evaluations for guider in guiders if guider is not None)
        return output_frames(result), count.samples / len(pairs) + perturbed

    def run(self, pairs: Sequence[Pair], steps: int | None, **changes: Any) -> Any:
        """Call the pipeline for pairs, with what is enabled on it, and return its output.

        Args:
            pairs: prompts with seeds.
            steps: denoising steps; ``None`` for those of the call.
            changes: further arguments of the call.
        """
        call = {**self.call, "output_type": "np", **changes}
        if steps is not None:
            call["num_inference_steps"] = steps
        noise = [torch.Generator("cpu").manual_seed(pair.seed) for pair in pairs]
        return self.pipe(
            prompt=[pair.prompt for pair in pairs],
            generator=noise if len(noise) > 1 else noise[0],
            **{name: value for name, value in call.items() if name in self.parameters},
        )


def output_frames(result: Any) -> list[np.ndarray | None]:
    """Return every image (1, H, W, 3) or video (F, H, W, 3) of a pipeline's output as uint8.

    Returns:
        ``None`` for an item that is not finite.

    Raises:
        DitAttnError: the output has neither images nor frames.
    """
    made = batch_of(result)
    if made is None:
        raise DitAttnError(f"{type(result).__name__} holds neither images nor frames, so there is nothing to score")
    out: list[np.ndarray | None] = []
    for item in made.items:
        values = np.stack([np.asarray(frame) for frame in item]) if made.video else np.asarray(item)[None]
        if values.dtype != np.uint8:
            if not np.isfinite(values).all():
                out.append(None)
                continue
            values = (values.clip(0.0, 1.0) * 255).round().astype(np.uint8)
        out.append(np.repeat(values, 3, -1) if values.shape[-1] == 1 else values[..., :3])
    return out
