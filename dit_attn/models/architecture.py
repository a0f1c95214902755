"""A transformer of a known size with random weights, and inputs shaped like a pipeline's.

Smaller ones keep the token layout, the head size and the proportions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.machine import free_memory
from dit_attn.models.step_inputs import CallShape, Grid

_ACTIVATIONS = 16  # arrays of (tokens, width) that a step holds at once, roughly: the widest layer is 4 wide


@dataclass(frozen=True)
class Architecture:
    """One transformer.

    Attributes:
        name: the model, e.g. ``"wan2.1-1.3b"``.
        transformer: its diffusers class.
        config: arguments of the class.
        pixels: (frames, height, width) the model is used at; 1 frame for images.
        text: text tokens of a prompt, padding counted.
        inputs: makes the arguments of a call.
        token_pixels: side in pixels of a token: of a latent, times that of the patch.
        latent_frames: frames that a latent frame stands for, after the first.
        chunk_frames: frames after which one stands for itself again; 0: only the first does.
        pads: whether a size that is no multiple of a token's is padded up.
        single: whether a call is of one sample.
        names: entries of ``config`` with the number of layers and the size of a head.
        wide: entries of ``config`` that grow with the number of heads.
        multiples: entries of ``wide`` that stay multiples of a number.
        scaled: what differs from the published model, e.g. ``{"layers": 2}``; empty for the real one.
        published: ``config`` of the published model; ``None`` for the real one.
    """

    name: str
    transformer: str
    config: dict[str, Any]
    pixels: tuple[int, int, int]
    text: int
    inputs: Callable[[CallShape], dict[str, Any]] = field(repr=False)
    token_pixels: int = 16
    latent_frames: int = 4
    chunk_frames: int = 0
    pads: bool = False
    single: bool = False
    names: tuple[str, str] = ("num_layers", "attention_head_dim")
    wide: tuple[str, ...] = ()
    multiples: dict[str, int] = field(default_factory=dict)
    scaled: dict[str, int] = field(default_factory=dict)
    published: dict[str, Any] | None = field(default=None, repr=False, compare=False)

    @property
    def layers(self) -> int:
        """Number of layers with joint or self attention over the visual tokens."""
        return self.config[self.names[0]] + self.config.get("num_single_layers", 0)

    @property
    def heads(self) -> int:
        """Number of heads of a layer."""
        return self.config["num_attention_heads"]

    @property
    def head_dim(self) -> int:
        """Size of a head."""
        return self.config[self.names[1]]

    @property
    def grid(self) -> Grid:
        """(T, H, W) visual tokens at ``pixels``."""
        frames, height, width = self.pixels
        chunk = self.chunk_frames or frames
        times = frames // chunk * self._latents(chunk) + self._latents(frames % chunk)
        beyond = self.token_pixels - 1 if self.pads else 0
        return (times, (height + beyond) // self.token_pixels, (width + beyond) // self.token_pixels)

    def _latents(self, frames: int) -> int:
        """Latent frames of some frames, the first of which stands for itself."""
        return (frames - 1) // self.latent_frames + 1

    @property
    def stand_in(self) -> Any:
        """Object by which presets are looked up: the class's name with the published ``config``."""
        return type(self.transformer, (SimpleNamespace,), {})(config=self.published or self.config)

    def sized(self, layers: int | None = None, heads: int | None = None) -> Architecture:
        """Return the same with other numbers of layers and heads; width follows the heads, single layers the layers.

        Raises:
            DitAttnError: fewer layers than the architecture has kinds of them, or no head.
        """
        config, scaled = dict(self.config), dict(self.scaled)
        if heads is not None and heads != self.heads:
            if heads < 1:
                raise DitAttnError(f"--heads must be at least 1, got {heads}")
            for name in self.wide:
                step = self.multiples.get(name, 1)
                config[name] = step * max(1, round(config[name] * heads / self.heads / step))
            groups = config.get("num_key_value_heads", 1)
            while heads % groups:
                groups -= 1
            config |= {"num_key_value_heads": groups} if "num_key_value_heads" in config else {}
            config["num_attention_heads"] = scaled["heads"] = heads
        if layers is not None and layers != self.layers:
            kinds = 1 + ("num_single_layers" in config)
            if layers < kinds:
                raise DitAttnError(f"--layers must be at least {kinds} for {self.name}, got {layers}: one of each kind")
            first, scaled["layers"] = layers, layers
            if kinds == 2:
                first = min(layers - 1, max(1, round(layers * config["num_layers"] / self.layers)))
                config["num_single_layers"] = layers - first
            config[self.names[0]] = first
        return replace(self, config=config, scaled=scaled, published=self.published or self.config)

    def at(self, frames: int | None = None, height: int | None = None, width: int | None = None) -> Architecture:
        """Return the same at another size in pixels.

        Raises:
            DitAttnError: less than one token, or frames for an image model.
        """
        if frames is not None and frames > 1 and self.pixels[0] == 1:
            raise DitAttnError(f"--frames {frames}: {self.name} makes images; leave it out")
        found = tuple(new or old for new, old in zip((frames, height, width), self.pixels))
        side = self.token_pixels
        if min(found[1:]) < side or found[0] < 1:
            raise DitAttnError(f"{found[1]} x {found[2]} is smaller than one token of {side} x {side} pixels")
        return replace(self, pixels=(found[0], found[1], found[2]))

    def with_tokens(self, count: int) -> Architecture:
        """Return the same with at least ``count`` visual tokens: frames and proportions stay, the image is scaled."""
        frames, rows, columns = self.grid
        wanted = math.ceil(count / frames)
        height = max(1, round(rows * math.sqrt(wanted / (rows * columns))))
        size = (self.token_pixels * height, self.token_pixels * math.ceil(wanted / height))
        return replace(self, pixels=(self.pixels[0], *size))

    def build(self, device: torch.device, dtype: torch.dtype, seed: int = 0) -> torch.nn.Module:
        """Build the transformer with random weights, in ``dtype`` on ``device`` itself: no copy elsewhere.

        Raises:
            DitAttnError: it does not fit.
        """
        before = torch.get_default_dtype()
        torch.manual_seed(seed)
        try:
            torch.set_default_dtype(dtype)
            with torch.device(device):
                model = self.build_class()(**self.config)
        except torch.OutOfMemoryError as error:
            raise DitAttnError(f"{self.name} in {dtype} does not fit on {device}; take fewer --layers") from error
        finally:
            torch.set_default_dtype(before)
        return model.to(device).eval().requires_grad_(False)  # position tables are made on the host

    def parameters(self) -> int:
        """Count its weights."""
        with torch.device("meta"):
            return sum(weight.numel() for weight in self.build_class()(**self.config).parameters())

    def check_batch(self, batch: int) -> None:
        """Raise if a call cannot be of that many samples.

        Raises:
            DitAttnError: so it is.
        """
        if self.single and batch > 1:
            raise DitAttnError(f"--batch {batch}: a call of {self.name} is of one sample; leave it out")

    def bytes_needed(self, dtype: torch.dtype, batch: int) -> int:
        """Estimate the bytes of the weights and of the activations of a step."""
        tokens = math.prod(self.grid) + self.text
        step = _ACTIVATIONS * batch * tokens * self.heads * self.head_dim
        return dtype.itemsize * (self.parameters() + step)

    def check_memory(self, device: torch.device, dtype: torch.dtype, batch: int, cached: int = 0) -> None:
        """Raise if it cannot fit.

        Args:
            device, dtype, batch: of the call.
            cached: bytes that a method caches from step to step.

        Raises:
            DitAttnError: it needs more than is free.
        """
        need, free = self.bytes_needed(dtype, batch) + cached, free_memory(device)
        if free is not None and need > free:
            memory = f" ({cached / 2**30:.1f} GiB of it cached by the method)" if cached else ""
            raise DitAttnError(
                f"{self.name} with {self.layers} layers, {self.heads} heads and {math.prod(self.grid):,} tokens needs "
                f"about {need / 2**30:.1f} GiB{memory}, and {device} has {free / 2**30:.1f} GiB free; take fewer "
                "--layers, --heads or --tokens"
            )

    def call(self, device: torch.device, dtype: torch.dtype, batch: int = 1, seed: int = 0) -> dict[str, Any]:
        """Make the arguments of one forward call in the middle of a run: latents, text, time."""
        generator = torch.Generator(device).manual_seed(seed)
        with torch.device(device):
            return self.inputs(CallShape(self.grid, self.text, self.config, batch, dtype, generator))

    def build_class(self) -> Any:
        """Import and return its diffusers class."""
        import diffusers

        return getattr(diffusers, self.transformer)
