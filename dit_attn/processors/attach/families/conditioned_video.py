"""Video families whose sequence has given frames, sound or earlier frames besides the video."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from dit_attn.processors.attach.families import Family, LayoutFunction
from dit_attn.processors.attach.families.video import (
    EMBEDDED,
    TEXT,
    WAN_CALLS,
    coordinate_spans,
    grid_of,
    order,
)
from dit_attn.processors.core.cfg import SEPARATE, CFGRule
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span

DISTILLED = CFGRule("separate", ("cond",), scale="")  # one call a step, guided by the weights
# Arguments of MiniMax-H3 and its blocks that all rows of the batch share.
_OF_ROWS = (
    *("timestep", "timestep_indices", "token_tags", "position_ids", "video_indices", "audio_indices", "text_indices"),
    *("temb", "adaln_indices", "rotary_emb"),
)
_PACKED = ("text", "condition", "audio")  # kinds of the parts of MiniMax-H3's sequence before the video
# Strides (T, H, W) of the patches of earlier frames, coarsest and first in the sequence.
_STRIDES = ((4, 8, 8), (2, 4, 4), (1, 2, 2))
_FRAMEPACK = ("latents_history_4x", "latents_history_2x", "latents_clean")
_HELIOS = ("latents_history_long", "latents_history_mid", "latents_history_short")


def _first_frame_reference(config: Any, values: dict[str, Any]) -> TokenLayout:
    """5-D latents whose first frame is the image of the character; the video follows it."""
    t, h, w = grid_of(config, values)
    return TokenLayout((visual_span("reference", (1, h, w)), visual_span("video", (t - 1, h, w))))


def _with_indices(names: tuple[str, ...]) -> tuple[str, ...]:
    """Names of the arguments with earlier frames, and of those with their places in time."""
    return tuple(part for name in names for part in (name, f"indices_{name}"))


def _history(names: tuple[str, ...], *rest: Span) -> LayoutFunction:
    """The sequence is [history in coarse to fine patches, padded up, video, rest]."""

    def layout(config: Any, values: dict[str, Any]) -> TokenLayout:
        spans = []
        for name, strides in zip(names, _STRIDES):
            latents, indices = values[name], values[f"indices_{name}"]
            if latents is not None and indices is not None:
                t, h, w = (-(-size // stride) for size, stride in zip(latents.shape[2:], strides))
                spans.append(visual_span("reference", (t, h, w)))
        return TokenLayout((*spans, visual_span("video", grid_of(config, values)), *rest))

    return layout


def _helios(config: Any, values: dict[str, Any]) -> TokenLayout:
    """The sequence is [history, video]; the history has no cross attention in models with guided cross attention."""
    layout = _history(_HELIOS)(config, values)
    alone = TokenLayout(layout.spans[-1:])
    return replace(layout, others=(("blocks.*.attn2", alone),) if config.guidance_cross_attn else ())


def _motif(config: Any, values: dict[str, Any]) -> TokenLayout:
    """The sequence is [video, image embedding and text]; that of its decoder [video, the encoder's video]."""
    video, first = order("video", "text")(config, values).spans[0], config.num_single_layers - config.num_decoder_layers
    decoder = TokenLayout((video, Span("condition", None)))
    names = (f"single_transformer_blocks.{i}.attn" for i in range(first, config.num_single_layers))
    return TokenLayout((video, TEXT), others=tuple((name, decoder) for name in names))


def _kandinsky6(config: Any, values: dict[str, Any]) -> TokenLayout:
    """(B, T, H, W, C) latents; a given first frame stands last, with 1 in the last channel, its mask."""
    t, h, w = grid_of(config, values, (1, 2, 3))
    if config.visual_cond and values["hidden_states"][0, -1, 0, 0, -1] == 1.0:
        return TokenLayout((visual_span("video", (t - 1, h, w)), visual_span("reference", (1, h, w))))
    return TokenLayout((visual_span("video", (t, h, w)),))


def _minimax_h3(config: Any, values: dict[str, Any]) -> TokenLayout:
    """The packed sequence is [text, given frames and references, sound, video], told by the rows of each.

    Sound stands between the given frames and the video, so that no method can take them for its neighbors.
    """
    positions = values["position_ids"]
    kinds = torch.full(positions.shape[:1], len(_PACKED) - 1)
    for number, name in enumerate(("text_indices", "video_indices")):
        kinds[values[name].cpu()] = number
    found, counts = torch.unique_consecutive(kinds, return_counts=True)
    spans = [Span(_PACKED[kind], count) for kind, count in zip(found.tolist(), counts.tolist())]
    last = spans.pop()
    if last.kind != "condition":
        raise ValueError("the sequence does not end with the video")
    return TokenLayout((*spans, *coordinate_spans(positions[-(last.length or 0) :].T[None], references=True)))


def _cosmos3(config: Any, values: dict[str, Any]) -> TokenLayout:
    """The keys are [text, video, sound, action], the queries all but the text.

    vision_token_shapes: a (T, H, W) for every clip, those without noisy frames are references; und_len: of the text.
    """
    clips = zip(values["vision_token_shapes"], values["vision_noisy_frame_indexes"], strict=True)
    spans = [visual_span("video" if len(noisy) else "reference", shape) for shape, noisy in clips]
    text = Span("text", values["und_len"])
    return TokenLayout((text, *spans, Span("audio", None)), keys_alone=("text",), apart=("text",))


FAMILIES = (
    Family(
        name="wan-animate",
        models="Wan 2.2 Animate",
        transformers=("WanAnimateTransformer3DModel",),
        layers=("blocks.*.attn1",),
        cross_layers=("blocks.*.attn2",),
        added_calls=WAN_CALLS,
        forward_args=("hidden_states",),
        layout=_first_frame_reference,
    ),
    Family(
        name="framepack",
        models="HunyuanVideo Framepack",
        transformers=("HunyuanVideoFramepackTransformer3DModel",),
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        forward_args=("hidden_states", *_with_indices(_FRAMEPACK)),
        layout=_history(_FRAMEPACK, TEXT),
        cfg=EMBEDDED,
        batch_axes={f"indices_{name}": None for name in ("latents", *_FRAMEPACK)},
    ),
    Family(
        name="kandinsky-6",
        models="Kandinsky 6 (video with sound)",
        transformers=("Kandinsky6Transformer3DModel",),
        layers=("visual_transformer_blocks.*.video_dec_block.self_attention",),
        cross_layers=("visual_transformer_blocks.*.video_dec_block.cross_attention",),
        forward_args=("hidden_states",),
        layout=_kandinsky6,
        batch_axes={"visual_rope_pos": None, "vis_rope": None, "aud_rope": None},
    ),
    Family(
        name="minimax-h3",
        models="MiniMax-H3 (text, first and last frame, references, sound)",
        transformers=("MiniMaxH3Transformer3DModel",),
        layers=("transformer_blocks.*.attn",),
        forward_args=("hidden_states", "position_ids", "text_indices", "video_indices"),
        layout=_minimax_h3,
        cfg=DISTILLED,
        time_grows=True,
        batch_axes=dict.fromkeys(_OF_ROWS),
        latent_pixels=16,
        chunk_frames=17,
    ),
    Family(
        name="helios",
        models="Helios base, mid, distilled",
        transformers=("HeliosTransformer3DModel",),
        layers=("blocks.*.attn1",),
        cross_layers=("blocks.*.attn2",),
        forward_args=("hidden_states", *_with_indices(_HELIOS)),
        layout=_helios,
        cfg=replace(SEPARATE, rescaled_by=("use_zero_init",), bent_by=("use_zero_init",)),
    ),
    Family(
        name="motif-video",
        models="Motif-Video (text, first frame)",
        transformers=("MotifVideoTransformer3DModel",),
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        forward_args=("hidden_states",),
        layout=_motif,
        cfg=replace(SEPARATE, scale=""),  # a guider object guides
        batch_axes={"image_rotary_emb": None},
        block_chain=False,  # its decoder starts from the first tokens again
    ),
    Family(
        name="cosmos-3",
        models="Cosmos 3 (text, image, video; sound, action)",
        transformers=("Cosmos3OmniTransformer",),
        layers=("layers.*.self_attn",),
        forward_args=("vision_tokens", "vision_token_shapes", "vision_noisy_frame_indexes", "und_len"),
        layout=_cosmos3,
        timestep="vision_timesteps",
        latents="vision_tokens",
        single=True,
        latent_pixels=16,
        pads=True,
        refused_methods=dict.fromkeys(("nag",), "a call of it is of one sample, without a batch")
        | dict.fromkeys(("moh", "head-drop"), "its text has projections of its own, where others have the image's"),
    ),
)
