"""Image families: where the (1, H, W) grid comes from and in which order the parts of the sequence stand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from dit_attn.processors.attach.families import Family
from dit_attn.processors.core.cfg import BATCHED, RESCALABLE, CFGRule
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span

TEXT = Span("text", None)
# The pipeline's guidance_scale is an input of the model.
EMBEDDED = CFGRule("separate", ("cond", "uncond"), scale="", argument="true_cfg_scale")
_POSITIONS = {"img_ids": None, "txt_ids": None}  # (S, 3), the same for all samples
_Z_IMAGE_MULTIPLE = 32  # Z-Image pads every part of its sequence to a multiple of this


def _order(*order: str) -> Callable[[Any, dict[str, Any]], TokenLayout]:
    """Layout with the given parts: ``"image"`` from (B, C, [T,] H, W) latents, ``"text"`` what remains."""

    def layout(config: Any, values: dict[str, Any]) -> TokenLayout:
        size = config.patch_size
        ph, pw = (size, size) if isinstance(size, int) else size[-2:]
        height, width = values["hidden_states"].shape[-2:]
        image = visual_span("image", (1, height // ph, width // pw))
        return TokenLayout(tuple(image if part == "image" else TEXT for part in order))

    return layout


def image_spans(ids: torch.Tensor) -> tuple[Span, ...]:
    """Return the spans of an ``img_ids`` table.

    Args:
        ids: (S, n) or (B, S, n); columns kind, y, x. Kind 0 is the image, every other kind one reference image.
    """
    if ids.ndim == 3:
        ids = ids[0]
    kinds, counts = torch.unique_consecutive(ids[:, 0].detach().cpu(), return_counts=True)
    spans, start = [], 0
    for kind, count in zip(kinds.tolist(), counts.tolist()):
        width = int(torch.unique(ids[start : start + count, 2]).numel())
        spans.append(visual_span("reference" if kind else "image", (1, count // width, width)))
        start += count
    return tuple(spans)


def _by_ids(config: Any, values: dict[str, Any]) -> TokenLayout:
    """img_ids: (S_image, n); the sequence is [text, image, reference, ...]."""
    return TokenLayout((TEXT, *image_spans(values["img_ids"])))


def _qwen(config: Any, values: dict[str, Any]) -> TokenLayout:
    """img_shapes: per sample a list of (T, H, W), the generated image first; the sequence is [text, image, ...]."""
    first, *others = values["img_shapes"]
    shapes = [first] if isinstance(first, tuple) else first
    if any((other if isinstance(other, list) else [other]) != shapes for other in others if isinstance(first, list)):
        raise ValueError("samples of different sizes in one batch")
    image, *references = shapes
    return TokenLayout(
        (TEXT, visual_span("image", image), *(visual_span("reference", shape) for shape in references))
    )


def _lumina2(config: Any, values: dict[str, Any]) -> TokenLayout:
    """encoder_attention_mask: (B, S_text); every sample's own text comes first, without its padding."""
    lengths = values["encoder_attention_mask"].sum(1).tolist()
    if len(set(lengths)) > 1:
        raise ValueError("samples with captions of different lengths in one batch")
    return TokenLayout((Span("text", int(lengths[0])), *_order("image")(config, values).spans))


def _omnigen(config: Any, values: dict[str, Any]) -> TokenLayout:
    """The sequence is [instruction with its images, time, image]."""
    return TokenLayout((TEXT, Span("time", 1), *_order("image")(config, values).spans))


def _hidream(config: Any, values: dict[str, Any]) -> TokenLayout:
    """Square latents stand alone, others are padded to the longest sequence of the model; text comes last."""
    latents = values["hidden_states"]
    if latents.ndim == 3:
        height, width = (int(side) for side in values["img_sizes"][0])
        length = latents.shape[1]
    else:
        height, width = (side // config.patch_size for side in latents.shape[-2:])
        longest = math.prod(config.max_resolution) // config.patch_size**2
        length = height * width if latents.shape[-2] == latents.shape[-1] else longest
    return TokenLayout((visual_span("image", (1, height, width)), Span("padding", length - height * width), TEXT))


def _z_image(config: Any, values: dict[str, Any]) -> TokenLayout:
    """x: list of (C, T, H, W) latents; the sequence is [image, padding, text]. No lists of references."""
    latents = values["x"]
    if isinstance(latents[0], list):
        raise ValueError("reference images in the Z-Image sequence")
    if any(sample.shape != latents[0].shape for sample in latents):
        raise ValueError("samples of different sizes in one batch")
    _, frames, height, width = latents[0].shape
    patch, frame_patch = values["patch_size"] or 2, values["f_patch_size"] or 1
    image = visual_span("image", (frames // frame_patch, height // patch, width // patch))
    return TokenLayout((image, Span("padding", -(image.length or 0) % _Z_IMAGE_MULTIPLE), TEXT))


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
    ),
    Family(
        name="flux-2",
        models="Flux.2 dev, klein",
        transformers=("Flux2Transformer2DModel",),
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        forward_args=("img_ids",),
        layout=_by_ids,
        cfg=EMBEDDED,
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
    ),
    Family(
        name="sd3",
        models="Stable Diffusion 3, 3.5 (medium with its second attention)",
        transformers=("SD3Transformer2DModel",),
        layers=("transformer_blocks.*.attn", "transformer_blocks.*.attn2"),
        forward_args=("hidden_states", "skip_layers"),
        layout=_order("image", "text"),
        cfg=replace(BATCHED, own="skip_layers", bent_by=("skip_guidance_layers",)),
    ),
    Family(
        name="pixart",
        models="PixArt-alpha, PixArt-Sigma",
        transformers=("PixArtTransformer2DModel",),
        layers=("transformer_blocks.*.attn1",),
        cross_layers=("transformer_blocks.*.attn2",),
        forward_args=("hidden_states",),
        layout=_order("image"),
        cfg=replace(BATCHED, scale="", argument="guidance_scale"),
    ),
    Family(
        name="dit",
        models="DiT (class to image), MoH-DiT",
        transformers=("DiTTransformer2DModel",),
        layers=("transformer_blocks.*.attn1",),
        forward_args=("hidden_states",),
        layout=_order("image"),
        cfg=replace(BATCHED, order=("cond", "uncond"), scale="", argument="guidance_scale"),
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
        name="omnigen",
        models="OmniGen v1",
        transformers=("OmniGenTransformer2DModel",),
        layers=("layers.*.self_attn",),
        forward_args=("hidden_states",),
        layout=_omnigen,
        cfg=CFGRule("batched", ("cond", "uncond"), ("cond", "uncond", "image")),
        time_grows=True,
        mask_rule="visual-row",
    ),
    Family(
        name="lumina-2",
        models="Lumina-Image 2.0",
        transformers=("Lumina2Transformer2DModel",),
        layers=("layers.*.attn",),
        forward_args=("hidden_states", "encoder_attention_mask"),
        layout=_lumina2,
        cfg=CFGRule("separate", ("cond", "uncond"), negated=True, rescaled=True),
        time_grows=True,
    ),
    Family(
        name="hidream",
        models="HiDream-I1",
        transformers=("HiDreamImageTransformer2DModel",),
        layers=("double_stream_blocks.*.attn1", "single_stream_blocks.*.attn1"),
        forward_args=("hidden_states", "img_sizes"),
        layout=_hidream,
        cfg=replace(BATCHED, negated=True),
        batch_axes={"encoder_hidden_states_llama3": 1},
        timestep="timesteps",
    ),
    Family(
        name="z-image",
        models="Z-Image",
        transformers=("ZImageTransformer2DModel",),
        layers=("layers.*.attention",),
        forward_args=("x", "patch_size", "f_patch_size"),
        layout=_z_image,
        cfg=CFGRule(
            "batched", ("cond", "uncond"), negated=True, rescaled_by=("cfg_normalization",), scale_offset=1.0, off=0.0
        ),
        timestep="t",
        time_grows=True,
        batch_axes={"x": "list", "cap_feats": "list"},
    ),
    Family(
        name="cogview-4",
        models="CogView4",
        transformers=("CogView4Transformer2DModel",),
        layers=("transformer_blocks.*.attn1",),
        forward_args=("hidden_states",),
        layout=_order("text", "image"),
    ),
    Family(
        name="hunyuan-image",
        models="HunyuanImage 2.1",
        transformers=("HunyuanImageTransformer2DModel",),
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        forward_args=("hidden_states",),
        layout=_order("image", "text"),
    ),
    Family(
        name="hunyuan-dit",
        models="HunyuanDiT",
        transformers=("HunyuanDiT2DModel",),
        layers=("blocks.*.attn1",),
        cross_layers=("blocks.*.attn2",),
        forward_args=("hidden_states",),
        layout=_order("image"),
        cfg=RESCALABLE,
        batch_axes={"image_rotary_emb": None},
        block_chain=False,
    ),
    Family(
        name="auraflow",
        models="AuraFlow",
        transformers=("AuraFlowTransformer2DModel",),
        layers=("joint_transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        forward_args=("hidden_states",),
        layout=_order("text", "image"),
        cfg=BATCHED,
    ),
    Family(
        name="sana",
        models="Sana",
        transformers=("SanaTransformer2DModel",),
        layers=(),
        cross_layers=("transformer_blocks.*.attn2",),
        forward_args=(),
        layout=_order("image"),
        refused="its self attention is linear: there is no softmax map to thin out",
    ),
)
