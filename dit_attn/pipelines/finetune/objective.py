"""The losses of a fine-tuning: distance to the dense teacher's prediction, or the model's own flow-matching loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.pipelines.finetune.config import FinetuneConfig
from dit_attn.pipelines.finetune.examples import LATENTS, TIME, Example

SMALLEST_LEVEL = 0.05
"""Noise level below which the error of a predicted sample is not weighted up further."""


@dataclass(frozen=True)
class Parameterization:
    """What the transformer of a pipeline predicts.

    Attributes:
        predicts: ``flow`` (noise - sample), ``sample``, or another one of diffusers'.
        train_steps: time step of pure noise.
        is_flow: whether ``x_t = (1 - s) x_0 + s eps``.
    """

    predicts: str
    train_steps: float
    is_flow: bool

    @staticmethod
    def of(pipe: Any) -> Parameterization:
        """Return that of a pipeline's scheduler."""
        config = pipe.scheduler.config
        flow = "Flow" in type(pipe.scheduler).__name__ or bool(config.get("use_flow_sigmas"))
        predicts = config.get("prediction_type", "flow_prediction" if flow else "epsilon")
        predicts = "flow" if predicts == "flow_prediction" else predicts
        return Parameterization(predicts, float(config.get("num_train_timesteps", 1000)), flow)

    def check(self, config: FinetuneConfig, clean: bool) -> None:
        """Refuse a loss that this model has no formula for.

        Raises:
            DitAttnError: so it is.
        """
        if config.loss == "flow" and not clean:
            raise DitAttnError(
                "loss flow needs clean latents, and the examples are calls of a teacher; use loss teacher"
            )
        if clean and (not self.is_flow or self.predicts not in ("flow", "sample")):
            raise DitAttnError(
                f"this model predicts {self.predicts}, and only flow models that predict the flow or the sample can be "
                "given clean latents; use loss teacher with examples that the teacher draws"
            )

    def weight(self, level: torch.Tensor) -> torch.Tensor:
        """(B,) factors of the squared error: of a predicted sample, those that make it the error of the velocity."""
        return level.clamp(min=SMALLEST_LEVEL).pow(-2) if self.predicts == "sample" else torch.ones_like(level)


def prepare(
    example: Example,
    about: Parameterization,
    config: FinetuneConfig,
    generator: torch.Generator,
    teacher: Callable[[dict[str, Any]], torch.Tensor],
) -> tuple[dict[str, Any], torch.Tensor, torch.Tensor]:
    """Return arguments, target and weights (B,) of one example.

    Args:
        example: on the device.
        about: what the model predicts.
        config: the settings.
        generator: on the CPU, of noise and noise levels.
        teacher: the dense model.
    """
    given = example.arguments
    clean: torch.Tensor = given[LATENTS]
    if not example.clean:
        assert example.target is not None
        level = given[TIME].float().flatten(1).amax(1) if given[TIME].ndim > 1 else given[TIME].float().reshape(-1)
        return given, example.target, about.weight(level.expand(len(clean)) / about.train_steps)
    level = torch.sigmoid(config.time_mean + config.time_std * torch.randn(1, generator=generator))
    level = config.time_shift * level / (1 + (config.time_shift - 1) * level)
    noise = torch.randn(clean.shape[1:], generator=generator).to(clean.device, clean.dtype)
    s = level.to(clean.device, clean.dtype)
    given = {**given, LATENTS: torch.lerp(clean, noise.expand_as(clean), s)}
    given[TIME] = (level * about.train_steps).to(clean.device).expand(len(clean))
    weight = about.weight(level.to(clean.device).expand(len(clean)))
    if config.loss == "flow":
        return given, noise - clean if about.predicts == "flow" else clean, weight
    with torch.no_grad():
        return given, teacher(given), weight


def weighted_error(found: torch.Tensor, target: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Mean over the batch of the weighted mean squared error, in fp32."""
    return ((found.float() - target.float()).square().flatten(1).mean(1) * weight).mean()
