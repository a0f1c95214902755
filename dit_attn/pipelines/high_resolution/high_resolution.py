"""The two-stage flow of FreeSwim (arXiv 2511.14712) around a stock pipeline, with any attention method in the second.

    from dit_attn.pipelines import HighResolution

    make = HighResolution(pipe, sigma=0.5)
    image = make("a cat", height=2048, width=2048).images[0]

A native pass lays the picture out; it is enlarged, encoded, noised to ``sigma``, and the rest of the schedule is run at
the large size, where attention is windowed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dit_attn.api import enabled, resolve, summary
from dit_attn.errors import DitAttnError, shorten, unknown
from dit_attn.pipelines.high_resolution import late_start, sizes
from dit_attn.pipelines.high_resolution.estimate import HighResolutionEstimate, check_store, estimate
from dit_attn.pipelines.high_resolution.latents import FILTERS, SPACES, encode, enlarged, form_of, pixels_per_token
from dit_attn.pipelines.high_resolution.native_pass import Generators, NativePass, generator_states
from dit_attn.pipelines.high_resolution.sizes import Size
from dit_attn.pipelines.high_resolution.stages import HighResolutionResult, Stages, at_decode
from dit_attn.processors.attach import compat
from dit_attn.processors.attach.explain import stored_memory
from dit_attn.processors.attach.summary import Summary
from dit_attn.processors.methods.base import Method
from dit_attn.processors.methods.inward_window import InwardWindow

WINDOW = InwardWindow.slug
IMAGES, CLIPS = 0.5, 0.4  # noise levels that measured best


class HighResolution:
    """Make images or clips above the native size of a model, without training.

    Args:
        pipe: a stock pipeline: PixArt, Stable Diffusion 3, Flux, Qwen-Image, Wan, HunyuanVideo, CogVideoX or LTX.
            Nothing of it is changed.
        method: attention of the second stage: ``"inward-window"`` with the native size of the call, and of clips from
            noise level 0.5 on with positions interpolated into it, a method, a saved file or a repository, several of
            them, or ``None`` for dense attention. Windows that do not say their native size get that of the call.
        sigma: noise level at which the second stage begins, in (0, 1]: 1 is noise alone; ``None`` for 0.5, of clips
            0.4. The first step of the pipeline's own schedule that is not above it is taken.
        upscale: filter that enlarges the native pass: ``bicubic``, ``bilinear`` or ``nearest-exact``.
        space: what is enlarged: ``pixel``, which are decoded and encoded, or ``latent``.
        tiling: encode and decode the large size in tiles, which saves memory.

    Raises:
        DitAttnError: a value out of range, or a pipeline that is not supported.
    """

    def __init__(
        self,
        pipe: Any,
        method: str | Method | Sequence[str | Method] | None = WINDOW,
        *,
        sigma: float | None = None,
        upscale: str = "bicubic",
        space: str = "pixel",
        tiling: bool = False,
    ) -> None:
        video = form_of(pipe).video
        sigma = (CLIPS if video else IMAGES) if sigma is None else sigma
        if isinstance(sigma, bool) or not isinstance(sigma, (int, float)) or not 0.0 < sigma <= 1.0:
            raise DitAttnError(f"sigma must be above 0 and at most 1, got {shorten(sigma)}")
        for name, value, known in (("filter", upscale, FILTERS), ("space", space, SPACES)):
            if value not in known:
                raise unknown(name, value, known)
        self.pipe, self.sigma, self.upscale, self.space, self.tiling = pipe, sigma, upscale, space, tiling
        self.method = method

    def __call__(
        self,
        prompt: Any = None,
        *,
        height: int,
        width: int,
        native: Size | None = None,
        first: NativePass | None = None,
        generator: Generators = None,
        output_type: str = "pil",
        on_stage: Callable[[str], None] | None = None,
        on_first: Callable[[NativePass], Any] | None = None,
        **call: Any,
    ) -> HighResolutionResult:
        """Run both stages.

        Args:
            prompt: as the pipeline takes it.
            height, width: of the result in pixels.
            native: (height, width) of the first stage in pixels; ``None`` for the pipeline's own default.
            first: an earlier native pass of the same prompt, size and generator, which is not run again.
            generator: of the noise of both stages.
            output_type: of the second stage.
            on_stage: callback(name) when a stage of :data:`~dit_attn.pipelines.high_resolution.stages.STAGES` begins.
            on_first: callback(native pass) when that has been run.
            call: further arguments of the pipeline, for both stages; ``latents`` are those of the first.

        Raises:
            DitAttnError: a size that is below the native one or does not fit the model, or a schedule without a step
                below ``sigma``.
        """
        pipe, size = self.pipe, native or self.default_size()
        self.check(height, width, size, call.get("num_inference_steps"))
        self.check_store(height, width, size, call.get("num_frames"))
        stages = Stages(on_stage)
        given = {"latents": call.pop("latents")} if "latents" in call else {}
        shared = {**call, "prompt": prompt, "generator": generator}
        if first is None:
            stages.begin("native pass")
            first = self.native_pass(native=size, **shared, **given)
            if on_first is not None:
                on_first(first)
        elif first.space != self.space:
            raise DitAttnError(f"the native pass is in {first.space} space, asked for is {self.space}; make it again")
        else:
            first.restore(generator)
        start = late_start.late_start(pipe.scheduler, first.schedule, self.sigma)
        form = form_of(pipe)
        with self._tiles():
            noised = start.noised(clean := self._clean(first, height, width, stages), _noise_like(clean, generator))
            latents = form.pack(pipe, noised).to(pipe.transformer.dtype)
            methods = self.methods(size)
            stages.begin("denoise")
            with (
                late_start.beginning_at(pipe.scheduler, first.schedule, start),
                at_decode(pipe, lambda: stages.begin("decode")),
            ):
                call = {**shared, "height": height, "width": width, "latents": latents, "output_type": output_type}
                output, found = self._denoised(methods, call)
        return HighResolutionResult(output, first, start.level, start.steps, stages.end(), found)

    def native_pass(
        self, prompt: Any = None, *, native: Size | None = None, generator: Generators = None, **call: Any
    ) -> NativePass:
        """Run the first stage alone; arguments as for the call of the object."""
        pipe, form = self.pipe, form_of(self.pipe)
        height, width = native or self.default_size()
        kind = "pt" if self.space == "pixel" else "latent"
        with late_start.recorded(pipe.scheduler) as schedule:
            output = pipe(prompt=prompt, **call, generator=generator, height=height, width=width, output_type=kind)
        values = output.frames if form.video else output.images
        if self.space == "latent":
            values = form.unpack(pipe, values, *self.tokens((height, width)))
        elif form.video:
            values = values.transpose(1, 2)
        return NativePass(values.detach().cpu(), self.space, schedule, generator_states(generator))

    def methods(self, native: Size) -> tuple[Method, ...]:
        """Return the methods of the second stage after a native pass of (height, width) pixels."""
        given = self.method
        several = () if given is None else (given,) if isinstance(given, (str, Method)) else tuple(given)
        tokens = self.tokens(native)
        named = [self._window(tokens) if one == WINDOW else one for one in several]
        return tuple(one.at_native_size(tokens) for one in resolve(self.pipe, *named))

    def _window(self, tokens: Size) -> InwardWindow:
        """What measured best: with more noise, clips lose their prompt at positions beyond the native ones."""
        rotary = self.pipe.transformer.config.get("use_rotary_positional_embeddings", True)
        moved = form_of(self.pipe).video and rotary and self.sigma >= 0.5
        return InwardWindow(native=tokens, rotary="interpolated" if moved else "plain")

    def tokens(self, size: Size) -> Size:
        """Return (h, w) tokens of (height, width) pixels."""
        unit = pixels_per_token(self.pipe)
        return size[0] // unit, size[1] // unit

    def default_size(self) -> Size:
        """Return the (height, width) in pixels that the pipeline makes when it is not asked for a size."""
        return sizes.default_size(self.pipe)

    def check(self, height: int, width: int, native: Size, steps: int | None = None) -> None:
        """Refuse sizes and steps that do not fit; weights need not be loaded.

        Args:
            height, width: of the result in pixels.
            native: (height, width) of the first stage in pixels.
            steps: of the full schedule, if known.

        Raises:
            DitAttnError: so it is.
        """
        sizes.check(self.pipe, height, width, native, steps)

    def check_store(
        self, height: int, width: int, native: Size, num_frames: int | None, device: torch.device | None = None
    ) -> None:
        """Refuse what the methods store from step to step where it is larger than the memory that it is kept in.

        Args:
            height, width: of the result in pixels.
            native: (height, width) of the first stage in pixels.
            num_frames: of clips; ``None`` for the pipeline's own.
            device: that the pipeline will compute on; ``None`` for where it is.

        Raises:
            DitAttnError: so it is.
        """
        for method in self.methods(native):
            if method.has_twin:
                found = stored_memory(self.pipe.transformer, self.pipe, method, height, width, num_frames)
                where, store = device or compat.execution_device(self.pipe), getattr(method, "store", "model")
                check_store(found, method.cache_on_host, where, store)

    def explain(
        self,
        height: int,
        width: int,
        *,
        native: Size | None = None,
        num_frames: int | None = None,
        num_inference_steps: int | None = None,
        guided: bool = True,
    ) -> HighResolutionEstimate:
        """Estimate tokens, memory and the share of the time of every stage; nothing is run.

        Args:
            height, width: of the result in pixels.
            native: (height, width) of the first stage in pixels; ``None`` for the pipeline's own default.
            num_frames: of clips; ``None`` for the pipeline's own.
            num_inference_steps: of the full schedule; ``None`` for the pipeline's own.
            guided: whether every step has a pass without the prompt.

        Raises:
            DitAttnError: as for the call.
        """
        size = native or self.default_size()
        self.check(height, width, size, num_inference_steps)
        methods = self.methods(size)
        both = (size, (height, width))
        return estimate(self.pipe, methods, *both, self.sigma, self.space, num_frames, num_inference_steps, guided)

    def _clean(self, first: NativePass, height: int, width: int, stages: Stages) -> torch.Tensor:
        """Latents of the enlarged native pass, fp32, on the pipeline's device."""
        pipe = self.pipe
        stages.begin("upscale")
        values = first.values.to(compat.execution_device(pipe))
        if self.space == "latent":
            side = sizes.pixels_per_latent(pipe)
            return enlarged(values, height // side, width // side, self.upscale, "latent")
        values = enlarged(values, height, width, self.upscale)
        stages.begin("encode")
        return encode(pipe, values)

    def _denoised(self, methods: tuple[Method, ...], call: dict[str, Any]) -> tuple[Any, Summary | None]:
        if not methods:
            return self.pipe(**call), None
        with enabled(self.pipe, *methods):
            return self.pipe(**call), summary(self.pipe)

    @contextmanager
    def _tiles(self) -> Iterator[None]:
        vae = self.pipe.vae
        if not self.tiling or getattr(vae, "use_tiling", False):
            yield
            return
        if not hasattr(vae, "enable_tiling"):
            raise DitAttnError(f"{type(vae).__name__} cannot work in tiles; leave out tiling")
        vae.enable_tiling()
        try:
            yield
        finally:
            vae.use_tiling = False


def _noise_like(clean: torch.Tensor, generator: Generators) -> torch.Tensor:
    from diffusers.utils.torch_utils import randn_tensor

    noise: torch.Tensor = randn_tensor(clean.shape, generator=generator, device=clean.device, dtype=clean.dtype)
    return noise
