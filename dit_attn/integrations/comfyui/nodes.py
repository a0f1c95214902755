"""The nodes: a sparse attention method, and guidance by heads, on a diffusion transformer."""

from __future__ import annotations

import json
from typing import Any

from dit_attn.errors import DitAttnError, shorten
from dit_attn.integrations.comfyui.comfy_run import count_blocks
from dit_attn.integrations.comfyui.head_guidance import GuidanceWindow
from dit_attn.integrations.comfyui.patch import SparseWindow, patched
from dit_attn.processors.core.executor import MIN_TOKENS
from dit_attn.processors.guidance.heads import numbers
from dit_attn.processors.guidance.perturbation import TARGETS
from dit_attn.processors.methods import methods
from dit_attn.processors.methods.softpag import SoftPAG
from dit_attn.processors.methods.sparse import SparseMethod, as_sparse

METHODS = ("rectified-spaattn", "block-sparse", "re-ttention")
_CATEGORY = "model/patch/dit_attn"
_PERCENT = {"min": 0.0, "max": 1.0, "step": 0.001}


class SparseAttention:
    """Computes the self attention of a model by a sparse method."""

    CATEGORY, FUNCTION = _CATEGORY, "patch"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = "Sparse self attention. Other calls, and calls with a mask of its own for every query, stay stock."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs of the node."""
        return {
            "required": {
                "model": ("MODEL",),
                "method": (list(METHODS),),
                "density": ("FLOAT", {"default": 0.25, "min": 0.01, "max": 1.0, "step": 0.01}),
                "start_percent": ("FLOAT", {"default": 0.1, **_PERCENT}),
                "end_percent": ("FLOAT", {"default": 1.0, **_PERCENT}),
                "min_tokens": ("INT", {"default": MIN_TOKENS, "min": MIN_TOKENS, "max": 1_000_000}),
            },
            "optional": {
                "dense_blocks": ("STRING", {"default": ""}),
                "settings": ("STRING", {"default": "", "multiline": True}),
            },
        }

    def patch(
        self,
        model: Any,
        method: str,
        density: float,
        start_percent: float,
        end_percent: float,
        min_tokens: int,
        dense_blocks: str = "",
        settings: str = "",
    ) -> tuple[Any]:
        """Return a clone of the model with the method enabled.

        Args:
            model: the model; nothing of it changes.
            method: one of ``METHODS``.
            density: fraction of the key blocks that are attended to; 1 is stock attention.
            start_percent, end_percent: part of the run in which it applies.
            min_tokens: shortest sequence that it applies to.
            dense_blocks: blocks that stay dense, e.g. ``"0,38-39"``.
            settings: further settings of the method, as a JSON object.

        Raises:
            DitAttnError: a setting that the method does not have, a value out of range, no such block.
        """
        high, low = noise_levels(model, start_percent, end_percent)
        try:
            dense = numbers(dense_blocks.replace(" ", ""))
        except ValueError:
            raise DitAttnError(
                f"dense_blocks {shorten(dense_blocks)} is no list of blocks; write e.g. '0,38-39'"
            ) from None
        made = sparse_method(method, {"density": density, "dense_steps": 0, "dense_layers": dense, **parsed(settings)})
        blocks = model.get_model_object("diffusion_model")
        made.check_model(type(blocks).__name__, count_blocks(blocks))
        return (patched(model, sparse=SparseWindow(made, high, low, min_tokens)),)


class HeadGuidanceNode:
    """Guides away from the prediction with some perturbed heads (SoftPAG)."""

    CATEGORY, FUNCTION = _CATEGORY, "patch"
    RETURN_TYPES = ("MODEL",)
    DESCRIPTION = "SoftPAG: one more pass in each guided step, with some attention heads perturbed."

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        """Return the inputs of the node."""
        return {
            "required": {
                "model": ("MODEL",),
                "heads": ("STRING", {"default": ""}),
                "scale": ("FLOAT", {"default": 3.0, "min": 0.0, "max": 100.0, "step": 0.1}),
                "u": ("FLOAT", {"default": 1.0, "min": 0.0, "max": 1.0, "step": 0.05}),
                "target": (list(TARGETS[:3]),),
                "start_percent": ("FLOAT", {"default": 0.0, **_PERCENT}),
                "end_percent": ("FLOAT", {"default": 1.0, **_PERCENT}),
            }
        }

    def patch(
        self, model: Any, heads: str, scale: float, u: float, target: str, start_percent: float, end_percent: float
    ) -> tuple[Any]:
        """Return a clone of the model with the guidance enabled.

        Args:
            model: the model; nothing of it changes.
            heads: perturbed heads, e.g. ``"14:0,7;15@0.5"``: blocks by number in the order in which they run. Empty:
                every head of the middle block.
            scale: guidance strength w.
            u: strength of the perturbation.
            target: replacement for the attention matrix.
            start_percent, end_percent: part of the run in which it applies.

        Raises:
            DitAttnError: heads that cannot be parsed, a value out of range.
        """
        high, low = noise_levels(model, start_percent, end_percent)
        method = SoftPAG(heads=heads, scale=scale, u=u, target=target)
        return (patched(model, guidance=GuidanceWindow(method, high, low)),)


NODE_CLASS_MAPPINGS = {"DitAttnSparseAttention": SparseAttention, "DitAttnHeadGuidance": HeadGuidanceNode}
NODE_DISPLAY_NAME_MAPPINGS = {
    "DitAttnSparseAttention": "Sparse Attention (dit_attn)",
    "DitAttnHeadGuidance": "Guidance by Heads (dit_attn)",
}


def noise_levels(model: Any, start: float, end: float) -> tuple[float, float]:
    """Return the noise levels at which a part of the run begins and ends.

    Raises:
        DitAttnError: it ends before it begins.
    """
    if start >= end:
        raise DitAttnError(f"start_percent {start:g} is not before end_percent {end:g}; give a smaller start_percent")
    sampling = model.get_model_object("model_sampling")
    return float(sampling.percent_to_sigma(start)), float(sampling.percent_to_sigma(end))


def sparse_method(slug: str, settings: dict[str, Any]) -> SparseMethod:
    """Return a sparse method that runs in ComfyUI.

    Raises:
        DitAttnError: no such method, a setting that it does not have, a value out of range.
    """
    if slug not in METHODS:
        raise DitAttnError(f"method {shorten(slug)} does not run in ComfyUI; take one of {', '.join(METHODS)}")
    method = as_sparse(methods()[slug](**settings))
    assert method is not None
    return method


def parsed(settings: str) -> dict[str, Any]:
    """Return the settings in a JSON object, none for an empty text.

    Raises:
        DitAttnError: it is none.
    """
    try:
        found = json.loads(settings or "{}")
    except ValueError as error:
        raise DitAttnError(f'settings are not JSON ({error}); write e.g. {{"q_block": 64}}') from None
    if not isinstance(found, dict):
        raise DitAttnError(f'settings must be a JSON object such as {{"q_block": 64}}, got {shorten(settings)}')
    return found
