"""Image families whose latents come as one vector per token: a table of positions says the (1, H, W) grid."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dit_attn.processors.attach.families import Family
from dit_attn.processors.core.cfg import BATCHED, SEPARATE, CFGRule
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span

TEXT = Span("text", None)
# The pipeline's guidance_scale is an input of the model.
EMBEDDED = CFGRule("separate", ("cond", "uncond"), scale="", argument="true_cfg_scale")
_POSITIONS = {"img_ids": None, "txt_ids": None}  # (S, 3), the same for all samples
_IDEOGRAM_IMAGE = 2  # indicator of an image token


def image_spans(ids: torch.Tensor, image: int = 0) -> tuple[Span, ...]:
    """Return the spans of an ``img_ids`` table.

    Args:
        ids: (S, n) or (B, S, n); columns kind, y, x. Every kind but one is a reference image.
        image: kind of the image.
    """
    if ids.ndim == 3:
        ids = ids[0]
    kinds, counts = torch.unique_consecutive(ids[:, 0].detach().cpu(), return_counts=True)
    spans, start = [], 0
    for kind, count in zip(kinds.tolist(), counts.tolist()):
        width = int(torch.unique(ids[start : start + count, 2]).numel())
        spans.append(visual_span("image" if kind == image else "reference", (1, count // width, width)))
        start += count
    return tuple(spans)


def _by_ids(config: Any, values: dict[str, Any]) -> TokenLayout:
    """img_ids: (S_image, n); the sequence is [text, image, reference, ...]."""
    return TokenLayout((TEXT, *image_spans(values["img_ids"])))


def _flux2(config: Any, values: dict[str, Any]) -> TokenLayout:
    """As Flux.1; klein with a cache attends to its references alone, which stand before the image in their first step.

    num_ref_tokens: of the step that writes the cache, whose ``img_ids`` have the references too.
    """
    mode, ids = values.get("kv_cache_mode"), values["img_ids"]
    count = (values.get("num_ref_tokens") if mode == "extract" else values.get("kv_cache")) or 0
    if mode not in ("extract", "cached") or not count:
        return _by_ids(config, values)
    image = image_spans(ids[..., count if mode == "extract" else 0 :, :])
    alone = ("condition",)
    return TokenLayout((TEXT, Span("condition", count), *image), keys_alone=alone, apart=alone * (mode == "cached"))


def _longcat(config: Any, values: dict[str, Any]) -> TokenLayout:
    """img_ids: (S_image, 3); text is of kind 0, the image of kind 1, the image that is edited of kind 2."""
    return TokenLayout((TEXT, *image_spans(values["img_ids"], image=1)))


def _flux3(config: Any, values: dict[str, Any]) -> TokenLayout:
    """Tables (S, 4) of t, y, x and kind; the sequence is [text, image, reference, ...], first the image alone."""
    tables = (table[:, [3, 1, 2]] for name in ("img_ids", "image_cond_ids") if (table := values[name]) is not None)
    image, *references = (span for table in tables for span in image_spans(table))
    return TokenLayout((TEXT, image, *references), others=(("mode_blocks.*", TokenLayout((image,))),))


def _ideogram4(config: Any, values: dict[str, Any]) -> TokenLayout:
    """indicator: (B, S) says which tokens of [padding, text, image] are the image; in one branch all are."""
    indicator = values["indicator"].cpu()
    rows = values["position_ids"][0][indicator[0] == _IDEOGRAM_IMAGE]
    height, width = (int(torch.unique(axis).numel()) for axis in (rows[:, 1], rows[:, 2]))
    padding = set((indicator == 0).sum(1).tolist())
    start = Span("padding", padding.pop() if len(padding) == 1 else 0)  # else it ends elsewhere in every sample
    return TokenLayout((start, TEXT, visual_span("image", (1, height, width))))


def _krea2(config: Any, values: dict[str, Any]) -> TokenLayout:
    """position_ids: (S_text + S_image, 3), columns 0, y, x; the sequence is [text, image]."""
    return TokenLayout((TEXT, *image_spans(values["position_ids"][-values["hidden_states"].shape[1] :])))


def _qwen(config: Any, values: dict[str, Any]) -> TokenLayout:
    """img_shapes: per sample a list of (T, H, W), the generated image first; the sequence is [text, image, ...]."""
    first, *others = values["img_shapes"]
    shapes = [first] if isinstance(first, tuple) else first
    if any((other if isinstance(other, list) else [other]) != shapes for other in others if isinstance(first, list)):
        raise ValueError("samples of different sizes in one batch")
    image, *references = shapes
    return TokenLayout((TEXT, visual_span("image", image), *(visual_span("reference", shape) for shape in references)))


FAMILIES = (
    Family(
        name="flux",
        models="Flux.1 dev, schnell, Kontext, Fill",
        transformers=("FluxTransformer2DModel",),
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        forward_args=("img_ids",),
        layout=_by_ids,
        cfg=EMBEDDED,
        batch_axes=_POSITIONS,
        packing=2,
    ),
    Family(
        name="flux-2",
        models="Flux.2 dev, klein, klein with a cache of its references",
        transformers=("Flux2Transformer2DModel",),
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        forward_args=("img_ids", "num_ref_tokens", "kv_cache", "kv_cache_mode"),
        layout=_flux2,
        cfg=EMBEDDED,
        cached_keys={"kv_cache": lambda cache: cache.num_ref_tokens},
        packing=2,
    ),
    Family(
        name="flux-3",
        models="Flux 3, its distilled flow maps",
        transformers=("Flux3Transformer2DModel",),
        layers=("mode_blocks.image.*.attn", "single_transformer_blocks.*.attn"),
        forward_args=("img_ids", "image_cond_ids"),
        layout=_flux3,
        cfg=replace(SEPARATE, scale=""),  # a guider object guides
        batch_axes={**_POSITIONS, "image_cond_ids": None, "image_rotary_emb": None},
        packing=2,
    ),
    Family(
        name="ideogram-4",
        models="Ideogram 4, both of its transformers",
        transformers=("Ideogram4Transformer2DModel",),
        layers=("layers.*.attention",),
        forward_args=("hidden_states", "indicator", "position_ids"),
        layout=_ideogram4,
        # No update reaches the unconditional branch, another model: it goes to the scheduler instead.
        cfg=CFGRule("separate", ("cond", "uncond"), negated=True, rescaled=True, bent_by=("guidance_schedule",)),
        time_grows=True,
        mask_rule="visual-row",
        packing=2,
    ),
    Family(
        name="chroma",
        models="Chroma",
        transformers=("ChromaTransformer2DModel",),
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        forward_args=("img_ids",),
        layout=_by_ids,
        mask_rule="visual-row",
        batch_axes=_POSITIONS,
        packing=2,
    ),
    Family(
        name="qwen-image",
        models="Qwen-Image, Qwen-Image-Edit",
        transformers=("QwenImageTransformer2DModel",),
        layers=("transformer_blocks.*.attn",),
        forward_args=("img_shapes",),
        layout=_qwen,
        cfg=CFGRule("separate", ("cond", "uncond"), rescaled=True, scale="", argument="true_cfg_scale"),
    ),
    Family(
        name="krea-2",
        models="Krea 2 Raw, Turbo",
        transformers=("Krea2Transformer2DModel",),
        layers=("transformer_blocks.*.attn",),
        forward_args=("hidden_states", "position_ids"),
        layout=_krea2,
        cfg=CFGRule("separate", ("cond", "uncond"), scale_offset=1.0, off=0.0),
        batch_axes={"position_ids": None},
        packing=2,
    ),
    Family(
        name="longcat-image",
        models="LongCat-Image, LongCat-Image-Edit",
        transformers=("LongCatImageTransformer2DModel",),
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        forward_args=("img_ids",),
        layout=_longcat,
        cfg=CFGRule("separate", ("cond", "uncond"), rescaled_by=("enable_cfg_renorm",)),
        batch_axes=_POSITIONS,
        packing=2,
    ),
    Family(
        name="ovis-image",
        models="Ovis-Image",
        transformers=("OvisImageTransformer2DModel",),
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        forward_args=("img_ids",),
        layout=_by_ids,
        batch_axes=_POSITIONS,
        packing=2,
    ),
    Family(
        name="bria",
        models="Bria 3.2",
        transformers=("BriaTransformer2DModel",),
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        forward_args=("img_ids",),
        layout=_by_ids,
        cfg=replace(BATCHED, rescaled_by=("normalize",), bent_by=("clip_value",)),
        batch_axes=_POSITIONS,
        latent_pixels=16,
    ),
    Family(
        name="fibo",
        models="Bria FIBO, FIBO-Edit",
        transformers=("BriaFiboTransformer2DModel",),
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        forward_args=("img_ids",),
        layout=_by_ids,
        cfg=BATCHED,
        batch_axes=_POSITIONS,
        mask_rule="visual-row",  # before diffusers 0.42: the outer product of what exists
        latent_pixels=16,
    ),
)
