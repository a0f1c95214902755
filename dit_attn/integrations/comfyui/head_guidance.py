"""Guidance by perturbed heads in ComfyUI: one more pass over the conditional rows after each guided step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dit_attn.errors import DitAttnError
from dit_attn.integrations.comfyui.comfy_run import ComfyRun
from dit_attn.processors.guidance.perturbation import Perturbation
from dit_attn.processors.methods.softpag import SoftPAG

PERTURBED = "dit_attn_perturbed"
"""Key in ``transformer_options`` of a pass that is perturbed; its value is the perturbation."""


@dataclass(frozen=True)
class GuidanceWindow:
    """A guidance method, and where it applies.

    Attributes:
        method: the method; its heads are counted over the blocks in the order in which they run.
        high, low: noise levels between which it applies.
    """

    method: SoftPAG
    high: float
    low: float


class HeadGuidance:
    """Adds ``w (c - p)`` to the denoised latents; p is predicted with perturbed heads.

    Attributes:
        window: the method and where it applies.
        run: state of the model's run.
    """

    def __init__(self, window: GuidanceWindow, run: ComfyRun) -> None:
        self.window, self.run = window, run
        self._perturbation: Perturbation | None = None

    def __call__(self, args: dict[str, Any]) -> Any:
        """Return the guided latents; ``args`` are those of ComfyUI's functions after classifier-free guidance.

        Raises:
            DitAttnError: a block or head that the model does not have, or a block that cannot be perturbed.
        """
        out, sigma = args["denoised"], float(args["sigma"].flatten()[0])
        weight = self.window.method.weight(self.run.clock.progress)
        if not weight or not self.window.low <= sigma <= self.window.high:
            return out
        if self._perturbation is None:  # the blocks and their heads are known once the model has run
            self._perturbation = self.window.method.perturbation(dict(self.run.heads), [])
            if unknown := [name for name in self._perturbation.strengths if name not in self.run.known]:
                raise DitAttnError(
                    f"block {unknown[0]} cannot be perturbed: its tokens are not known; name other heads"
                )
        if self._perturbation.empty:
            return out
        from comfy.samplers import calc_cond_batch

        options = {**args["model_options"].get("transformer_options", {}), PERTURBED: self._perturbation}
        model_options = {**args["model_options"], "transformer_options": options}
        (perturbed,) = calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], model_options)
        return out + weight * (args["cond_denoised"] - perturbed)
