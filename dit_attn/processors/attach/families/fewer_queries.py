"""Families whose queries are only some of the keys' tokens: those of a text or of given images are keys alone."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dit_attn.processors.attach.families import Family
from dit_attn.processors.attach.families.image import TEXT, order
from dit_attn.processors.attach.families.packed_image import EMBEDDED
from dit_attn.processors.core.cfg import BATCHED, CFGRule
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span


def _qwen21(config: Any, values: dict[str, Any]) -> TokenLayout:
    """The image comes last, behind text and given images, whose keys know nothing of it and are cached after a step.

    img_mask: (B, n), which of the n places are 2 x 2 tokens of an image. img_shapes: per sample a list of (T, H, W).
    """
    image = visual_span("image", values["img_shapes"][0][-1])
    given, counts = torch.unique_consecutive(values["img_mask"][0].cpu(), return_counts=True)
    spans = [
        Span("condition", 4 * count) if is_image else Span("text", count)
        for is_image, count in zip(given.tolist(), counts.tolist())
    ]
    spans[-1] = Span("condition", (spans[-1].length or 0) - (image.length or 0))
    alone = ("text", "condition")
    before = tuple(span for span in spans if span.length)
    return TokenLayout((*before, image), keys_alone=alone, apart=alone * (values["kv_cache_mode"] == "cached"))


def _glm(config: Any, values: dict[str, Any]) -> TokenLayout:
    """The sequence is [glyph text, image]; the branch with the prompt attends to cached keys of edited images too."""
    layout = order("text", "image")(config, values)
    if not values["kv_caches"]:
        return layout
    cached = Span("condition", values["kv_caches"])
    return replace(layout, spans=(cached, *layout.spans), keys_alone=("condition",), apart=("condition",))


def _glm_keys(caches: Any) -> int:
    """Tokens of edited images whose keys a call of GLM-Image attends to."""
    layer = caches[0]
    return layer.k_caches[0].shape[1] if layer.mode == "read" and layer.k_caches else 0


def _glm_writes(values: dict[str, Any]) -> str | None:
    """A call without text stores the keys of an image that is edited, before the first step."""
    empty = not values["encoder_hidden_states"].shape[1]
    return "keys of an image that is edited are written to a cache" if empty else None


def _prx(config: Any, values: dict[str, Any]) -> TokenLayout:
    """The keys are [text, image], the queries the image."""
    return replace(order("text", "image")(config, values), keys_alone=("text",))


def _nucleus(config: Any, values: dict[str, Any]) -> TokenLayout:
    """img_shapes: a (T, H, W) per sample. The keys are [image, text], the queries the image."""
    first, *others = values["img_shapes"]
    if any(other != first for other in others):
        raise ValueError("samples of different sizes in one batch")
    return TokenLayout((visual_span("image", first), TEXT), keys_alone=("text",))


FAMILIES = (
    Family(
        name="qwen-image-2.1",
        models="Qwen-Image 2.1, its edits",
        transformers=("QwenImage21Transformer2DModel",),
        layers=("transformer_blocks.*.attn",),
        forward_args=("img_shapes", "img_mask", "kv_cache_mode"),
        layout=_qwen21,
        cfg=EMBEDDED,
        latent_pixels=16,
        refused_methods={"nag": "its text is computed once for all steps, and its length is that of another argument"},
    ),
    Family(
        name="glm-image",
        models="GLM-Image, its edits",
        transformers=("GlmImageTransformer2DModel",),
        layers=("transformer_blocks.*.attn1",),
        forward_args=("hidden_states", "encoder_hidden_states", "kv_caches"),
        layout=_glm,
        cached_keys={"kv_caches": _glm_keys},
        between_steps=_glm_writes,
    ),
    Family(
        name="prx",
        models="PRX, PRX-Pixel",
        transformers=("PRXTransformer2DModel",),
        layers=("blocks.*.attention",),
        forward_args=("hidden_states",),
        layout=_prx,
        cfg=BATCHED,
    ),
    Family(
        name="nucleus-image",
        models="Nucleus-MoE-Image",
        transformers=("NucleusMoEImageTransformer2DModel",),
        layers=("transformer_blocks.*.attn",),
        forward_args=("img_shapes",),
        layout=_nucleus,
        cfg=CFGRule("separate", ("cond", "uncond"), negated=True, rescaled=True),
    ),
)
