"""Image families: where the (1, H, W) grid comes from and in which order the parts of the sequence stand."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dit_attn.processors.attach.families import Family
from dit_attn.processors.core.cfg import BATCHED, RESCALABLE, SEPARATE, CFGRule
from dit_attn.processors.core.tokens import EmbeddedImage, Span, TokenLayout, visual_span

TEXT = Span("text", None)
_Z_IMAGE_MULTIPLE = 32  # Z-Image pads every part of its sequence to a multiple of this


def order(*parts: str) -> Callable[[Any, dict[str, Any]], TokenLayout]:
    """Layout with the given parts: ``"image"`` from (B, C, [T,] H, W) latents, ``"text"`` what remains."""

    def layout(config: Any, values: dict[str, Any]) -> TokenLayout:
        size = config.patch_size
        ph, pw = (size, size) if isinstance(size, int) else size[-2:]
        height, width = values["hidden_states"].shape[-2:]
        image = visual_span("image", (1, height // ph, width // pw))
        return TokenLayout(tuple(image if part == "image" else TEXT for part in parts))

    return layout


def _lumina2(config: Any, values: dict[str, Any]) -> TokenLayout:
    """encoder_attention_mask: (B, S_text); every sample's own text comes first, without its padding."""
    lengths = values["encoder_attention_mask"].sum(1).tolist()
    if len(set(lengths)) > 1:
        raise ValueError("samples with captions of different lengths in one batch")
    return TokenLayout((Span("text", int(lengths[0])), *order("image")(config, values).spans))


def _omnigen(config: Any, values: dict[str, Any]) -> TokenLayout:
    """The sequence is [instruction with its images, time, image]; input_image_sizes: {row: [[start, stop], ...]}."""
    images = values["input_image_sizes"] or {}
    places = [(int(row), int(a), int(b)) for row in images for a, b in images[row]]
    sides = (latents.shape[-2:] for latents in values["input_img_latents"] or ())
    grids = ((1, height // config.patch_size, width // config.patch_size) for height, width in sides)
    embedded = tuple(EmbeddedImage(*place, grid) for place, grid in zip(places, grids, strict=True))
    return TokenLayout((TEXT, Span("time", 1), *order("image")(config, values).spans), embedded)


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


def _joyimage(config: Any, values: dict[str, Any]) -> TokenLayout:
    """(B, [N,] C, T, H, W) latents of N items; the last, which is made, comes first, then the others and text."""
    latents, (pt, ph, pw) = values["hidden_states"], config.patch_size
    frames, height, width = latents.shape[-3:]
    grid = (frames // pt, height // ph, width // pw)
    references = latents.shape[1] - 1 if latents.ndim == 6 else 0
    return TokenLayout((visual_span("image", grid), *[visual_span("reference", grid)] * references, TEXT))


def _fibo2(config: Any, values: dict[str, Any]) -> TokenLayout:
    """The sequence is [gist of the text, image, context images]; gist of different lengths would come last."""
    mask = values["encoder_attention_mask"]
    if mask is not None and len(set(mask.sum(1).tolist())) > 1:
        raise ValueError("samples with captions of different lengths in one batch")
    size = config.patch_size
    grids = [(1, part.shape[-2] // size, part.shape[-1] // size) for part in values["context_latents"] or ()]
    image = order("text", "image")(config, values)
    return TokenLayout((*image.spans, *(visual_span("reference", grid) for grid in grids)))


FAMILIES = (
    Family(
        name="sd3",
        models="Stable Diffusion 3, 3.5 (medium with its second attention)",
        transformers=("SD3Transformer2DModel",),
        layers=("transformer_blocks.*.attn", "transformer_blocks.*.attn2"),
        forward_args=("hidden_states", "skip_layers"),
        layout=order("image", "text"),
        cfg=replace(BATCHED, own="skip_layers", bent_by=("skip_guidance_layers",)),
    ),
    Family(
        name="pixart",
        models="PixArt-alpha, PixArt-Sigma",
        transformers=("PixArtTransformer2DModel",),
        layers=("transformer_blocks.*.attn1",),
        cross_layers=("transformer_blocks.*.attn2",),
        forward_args=("hidden_states",),
        layout=order("image"),
        cfg=replace(BATCHED, scale="", argument="guidance_scale"),
    ),
    Family(
        name="omnigen",
        models="OmniGen v1",
        transformers=("OmniGenTransformer2DModel",),
        layers=("layers.*.self_attn",),
        forward_args=("hidden_states", "input_image_sizes", "input_img_latents"),
        layout=_omnigen,
        cfg=CFGRule("batched", ("cond", "uncond"), ("cond", "uncond", "image")),
        time_grows=True,
        mask_rule="visual-row",
        refused_methods={"nag": "its text is words in one sequence with everything else"},
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
        layout=order("text", "image"),
    ),
    Family(
        name="cogview-3-plus",
        models="CogView3-Plus",
        transformers=("CogView3PlusTransformer2DModel",),
        layers=("transformer_blocks.*.attn1",),
        forward_args=("hidden_states",),
        layout=order("text", "image"),
        cfg=BATCHED,
        rotary=False,
    ),
    Family(
        name="hunyuan-image",
        models="HunyuanImage 2.1",
        transformers=("HunyuanImageTransformer2DModel",),
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        forward_args=("hidden_states",),
        layout=order("image", "text"),
    ),
    Family(
        name="hunyuan-dit",
        models="HunyuanDiT",
        transformers=("HunyuanDiT2DModel",),
        layers=("blocks.*.attn1",),
        cross_layers=("blocks.*.attn2",),
        forward_args=("hidden_states",),
        layout=order("image"),
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
        layout=order("text", "image"),
        cfg=BATCHED,
    ),
    Family(
        name="ernie-image",
        models="ERNIE-Image, ERNIE-Image Turbo",
        transformers=("ErnieImageTransformer2DModel",),
        layers=("layers.*.self_attention",),
        forward_args=("hidden_states",),
        layout=order("image", "text"),
        cfg=BATCHED,
        batch_axes={"x": 1, "temb": 1},  # of its blocks, whose tokens are (S, B, C)
        latent_pixels=16,
    ),
    Family(
        name="fibo-2",
        models="Bria FIBO 2",
        transformers=("BriaFibo2Transformer2DModel",),
        layers=("layers.*.attention",),
        forward_args=("hidden_states", "context_latents", "encoder_attention_mask"),
        layout=_fibo2,
    ),
    Family(
        name="joyimage-edit",
        models="JoyImage-Edit",
        transformers=("JoyImageEditTransformer3DModel",),
        layers=("double_blocks.*.attn",),
        forward_args=("hidden_states",),
        layout=_joyimage,
        cfg=replace(SEPARATE, rescaled=True),
    ),
    Family(
        name="lumina-next",
        models="Lumina-Next (Lumina-T2X)",
        transformers=("LuminaNextDiT2DModel",),
        layers=("layers.*.attn1",),
        cross_layers=("layers.*.attn2",),
        forward_args=("hidden_states",),
        layout=order("image"),
        # Three of the four channels are guided, so that no one scale divides an update.
        cfg=CFGRule("batched", ("cond", "uncond"), negated=True, scale=""),
        time_grows=True,
        mask_rule="visual-row",
        batch_axes={"image_rotary_emb": None},
    ),
    Family(
        name="dit",
        models="DiT (class-conditional)",
        transformers=("DiTTransformer2DModel",),
        layers=("transformer_blocks.*.attn1",),
        forward_args=("hidden_states",),
        layout=order("image"),
        cfg=CFGRule("batched", ("cond", "uncond"), scale="", argument="guidance_scale"),
        refused_methods={"nag": "it is given a class and no text"},
    ),
    Family(
        name="sana",
        models="Sana",
        transformers=("SanaTransformer2DModel",),
        layers=(),
        cross_layers=("transformer_blocks.*.attn2",),
        forward_args=(),
        layout=order("image"),
        refused="its self attention is linear: there is no softmax map to thin out",
    ),
)
