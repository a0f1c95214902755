"""Image families: where the (1, H, W) grid comes from and in which order the parts of the sequence stand."""

from __future__ import annotations

from typing import Any

import torch

from dit_attn.processors.clock import BATCHED
from dit_attn.processors.families import Family
from dit_attn.processors.tokens import Span, TokenLayout, visual_span


def _patched_image(config: Any, values: dict[str, Any]) -> TokenLayout:
    """hidden_states: (B, C, H, W) latents; the sequence is the image alone."""
    _, _, height, width = values["hidden_states"].shape
    return TokenLayout((visual_span("image", (1, height // config.patch_size, width // config.patch_size)),))


def image_spans(ids: torch.Tensor) -> tuple[Span, ...]:
    """Spans of an ``img_ids`` table.

    Args:
        ids: (S, 3) or (B, S, 3); columns kind, y, x. Kind 0 is the picture, every other kind one reference image.
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


def _flux(config: Any, values: dict[str, Any]) -> TokenLayout:
    """img_ids: (S_image, 3); the sequence is [text, image, reference]."""
    return TokenLayout((Span("text", None), *image_spans(values["img_ids"])))


FAMILIES = (
    Family(
        name="flux",
        models="Flux.1 dev, schnell, Kontext, Fill",
        transformers=("FluxTransformer2DModel",),
        layers=("transformer_blocks.*.attn", "single_transformer_blocks.*.attn"),
        reads=("img_ids",),
        layout=_flux,
    ),
    Family(
        name="pixart",
        models="PixArt-alpha, PixArt-Sigma",
        transformers=("PixArtTransformer2DModel",),
        layers=("transformer_blocks.*.attn1",),
        reads=("hidden_states",),
        layout=_patched_image,
        guidance=BATCHED,
    ),
)
