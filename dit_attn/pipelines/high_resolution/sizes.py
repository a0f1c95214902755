"""Sizes of both stages in pixels: what a pipeline makes by default, and which ones fit."""

from __future__ import annotations

import inspect
from typing import Any

from dit_attn.errors import DitAttnError, shorten
from dit_attn.pipelines.high_resolution.latents import form_of, pixels_per_token

Size = tuple[int, int]


def default_size(pipe: Any) -> Size:
    """Return the (height, width) in pixels that a pipeline makes when it is not asked for a size."""
    given = inspect.signature(pipe.__call__).parameters
    height, width = (given[name].default for name in ("height", "width"))
    if height is None or width is None:
        config, scale = pipe.transformer.config, pixels_per_latent(pipe)
        sides = (config.get("sample_height"), config.get("sample_width"))
        tokens = getattr(pipe, "default_sample_size", None) or config.get("sample_size")
        height, width = (int(side or tokens) * scale for side in sides)
    return int(height), int(width)


def pixels_per_latent(pipe: Any) -> int:
    """Return the pixels along each side of a position of the latents."""
    return pixels_per_token(pipe) // form_of(pipe).patch(pipe)[1]


def check(pipe: Any, height: int, width: int, native: Size, steps: int | None = None) -> None:
    """Refuse sizes and steps that do not fit; weights need not be loaded.

    Args:
        pipe: the pipeline.
        height, width: of the result in pixels.
        native: (height, width) of the first stage in pixels.
        steps: of the full schedule, if known.

    Raises:
        DitAttnError: so it is.
    """
    unit = pixels_per_token(pipe)
    for name, value, least in (("height", height, native[0]), ("width", width, native[1])):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise DitAttnError(f"{name} must be at least the native {least} pixels, got {shorten(value)}")
        for length in (value, least):
            if length % unit or not length:
                raise DitAttnError(
                    f"{name} must be a multiple of {unit} pixels, the side of a token, got {length}; "
                    f"the nearest is {max(unit, round(length / unit) * unit)}"
                )
    if steps is not None and (isinstance(steps, bool) or not isinstance(steps, int) or steps < 1):
        raise DitAttnError(f"num_inference_steps must be a whole number of at least 1, got {shorten(steps)}")
