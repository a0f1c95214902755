"""Video families: where the (T, H, W) grid comes from and in which order the parts of the sequence stand."""

from __future__ import annotations

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


def _patches(config: Any) -> tuple[int, int, int]:
    """(T, H, W) latents per token, from either way a configuration writes it."""
    size = config.patch_size
    if isinstance(size, int):
        return (config.get("patch_size_t") or 1, size, size)
    return (size[0], size[1], size[2])


def grid_of(config: Any, values: dict[str, Any], axes: tuple[int, int, int] = (2, 3, 4)) -> tuple[int, int, int]:
    """Return the (T, H, W) tokens of 5-D latents ``hidden_states``; ``axes`` are its frame, height and width axes."""
    latents, patch = values["hidden_states"], _patches(config)
    t, h, w = (latents.shape[axis] // step for axis, step in zip(axes, patch))
    return (t, h, w)


def order(*parts: str, axes: tuple[int, int, int] = (2, 3, 4)) -> Callable[[Any, dict[str, Any]], TokenLayout]:
    """Return the layout with the given parts: ``"video"`` from the 5-D latents, ``"text"`` what remains."""

    def layout(config: Any, values: dict[str, Any]) -> TokenLayout:
        video = visual_span("video", grid_of(config, values, axes))
        return TokenLayout(tuple(video if part == "video" else TEXT for part in parts))

    return layout


def _named_span(config: Any, values: dict[str, Any]) -> Span:
    """The video span of packed latents (B, S, C) whose grid comes as ``num_frames``, ``height``, ``width``."""
    pt, ph, pw = _patches(config)
    return visual_span("video", (values["num_frames"] // pt, values["height"] // ph, values["width"] // pw))


def coordinate_spans(coords: torch.Tensor, *, references: bool) -> tuple[Span, ...]:
    """Return the spans of packed latents whose grid follows from coordinates alone.

    Time rises from frame to frame inside the video; frames that condition it stand before it and end where time drops.

    Args:
        coords: (B, 3, S) or (B, 3, S, 2) frame, row and column of every token, the last axis its two bounds.
        references: whether conditioning frames may stand before the video.

    Raises:
        ValueError: the coordinates are no frames of one size, or time drops where nothing may stand before the video.
    """
    points = (coords[0, ..., 0] if coords.ndim == 4 else coords[0]).detach().cpu()
    height, width = (int(torch.unique(axis).numel()) for axis in points[1:])
    if points.shape[1] % (height * width):
        raise ValueError("video coordinates that are not frames of one size")
    times, rows, columns = points.reshape(3, -1, height, width)
    frames = times[:, 0, 0]
    regular = (times == frames[:, None, None]).all() and (rows == rows[:1, :, :1]).all()
    if not regular or not (columns == columns[:1, :1]).all():
        raise ValueError("video coordinates that are not in the order of frames, rows and columns")
    drops = torch.nonzero(frames[1:] <= frames[:-1]).flatten().tolist()
    start = drops[-1] + 1 if drops else 0
    if start and not references:
        raise ValueError("conditioning frames at an unknown place of the sequence")
    video = visual_span("video", (len(frames) - start, height, width))
    return (visual_span("reference", (start, height, width)), video) if start else (video,)


def _ltx(config: Any, values: dict[str, Any]) -> TokenLayout:
    """Coordinates win over the named grid: the long-video pipeline names a grid of one token besides them.

    The condition pipeline names no grid and puts its conditioning frames before the video.
    """
    coords = values["video_coords"]
    if coords is None:
        return TokenLayout((_named_span(config, values),))
    return TokenLayout(coordinate_spans(coords, references=values["num_frames"] is None))


def _ltx_2(config: Any, values: dict[str, Any]) -> TokenLayout:
    """Key frames and reference videos are appended to the video; pipelines with tiles name no grid."""
    if values["num_frames"] is None:
        return TokenLayout(coordinate_spans(values["video_coords"], references=False))
    return TokenLayout((_named_span(config, values), Span("reference", None)))


WAN_CALLS = {"add_k_proj": ("image", "cross")}  # image-to-video checkpoints of Wan 2.1


def _mochi_frequencies(model: Any, grid: tuple[int, int, int]) -> torch.Tensor:
    """Learned, (3, heads, columns) per unit; the area of a frame is the same number of units for every size."""
    _, height, width = grid
    spacing = (model.rope.target_area / (height * width)) ** 0.5
    frequencies = model.pos_frequencies.detach().double().flatten(1)
    return frequencies * frequencies.new_tensor([[1.0], [spacing], [spacing]])


FAMILIES = (
    Family(
        name="wan",
        models="Wan 2.1, Wan 2.2 (T2V, I2V, A14B, TI2V-5B), VACE, ChronoEdit",
        transformers=("WanTransformer3DModel", "WanVACETransformer3DModel", "ChronoEditTransformer3DModel"),
        layers=("blocks.*.attn1",),
        side_layers=("vace_blocks.*.attn1",),
        cross_layers=("blocks.*.attn2", "vace_blocks.*.attn2"),
        added_calls=WAN_CALLS,
        forward_args=("hidden_states",),
        layout=order("video"),
        batch_axes={"control_hidden_states_scale": None},  # VACE: one number per control layer
    ),
    Family(
        name="skyreels-v2",
        models="SkyReels V2",
        transformers=("SkyReelsV2Transformer3DModel",),
        layers=("blocks.*.attn1",),
        cross_layers=("blocks.*.attn2",),
        added_calls=WAN_CALLS,
        forward_args=("hidden_states",),
        layout=order("video"),
    ),
    Family(
        name="hunyuan-video",
        models="HunyuanVideo",
        transformers=("HunyuanVideoTransformer3DModel",),
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        forward_args=("hidden_states",),
        layout=order("video", "text"),
        cfg=EMBEDDED,
    ),
    Family(
        name="hunyuan-video-1.5",
        models="HunyuanVideo 1.5",
        transformers=("HunyuanVideo15Transformer3DModel",),
        layers=("transformer_blocks.*.attn",),
        forward_args=("hidden_states",),
        layout=order("video", "text"),
        mask_rule="visual-row",
    ),
    Family(
        name="cogvideox",
        models="CogVideoX 2b, 5b, 1.5-5b (T2V, I2V), ConsisID",
        transformers=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
        layers=("transformer_blocks.*.attn1",),
        forward_args=("hidden_states",),
        layout=order("text", "video", axes=(1, 3, 4)),
        cfg=replace(BATCHED, bent_by=("use_dynamic_cfg",)),
        batch_axes={"image_rotary_emb": None},
    ),
    Family(
        name="ltx-video",
        models="LTX-Video",
        transformers=("LTXVideoTransformer3DModel",),
        layers=("transformer_blocks.*.attn1",),
        cross_layers=("transformer_blocks.*.attn2",),
        forward_args=("num_frames", "height", "width", "video_coords"),
        layout=_ltx,
        cfg=RESCALABLE,
        latent_pixels=32,
        latent_frames=8,
    ),
    Family(
        name="ltx-2",
        models="LTX-2",
        transformers=("LTX2VideoTransformer3DModel",),
        layers=("transformer_blocks.*.attn1",),
        cross_layers=("transformer_blocks.*.attn2",),
        forward_args=("num_frames", "height", "width", "video_coords"),
        layout=_ltx_2,
        cfg=replace(BATCHED, scale=""),  # image and sound have scales of their own
        latent_pixels=32,
        latent_frames=8,
    ),
    Family(
        name="mochi",
        models="Mochi 1",
        transformers=("MochiTransformer3DModel",),
        layers=("transformer_blocks.*.attn1",),
        forward_args=("hidden_states",),
        layout=order("video", "text"),
        cfg=BATCHED,
        time_grows=True,
        refused_methods={"nag": "it attends to the samples of a batch one by one, so that two texts never meet"},
        rotary_frequencies=_mochi_frequencies,
        latent_frames=6,
    ),
    Family(
        name="allegro",
        models="Allegro",
        transformers=("AllegroTransformer3DModel",),
        layers=("transformer_blocks.*.attn1",),
        cross_layers=("transformer_blocks.*.attn2",),
        forward_args=("hidden_states",),
        layout=order("video"),
        cfg=BATCHED,
        batch_axes={"image_rotary_emb": None},
    ),
    Family(
        name="cosmos",
        models="Cosmos 1, Cosmos Predict 2, 2.5",
        transformers=("CosmosTransformer3DModel",),
        layers=("transformer_blocks.*.attn1",),
        cross_layers=("transformer_blocks.*.attn2",),
        added_calls={"q_img": ("cross", "image")},  # Predict 2.5
        forward_args=("hidden_states",),
        layout=order("video"),
        cfg=CFGRule("separate", ("cond", "uncond"), scale_offset=1.0),
        batch_axes={"padding_mask": None},
    ),
    Family(
        name="kandinsky-5",
        models="Kandinsky 5 (video, image)",
        transformers=("Kandinsky5Transformer3DModel",),
        layers=("visual_transformer_blocks.*.self_attention",),
        cross_layers=("visual_transformer_blocks.*.cross_attention",),
        forward_args=("hidden_states",),
        layout=order("video", axes=(1, 2, 3)),
        batch_axes={"visual_rope_pos": None, "text_rope_pos": None},
    ),
    Family(
        name="anyflow",
        models="AnyFlow (bidirectional)",
        transformers=("AnyFlowTransformer3DModel",),
        layers=("blocks.*.attn1",),
        cross_layers=("blocks.*.attn2",),
        added_calls=WAN_CALLS,
        forward_args=("hidden_states",),
        layout=order("video", axes=(1, 3, 4)),
        cfg=BATCHED,
    ),
    Family(
        name="easyanimate",
        models="EasyAnimate 5.1",
        transformers=("EasyAnimateTransformer3DModel",),
        layers=("transformer_blocks.*.attn1",),
        forward_args=("hidden_states",),
        layout=order("text", "video"),
        cfg=RESCALABLE,
    ),
    Family(
        name="sana-video",
        models="Sana-Video",
        transformers=("SanaVideoTransformer3DModel",),
        layers=(),
        cross_layers=("transformer_blocks.*.attn2",),
        forward_args=(),
        layout=order("video"),
        refused="its self attention is linear: there is no softmax map to thin out",
    ),
)
