"""Transformers of known models at their real size, with random weights, and inputs shaped like a pipeline's.

For measuring time and memory, which do not depend on what the weights are. Sizes are those of the published
``transformer/config.json`` files; smaller ones keep the token layout, the head size and the proportions.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import torch

from dit_attn.errors import DitAttnError, unknown
from dit_attn.machine import free_memory
from dit_attn.models import step_inputs
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
        published = next(row for row in ARCHITECTURES if row.name == self.name)
        return type(self.transformer, (SimpleNamespace,), {})(config=published.config)

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
        return replace(self, config=config, scaled=scaled)

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


def architecture(name: str) -> Architecture:
    """Return the architecture of a known model.

    Raises:
        DitAttnError: unknown name.
    """
    found = {row.name: row for row in ARCHITECTURES}
    if name not in found:
        raise unknown("--config", name, found)
    return found[name]


_WAN = {"attention_head_dim": 128, "text_dim": 4096, "qk_norm": "rms_norm_across_heads"}
ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture(
        "wan2.1-1.3b",
        "WanTransformer3DModel",
        {**_WAN, "num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
        pixels=(81, 480, 832),
        text=512,
        inputs=step_inputs.wan,
        wide=("ffn_dim",),
    ),
    Architecture(
        "wan2.1-14b",
        "WanTransformer3DModel",
        {**_WAN, "num_attention_heads": 40, "ffn_dim": 13824, "num_layers": 40},
        pixels=(81, 720, 1280),
        text=512,
        inputs=step_inputs.wan,
        wide=("ffn_dim",),
    ),
    Architecture(
        "hunyuan-video",
        "HunyuanVideoTransformer3DModel",
        {"num_attention_heads": 24, "attention_head_dim": 128, "num_layers": 20, "num_single_layers": 40},
        pixels=(129, 720, 1280),
        text=256,
        inputs=step_inputs.hunyuan_video,
    ),
    Architecture(
        "cogvideox-5b",
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 48,
            "attention_head_dim": 64,
            "num_layers": 42,
            "use_rotary_positional_embeddings": True,
        },
        pixels=(49, 480, 720),
        text=226,
        inputs=step_inputs.cogvideox,
    ),
    Architecture(
        "flux",
        "FluxTransformer2DModel",
        {
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "num_layers": 19,
            "num_single_layers": 38,
            "guidance_embeds": True,
        },
        pixels=(1, 1024, 1024),
        text=512,
        inputs=step_inputs.flux,
    ),
    Architecture(
        "pixart-sigma",
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 16,
            "attention_head_dim": 72,
            "cross_attention_dim": 1152,
            "num_layers": 28,
            "interpolation_scale": 2,
            "use_additional_conditions": False,
            "caption_channels": 4096,
        },
        pixels=(1, 1024, 1024),
        text=300,
        inputs=step_inputs.pixart,
        wide=("cross_attention_dim",),
    ),
    Architecture(
        "ltx-video",
        "LTXVideoTransformer3DModel",
        {"num_attention_heads": 32, "attention_head_dim": 64, "cross_attention_dim": 2048, "num_layers": 28},
        pixels=(161, 512, 704),
        text=128,
        inputs=step_inputs.ltx_video,
        token_pixels=32,
        latent_frames=8,
        wide=("cross_attention_dim",),
    ),
    Architecture(
        "qwen-image-2.1",  # the sizes are the defaults of its class
        "QwenImage21Transformer2DModel",
        {"num_attention_heads": 32, "attention_head_dim": 128, "num_layers": 32},
        pixels=(1, 1024, 1024),
        text=256,
        inputs=step_inputs.qwen_image_2_1,
    ),
    Architecture(
        "krea-2",  # the sizes are the defaults of its class, as are those of the next two
        "Krea2Transformer2DModel",
        {
            "num_attention_heads": 48,
            "num_key_value_heads": 12,
            "attention_head_dim": 128,
            "num_layers": 28,
            "intermediate_size": 16384,
            "text_hidden_dim": 2560,
            "text_num_attention_heads": 20,
            "text_num_key_value_heads": 20,
            "text_intermediate_size": 6912,
        },
        pixels=(1, 1024, 1024),
        text=512,
        inputs=step_inputs.krea_2,
        wide=(
            *("num_key_value_heads", "intermediate_size", "text_hidden_dim", "text_num_attention_heads"),
            *("text_num_key_value_heads", "text_intermediate_size"),
        ),
        multiples={"text_hidden_dim": 128},
    ),
    Architecture(
        "minimax-h3",
        "MiniMaxH3Transformer3DModel",
        {
            "num_attention_heads": 56,
            "attention_head_dim": 128,
            "hidden_size": 5376,
            "num_layers": 50,
            "ffn_dim": 14336,
            "time_embed_hidden_dim": 5376,
            "time_embed_dim": 2688,
        },
        pixels=(124, 768, 1344),
        text=256,
        inputs=step_inputs.minimax_h3,
        token_pixels=32,
        chunk_frames=17,
        wide=("hidden_size", "ffn_dim", "time_embed_hidden_dim", "time_embed_dim"),
    ),
    Architecture(
        "cosmos-3",  # Nano
        "Cosmos3OmniTransformer",
        {
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "num_hidden_layers": 36,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "sound_gen": True,
            "sound_dim": 64,
            "action_gen": True,
            "action_dim": 64,
        },
        pixels=(189, 720, 1280),
        text=512,
        inputs=step_inputs.cosmos_3,
        token_pixels=32,
        pads=True,
        single=True,
        names=("num_hidden_layers", "head_dim"),
        wide=("num_key_value_heads", "hidden_size", "intermediate_size"),
    ),
)
