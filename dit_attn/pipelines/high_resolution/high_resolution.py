"""The two-stage flow of FreeSwim (arXiv 2511.14712) around a stock pipeline, with any attention method in the second.

    from dit_attn.pipelines import HighResolution

    make = HighResolution(pipe, sigma=0.5)
    image = make("a cat", height=2048, width=2048).images[0]

A native pass lays the picture out; it is enlarged, encoded, noised to ``sigma``, and the rest of the schedule is run at
the large size, where attention is windowed.
"""

from __future__ import annotations

import inspect
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from dit_attn.api import enabled
from dit_attn.errors import DitAttnError, shorten, unknown
from dit_attn.pipelines.high_resolution import late_start
from dit_attn.pipelines.high_resolution.latents import FILTERS, encode, enlarged, form_of, pixels_per_token
from dit_attn.processors.methods.base import Method
from dit_attn.processors.methods.inward_window import InwardWindow

WINDOW = InwardWindow.slug


@dataclass(frozen=True)
class HighResolutionResult:
    """What came out of the two stages.

    Attributes:
        output: the pipeline's output of the second stage, of the ``output_type`` that was asked for.
        native: images (B, C, H, W) or clips (B, C, F, H, W) of the first stage, fp32 in [0, 1], on the CPU.
        sigma: noise level that the second stage began at.
        steps: steps of the second stage.
    """

    output: Any
    native: torch.Tensor
    sigma: float
    steps: int

    @property
    def images(self) -> Any:
        """Images of the second stage."""
        return self.output.images

    @property
    def frames(self) -> Any:
        """Clips of the second stage."""
        return self.output.frames


class HighResolution:
    """Make images or clips above the native size of a model, without training.

    Args:
        pipe: a stock pipeline: PixArt, Stable Diffusion 3, Flux or Wan. Nothing of it is changed.
        method: attention of the second stage: ``"inward-window"`` with the native size of the call, a method, a saved
            file or a repository, or ``None`` for dense attention.
        sigma: noise level at which the second stage begins, in (0, 1]: 1 is noise alone. The first step of the
            pipeline's own schedule that is not above it is taken.
        upscale: filter that enlarges the native pixels: ``bicubic``, ``bilinear`` or ``nearest-exact``.

    Raises:
        DitAttnError: a value out of range, or a pipeline that is not supported.
    """

    def __init__(
        self, pipe: Any, method: str | Method | None = WINDOW, *, sigma: float = 0.5, upscale: str = "bicubic"
    ) -> None:
        form_of(pipe)
        if not 0.0 < sigma <= 1.0:
            raise DitAttnError(f"sigma must be above 0 and at most 1, got {shorten(sigma)}")
        if upscale not in FILTERS:
            raise unknown("filter", upscale, FILTERS)
        self.pipe, self.method, self.sigma, self.upscale = pipe, method, sigma, upscale

    def __call__(
        self,
        prompt: Any = None,
        *,
        height: int,
        width: int,
        native: tuple[int, int] | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        output_type: str = "pil",
        **call: Any,
    ) -> HighResolutionResult:
        """Run both stages.

        Args:
            prompt: as the pipeline takes it.
            height, width: of the result in pixels.
            native: (height, width) of the first stage in pixels; ``None`` for the pipeline's own default.
            generator: of the noise of both stages.
            output_type: of the second stage.
            call: further arguments of the pipeline, for both stages; ``latents`` are those of the first.

        Raises:
            DitAttnError: a size that is below the native one or does not fit the model, or a schedule without a step
                below ``sigma``.
        """
        pipe, size = self.pipe, native or self.default_size()
        self._check(height, width, size)
        given = {"latents": call.pop("latents")} if "latents" in call else {}
        shared = {**call, "prompt": prompt, "generator": generator}
        with late_start.recorded(pipe.scheduler) as schedule:
            first = pipe(**shared, **given, height=size[0], width=size[1], output_type="pt")
        start = late_start.late_start(pipe.scheduler, schedule, self.sigma)
        form = form_of(pipe)
        pixels = first.frames.transpose(1, 2) if form.video else first.images
        clean = encode(pipe, enlarged(pixels, height, width, self.upscale))
        noised = start.noised(clean, _noise_like(clean, generator))
        latents = form.pack(pipe, noised).to(pipe.transformer.dtype)
        with self._attention(size), late_start.beginning_at(pipe.scheduler, schedule, start):
            output = pipe(**shared, height=height, width=width, latents=latents, output_type=output_type)
        return HighResolutionResult(output, pixels.float().cpu(), start.level, start.steps)

    def default_size(self) -> tuple[int, int]:
        """Return the (height, width) in pixels that the pipeline makes when it is not asked for a size."""
        given = inspect.signature(self.pipe.__call__).parameters
        height, width = (given[name].default for name in ("height", "width"))
        if height is None or width is None:
            tokens = getattr(self.pipe, "default_sample_size", None) or self.pipe.transformer.config.sample_size
            height = width = tokens * self.pipe.vae_scale_factor
        return int(height), int(width)

    def _check(self, height: int, width: int, native: tuple[int, int]) -> None:
        unit = pixels_per_token(self.pipe)
        for name, value, least in (("height", height, native[0]), ("width", width, native[1])):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise DitAttnError(f"{name} must be at least the native {least} pixels, got {shorten(value)}")
            for length in (value, least):
                if length % unit:
                    raise DitAttnError(
                        f"{name} must be a multiple of {unit} pixels, the side of a token, got {length}; "
                        f"the nearest is {max(unit, round(length / unit) * unit)}"
                    )

    def _attention(self, native: tuple[int, int]) -> AbstractContextManager[Any]:
        if self.method is None:
            return nullcontext()
        method = self.method
        if method == WINDOW:
            unit = pixels_per_token(self.pipe)
            method = InwardWindow(native=(native[0] // unit, native[1] // unit))
        return enabled(self.pipe, method)


def _noise_like(clean: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
    from diffusers.utils.torch_utils import randn_tensor

    noise: torch.Tensor = randn_tensor(clean.shape, generator=generator, device=clean.device, dtype=clean.dtype)
    return noise
