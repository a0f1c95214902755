"""What learning a concept and making pairs will take, from the shapes of a model: nothing is loaded.

The peak of activations is that of the step itself, done without numbers on the meta device with a few blocks of each
kind, and carried on to all blocks in a straight line. Attention counts as fused, and libraries are left out.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import torch

from dit_attn.pipelines.anomaly.backbone import Backbone, Text
from dit_attn.pipelines.anomaly.concept import Concept, ConceptSettings, add_lora, check_peft
from dit_attn.pipelines.anomaly.meta_memory import AsOnDevice, LiveBytes
from dit_attn.pipelines.anomaly.orders import GenerateConfig
from dit_attn.pipelines.anomaly.training import TrainConfig, masked_loss
from dit_attn.pipelines.high_resolution.latents import form_of
from dit_attn.processors.attach.value_table import html_table, text_table

FEW = 2  # blocks of a kind that are tried; one more gives the slope
_STATE = 12  # bytes a trained parameter takes besides its gradient: itself and two moments of AdamW, fp32


@dataclass(frozen=True)
class ModelShape:
    """A pipeline without weights.

    Attributes:
        pipe: transformer and autoencoder on the meta device, and the scheduler.
        dtype: of the weights.
        text_tokens: of a prompt.
        text_encoders: parameters of the text encoders.
        about: what it is, e.g. the pipeline's class.
        resolution: pixels; the model's own where ``None``.
    """

    pipe: Any
    dtype: torch.dtype
    text_tokens: int
    text_encoders: int
    about: str
    resolution: int | None = None

    def __post_init__(self) -> None:
        for part in (self.pipe.transformer, self.pipe.vae):
            part.to(self.dtype)


@dataclass(frozen=True, repr=False)
class AnomalyEstimate:
    """What a run takes, in bytes. Prints as a table; ``to_dict()`` gives JSON values.

    Attributes:
        job: ``"train"`` or ``"generate"``.
        about: the model.
        resolution: pixels.
        batch: samples at once, of one process.
        trained: parameters that are learned; 0 for ``generate``.
        transformer, autoencoder, text_encoders: weights. The text encoders are freed once prompts are encoded.
        optimizer: what is learned, with the optimizer's state.
        activations: largest activations and gradients; those without checkpointing.
        checkpointed: those with it; ``None`` for ``generate``.
        checkpointing: whether the run does it.
        seconds: of the run, ``None`` where this machine has not been timed.
    """

    job: str
    about: str
    resolution: int
    batch: int
    trained: int
    transformer: int
    autoencoder: int
    text_encoders: int
    optimizer: int
    activations: int
    checkpointed: int | None = None
    checkpointing: bool = False
    seconds: float | None = None

    @property
    def loading(self) -> int:
        """Bytes while prompts are encoded: all weights, the text encoders among them."""
        return self.transformer + self.autoencoder + self.text_encoders

    @property
    def running(self) -> int:
        """Bytes of the run after that."""
        used = self.checkpointed if self.checkpointing and self.checkpointed is not None else self.activations
        return self.transformer + self.autoencoder + self.optimizer + used

    @property
    def peak(self) -> int:
        """Bytes at most."""
        return max(self.loading, self.running)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "loading": self.loading, "running": self.running, "peak": self.peak}

    def __repr__(self) -> str:
        return f"<AnomalyEstimate: {self.job}, peak {_bytes(self.peak)}>"

    def __str__(self) -> str:
        return text_table(self._rows(), label=12)

    def _repr_html_(self) -> str:
        return html_table(self._rows())

    def _rows(self) -> list[tuple[str, str]]:
        count = f"{self.batch} samples" if self.batch > 1 else "one sample"
        samples = f"{count} of {self.resolution} x {self.resolution} pixels"
        rows = [("model", self.about), ("learned", f"{self.trained:,} parameters")][: 2 if self.trained else 1]
        when = "while prompts are encoded" if self.loading >= self.running else "while it runs"
        rows.append(("peak", f"about {_bytes(self.peak)}, {when}; libraries come on top"))
        rows.append(("weights", f"{_bytes(self.transformer + self.autoencoder)}, and {_bytes(self.text_encoders)} of "
                     "text encoders until prompts are encoded"))  # fmt: skip
        if self.trained:
            rows.append(("optimizer", f"{_bytes(self.optimizer)} with what is learned"))
        activations = f"{_bytes(self.activations)} for {samples}"
        if self.checkpointed is not None:
            used = "used" if self.checkpointing else "with --gradient-checkpointing"
            activations += f"; {_bytes(self.checkpointed)} {used}"
        rows.append(("activations", activations))
        time = "unknown: this machine has not been timed on this model yet; a run times it"
        return [*rows, ("time", time if self.seconds is None else f"about {_duration(self.seconds)}, as timed here")]


class _Shapes(Backbone):
    """A backbone on the meta device, which knows no autocast."""

    def autocast(self) -> Any:
        """Do nothing: :class:`AsOnDevice` has linear layers in one type."""
        return nullcontext()


def estimate_training(
    shape: ModelShape, config: TrainConfig, pairs: int, processes: int = 1, checkpointing: bool = False,
) -> AnomalyEstimate:  # fmt: skip
    """Estimate ``anomaly train``.

    Args:
        shape: the model.
        config: how.
        pairs: number of (product, defect) pairs.
        processes: that share a batch.
        checkpointing: whether activations are computed twice.

    Raises:
        DitAttnError: another pipeline, a resolution that does not fit, or peft is missing.
    """
    if config.lora_rank:
        check_peft()
    batch = max(1, config.batch // processes)

    def step(backbone: Backbone, checkpointed: bool) -> int:
        transformer = backbone.pipe.transformer.requires_grad_(False)
        with torch.device("meta"):
            concept = Concept(_settings(backbone, shape, config, pairs))
        lora = add_lora(transformer, config.lora_rank) if config.lora_rank else []
        for parameter in lora:
            parameter.requires_grad_(True)
        device = AsOnDevice(shape.dtype)
        if checkpointed:
            transformer.enable_gradient_checkpointing(device.checkpoint)
        clean, masks, text = _inputs(backbone, shape, batch)
        level = clean.new_zeros(batch)
        numbers = torch.zeros(batch, dtype=torch.long, device="meta")
        with device, LiveBytes() as live:
            live.ignore([*transformer.parameters(), *transformer.buffers(), *concept.parameters(), *concept.buffers()])
            torch.autograd.backward(masked_loss(backbone, concept, clean, clean, level, masks, numbers, text))
        return live.peak

    stored, again = (_over_blocks(shape, partial(step, checkpointed=on)) for on in (False, True))
    pixels = _autoencoder_peak(shape, batch, "encode")
    backbone = _Shapes(_copy(shape.pipe), shape.resolution)
    with torch.device("meta"):
        trained = sum(p.numel() for p in Concept(_settings(backbone, shape, config, pairs)).parameters())
    if config.lora_rank:
        trained += sum(p.numel() for p in add_lora(backbone.pipe.transformer, config.lora_rank))
    return AnomalyEstimate(
        "train", shape.about, backbone.resolution, batch, trained, *_weights(shape), _STATE * trained,
        max(stored, pixels), max(again, pixels), checkpointing,
    )  # fmt: skip


def estimate_generation(shape: ModelShape, config: GenerateConfig, concept: ConceptSettings) -> AnomalyEstimate:
    """Estimate ``anomaly generate``.

    Args:
        shape: the model.
        config: how.
        concept: what was learned.

    Raises:
        DitAttnError: another pipeline, or a resolution that does not fit.
    """
    rows = config.batch * (2 if config.guidance > 1.0 else 1)
    shape = replace(shape, text_tokens=shape.text_tokens + concept.tokens + concept.mask_tokens)

    @torch.no_grad()
    def step(backbone: Backbone) -> int:
        if concept.lora_rank:
            add_lora(backbone.pipe.transformer, concept.lora_rank)
        transformer = backbone.pipe.transformer
        clean, _, text = _inputs(backbone, shape, rows)
        with AsOnDevice(shape.dtype), LiveBytes() as live:
            live.ignore([*transformer.parameters(), *transformer.buffers()])
            backbone.errors(clean, clean, clean.new_zeros(rows), text)
        return live.peak

    peak = max(_over_blocks(shape, step), _autoencoder_peak(shape, config.batch, "decode"))
    resolution = _Shapes(_copy(shape.pipe), shape.resolution).resolution
    return AnomalyEstimate("generate", shape.about, resolution, config.batch, 0, *_weights(shape), 0, peak)


def _settings(backbone: Backbone, shape: ModelShape, config: TrainConfig, pairs: int) -> ConceptSettings:
    return ConceptSettings(
        pipeline=backbone.name, model="", width=_text_width(backbone.pipe), resolution=backbone.resolution,
        pairs=tuple(map(str, range(pairs))), tokens=config.tokens, mask_tokens=config.mask_tokens,
        lora_rank=config.lora_rank,
    )  # fmt: skip


def _weights(shape: ModelShape) -> tuple[int, int, int]:
    """Bytes of the transformer, the autoencoder and the text encoders."""
    size = shape.dtype.itemsize
    parts = (shape.pipe.transformer, shape.pipe.vae)
    counts = [sum(p.numel() for p in part.parameters()) for part in parts]
    return counts[0] * size, counts[1] * size, shape.text_encoders * size


def _text_width(pipe: Any) -> int:
    config = pipe.transformer.config
    return int(getattr(config, "caption_channels", None) or config.joint_attention_dim)


def _inputs(backbone: Backbone, shape: ModelShape, batch: int) -> tuple[torch.Tensor, torch.Tensor, Text]:
    """Latents, masks and text of a step, on the meta device."""
    pipe, side = backbone.pipe, backbone.resolution // backbone.factor
    config = pipe.transformer.config
    packed = backbone.pack(torch.zeros(1, 1, 2, 2, device="meta")).ndim == 3
    channels = int(config.in_channels) // (4 if packed else 1)
    with torch.device("meta"):
        clean = torch.zeros(batch, channels, side, side)
        masks = torch.zeros(batch, 1, backbone.resolution, backbone.resolution)
        text = {"prompt_embeds": torch.zeros(batch, shape.text_tokens, _text_width(pipe), dtype=shape.dtype)}
        if pooled := getattr(config, "pooled_projection_dim", None):
            text["pooled_prompt_embeds"] = torch.zeros(batch, pooled, dtype=shape.dtype)
        if backbone.family.masked:
            text[backbone.family.masked] = torch.ones(batch, shape.text_tokens, dtype=torch.long)
    return clean, masks, text


def _copy(pipe: Any) -> Any:
    """The same pipeline with a transformer of its own, on the meta device."""
    twin = copy.copy(pipe)
    twin.__dict__["transformer"] = copy.deepcopy(pipe.transformer)
    return twin


def _over_blocks(shape: ModelShape, measure: Callable[[Backbone], int]) -> int:
    """Measure with few blocks of every kind, and add what each further one of a kind adds."""
    kinds: dict[tuple[str, int], int] = {}
    for name, _, size in _blocks(shape.pipe.transformer):
        kinds[name, size] = kinds.get((name, size), 0) + 1
    few = {kind: min(count, FEW) for kind, count in kinds.items()}
    least = measure(_shortened(shape, few))
    total = float(least)
    for kind, count in kinds.items():
        if count > FEW:
            total += (count - FEW) * max(0, measure(_shortened(shape, {**few, kind: FEW + 1})) - least)
    return round(total)


def _blocks(transformer: torch.nn.Module) -> list[tuple[str, int, int]]:
    """(list, index, parameters) of the blocks."""
    return [
        (name, index, sum(p.numel() for p in block.parameters()))
        for name, blocks in transformer.named_children() if isinstance(blocks, torch.nn.ModuleList)
        for index, block in enumerate(blocks)
    ]  # fmt: skip


def _shortened(shape: ModelShape, kept: dict[tuple[str, int], int]) -> Backbone:
    """The pipeline with so many blocks of every kind."""
    pipe, left = copy.copy(shape.pipe), dict(kept)
    chosen: dict[str, list[int]] = {}
    for name, index, size in _blocks(shape.pipe.transformer):
        if left[name, size]:
            left[name, size] -= 1
            chosen.setdefault(name, []).append(index)
    full = dict(shape.pipe.transformer._modules)
    transformer = copy.copy(shape.pipe.transformer)
    transformer._modules = {
        name: torch.nn.ModuleList([module[i] for i in chosen[name]]) if name in chosen else module
        for name, module in full.items()
    }
    pipe.__dict__["transformer"] = copy.deepcopy(transformer)
    return _Shapes(pipe, shape.resolution)


@torch.no_grad()
def _autoencoder_peak(shape: ModelShape, batch: int, what: str) -> int:
    """Bytes of the largest activations of encoding or decoding a batch."""
    backbone = _Shapes(shape.pipe, shape.resolution)
    vae, size = shape.pipe.vae, backbone.resolution
    frame = form_of(shape.pipe).single_frame
    with torch.device("meta"):
        pixels = torch.zeros(batch, 3, *((1,) if frame else ()), size, size, dtype=shape.dtype)
    with AsOnDevice(shape.dtype), LiveBytes() as live:
        live.ignore([*vae.parameters(), *vae.buffers()])
        latents = vae.encode(pixels).latent_dist.mode()
    if what == "encode":
        return live.peak
    with AsOnDevice(shape.dtype), LiveBytes() as live:
        live.ignore([*vae.parameters(), *vae.buffers(), latents])
        vae.decode(latents)
    return live.peak


def _bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{max(2, seconds):.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"
