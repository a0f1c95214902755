"""Video families: where the (T, H, W) grid comes from and in which order the parts of the sequence stand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from dit_attn.processors.clock import BATCHED
from dit_attn.processors.families import Family
from dit_attn.processors.tokens import Span, TokenLayout, visual_span

TEXT = Span("text", None)


def _patches(config: Any) -> tuple[int, int, int]:
    """(T, H, W) latents per token, from either way a configuration writes it."""
    size = config.patch_size
    if isinstance(size, int):
        return (config.get("patch_size_t") or 1, size, size)
    return (size[0], size[1], size[2])


def grid_of(config: Any, values: dict[str, Any], axes: tuple[int, int, int] = (2, 3, 4)) -> tuple[int, int, int]:
    """(T, H, W) tokens of 5-D latents ``hidden_states``; ``axes`` are its frame, height and width axes."""
    latents, patch = values["hidden_states"], _patches(config)
    t, h, w = (latents.shape[axis] // step for axis, step in zip(axes, patch))
    return (t, h, w)


def _order(*order: str, axes: tuple[int, int, int] = (2, 3, 4)) -> Callable[[Any, dict[str, Any]], TokenLayout]:
    """Layout of a sequence with the given parts: ``"video"`` from the 5-D latents, ``"text"`` what remains."""

    def layout(config: Any, values: dict[str, Any]) -> TokenLayout:
        video = visual_span("video", grid_of(config, values, axes))
        return TokenLayout(tuple(video if part == "video" else TEXT for part in order))

    return layout


def _named_grid(config: Any, values: dict[str, Any]) -> TokenLayout:
    """Packed latents (B, S, C) whose grid comes as ``num_frames``, ``height``, ``width`` in latents.

    Conditioning tokens, where a pipeline adds them, stand before the video.
    """
    grid = (values["num_frames"], values["height"], values["width"])
    pt, ph, pw = _patches(config)
    video = visual_span("video", (grid[0] // pt, grid[1] // ph, grid[2] // pw))
    return TokenLayout((Span("reference", None), video))


FAMILIES = (
    Family(
        name="wan",
        models="Wan 2.1, Wan 2.2 (T2V, I2V, A14B, TI2V-5B), VACE, ChronoEdit",
        transformers=("WanTransformer3DModel", "WanVACETransformer3DModel", "ChronoEditTransformer3DModel"),
        layers=("blocks.*.attn1",),
        reads=("hidden_states",),
        layout=_order("video"),
    ),
    Family(
        name="skyreels-v2",
        models="SkyReels V2",
        transformers=("SkyReelsV2Transformer3DModel",),
        layers=("blocks.*.attn1",),
        reads=("hidden_states",),
        layout=_order("video"),
    ),
    Family(
        name="hunyuan-video",
        models="HunyuanVideo",
        transformers=("HunyuanVideoTransformer3DModel",),
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        reads=("hidden_states",),
        layout=_order("video", "text"),
    ),
    Family(
        name="hunyuan-video-1.5",
        models="HunyuanVideo 1.5",
        transformers=("HunyuanVideo15Transformer3DModel",),
        layers=("transformer_blocks.*.attn",),
        reads=("hidden_states",),
        layout=_order("video", "text"),
        mask_rule="visual-row",
    ),
    Family(
        name="cogvideox",
        models="CogVideoX 2b, 5b, 1.5-5b (T2V, I2V)",
        transformers=("CogVideoXTransformer3DModel",),
        layers=("transformer_blocks.*.attn1",),
        reads=("hidden_states",),
        layout=_order("text", "video", axes=(1, 3, 4)),
        guidance=BATCHED,
    ),
    Family(
        name="ltx-video",
        models="LTX-Video",
        transformers=("LTXVideoTransformer3DModel",),
        layers=("transformer_blocks.*.attn1",),
        reads=("num_frames", "height", "width"),
        layout=_named_grid,
        guidance=BATCHED,
    ),
    Family(
        name="ltx-2",
        models="LTX-2",
        transformers=("LTX2VideoTransformer3DModel",),
        layers=("transformer_blocks.*.attn1",),
        reads=("num_frames", "height", "width"),
        layout=_named_grid,
        guidance=BATCHED,
    ),
    Family(
        name="mochi",
        models="Mochi 1",
        transformers=("MochiTransformer3DModel",),
        layers=("transformer_blocks.*.attn1",),
        reads=("hidden_states",),
        layout=_order("video", "text"),
        guidance=BATCHED,
        time_grows=True,
    ),
    Family(
        name="allegro",
        models="Allegro",
        transformers=("AllegroTransformer3DModel",),
        layers=("transformer_blocks.*.attn1",),
        reads=("hidden_states",),
        layout=_order("video"),
        guidance=BATCHED,
    ),
    Family(
        name="cosmos",
        models="Cosmos 1, Cosmos Predict 2",
        transformers=("CosmosTransformer3DModel",),
        layers=("transformer_blocks.*.attn1",),
        reads=("hidden_states",),
        layout=_order("video"),
    ),
    Family(
        name="kandinsky-5",
        models="Kandinsky 5 (video, image)",
        transformers=("Kandinsky5Transformer3DModel",),
        layers=("visual_transformer_blocks.*.self_attention",),
        reads=("hidden_states",),
        layout=_order("video", axes=(1, 2, 3)),
    ),
    Family(
        name="easyanimate",
        models="EasyAnimate 5.1",
        transformers=("EasyAnimateTransformer3DModel",),
        layers=("transformer_blocks.*.attn1",),
        reads=("hidden_states",),
        layout=_order("text", "video"),
        guidance=BATCHED,
    ),
    Family(
        name="sana-video",
        models="Sana-Video",
        transformers=("SanaVideoTransformer3DModel",),
        layers=(),
        reads=(),
        layout=_order("video"),
        refused="its self attention is linear: there is no softmax map to thin out",
    ),
)
