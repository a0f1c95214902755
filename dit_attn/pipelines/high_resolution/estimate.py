"""What the stages of a high-resolution run will cost, before weights are loaded.

Time is shared out by floating-point operations, as if all ran at the same rate; memory is that of the largest
activations at a time and of what methods store, without the weights. Both are arithmetic, not measurements.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch

from dit_attn.api import explain
from dit_attn.errors import DitAttnError
from dit_attn.machine import free_memory
from dit_attn.pipelines.high_resolution import late_start
from dit_attn.pipelines.high_resolution.latents import form_of
from dit_attn.pipelines.high_resolution.sizes import Size
from dit_attn.processors.attach.value_table import html_table, percent, text_table


@dataclass(frozen=True)
class StageEstimate:
    """One stage.

    Attributes:
        name: of the stage.
        tokens: visual tokens of one sample; 0 for the autoencoder.
        steps: denoising steps.
        density: attention computed, as a fraction of dense.
        operations: floating-point operations of the stage.
        share: of the operations of all stages, in [0, 1].
        memory: bytes of the largest activations and of what methods store.
    """

    name: str
    tokens: int
    steps: int
    density: float
    operations: float
    share: float
    memory: int


@dataclass(frozen=True, repr=False)
class HighResolutionEstimate:
    """All stages of a run. Prints as a table; ``to_dict()`` gives JSON values.

    Attributes:
        height, width: of the result in pixels.
        native: (height, width) of the native pass in pixels.
        stages: in order.
        store: bytes that the methods of the second stage store from step to step.
        host_store: bytes of those that are in main memory.
        dense: operations of the run with dense attention at the large size, over those of this one.
    """

    height: int
    width: int
    native: Size
    stages: tuple[StageEstimate, ...]
    store: int
    dense: float
    host_store: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    def __repr__(self) -> str:
        return f"<HighResolutionEstimate: {self.height} x {self.width}, {len(self.stages)} stages>"

    def __str__(self) -> str:
        return text_table(self._rows(), label=20)

    def _repr_html_(self) -> str:
        return html_table(self._rows())

    def _rows(self) -> list[tuple[str, str]]:
        native = f"{self.native[0]} x {self.native[1]}"
        rows = [("size", f"{self.height} x {self.width} pixels, from a native pass of {native}")]
        for stage in self.stages:
            what = f"{percent(stage.share)} of the time, about {_bytes(stage.memory)}"
            if stage.tokens:
                attention = f"attention {percent(stage.density)} of dense"
                what += f": {stage.tokens:,} tokens, {stage.steps} steps, {attention}"
            rows.append((stage.name, what))
        if self.store:
            where = f", {_bytes(self.host_store)} of it in main memory" if self.host_store else ""
            rows.append(("store", f"{_bytes(self.store)} from step to step (one sample, both branches){where}"))
        return [*rows, ("dense", f"{self.dense:.2f}x the operations")]


def estimate(
    pipe: Any,
    methods: tuple[Any, ...],
    native: Size,
    size: Size,
    sigma: float,
    space: str,
    num_frames: int | None,
    steps: int | None,
    guided: bool,
) -> HighResolutionEstimate:
    """Estimate a run.

    Args:
        pipe: the pipeline, which may be without weights.
        methods: of the second stage.
        native, size: (height, width) in pixels of the stages.
        sigma: noise level of the second stage.
        space: ``"pixel"`` or ``"latent"``.
        num_frames: of clips; ``None`` for the pipeline's own.
        steps: of the full schedule; ``None`` for the pipeline's own.
        guided: whether every step has two passes.
    """
    shape: dict[str, Any] = {"num_frames": num_frames, "num_inference_steps": steps}
    first = explain(pipe, height=native[0], width=native[1], **shape)
    dense = explain(pipe, height=size[0], width=size[1], **shape)
    second = explain(pipe, *methods, height=size[0], width=size[1], **shape) if methods else dense
    passes, left = (2 if guided else 1), _steps_left(pipe.scheduler, first.steps, sigma)
    density = 1.0 if second.density is None else second.density
    work = 1.0 - second.attention_share * (1.0 - density)
    twins = sum(method.twin_work(left, passes) for method in methods)
    frames = second.grid[0] if form_of(pipe).video else None
    found = [
        ("native pass", first.tokens, first.steps, 1.0, first.operations * first.steps * passes, first.tokens, 0),
        ("denoise", second.tokens, left, density, dense.operations * left * (passes * work + twins), second.tokens,
         second.memory - second.host_memory + 2 * second.host_memory // second.layers),  # two layers' on the device
    ]  # fmt: skip
    stages = [
        (name, tokens, count, part, operations, _activations(pipe.transformer, rows, passes) + stored)
        for name, tokens, count, part, operations, rows, stored in found
    ]
    decode_native = [] if space == "latent" else [("decode", native), ("encode", size)]
    for name, pixels in (*decode_native, ("decode", size)):
        operations, memory = _autoencoder(pipe.vae, name, pixels, frames)
        stages.append((f"{name} {pixels[0]} x {pixels[1]}", 0, 0, 1.0, operations, memory))
    total = sum(stage[4] for stage in stages)
    order = [0, 2, 3, 1, 4] if space == "pixel" else [0, 1, 2]
    listed = tuple(StageEstimate(*stages[i][:5], stages[i][4] / total, stages[i][5]) for i in order)
    stock = total - stages[1][4] + dense.operations * left * passes
    return HighResolutionEstimate(*size, native, listed, second.memory, stock / total, second.host_memory)


def check_store(found: int, on_host: bool, device: torch.device) -> None:
    """Refuse a store that is larger than the memory it is kept in.

    Args:
        found: its bytes.
        on_host: whether it lies in main memory.
        device: of the pipeline.

    Raises:
        DitAttnError: so it is.
    """
    where = torch.device("cpu") if on_host else device
    free = free_memory(where)
    if free is not None and found > free:
        remedy = "take store=fp8, offload=true or a smaller size" if where.type != "cpu" else (
            "take store=fp8, a smaller size, or override=none"
        )  # fmt: skip
        raise DitAttnError(
            f"what the twin pass leaves takes {_bytes(found)}, and {where.type} has {_bytes(free)} free; {remedy}"
        )


def _steps_left(scheduler: Any, steps: int, sigma: float) -> int:
    """Steps of the second stage; where the schedule depends on the call, those of evenly spaced levels."""
    try:
        return late_start.late_start(scheduler, late_start.ScheduleCall((steps,)), sigma).steps
    except DitAttnError:
        raise
    except Exception:  # a skeleton without a scheduler, or one that wants what only the pipeline's call knows
        return max(1, round(steps * sigma))


def _activations(model: torch.nn.Module, tokens: int, passes: int) -> int:
    """Bytes of the largest activations of a block: its input with q, k, v and the output, or with the widest layer."""
    widths = [module.out_features for module in model.modules() if isinstance(module, torch.nn.Linear)]
    queries = (getattr(module, "to_q", None) for module in model.modules())
    inner = max((module.out_features for module in queries if isinstance(module, torch.nn.Linear)), default=0)
    element = next(model.parameters()).element_size()
    return passes * tokens * element * max(5 * inner, inner + max(widths, default=0))


def _autoencoder(vae: Any, what: str, size: Size, frames: int | None) -> tuple[float, int]:
    """Operations of encoding or decoding, and bytes of its largest input and output together."""
    from accelerate import init_empty_weights
    from torch.utils.flop_counter import FlopCounterMode

    with init_empty_weights():
        model = type(vae).from_config(vae.config).eval()
    element, largest = next(vae.parameters()).element_size(), 0

    def note(module: Any, args: Any, out: Any) -> None:
        nonlocal largest
        tensors = [x for x in (*args, *(out if isinstance(out, tuple) else (out,))) if isinstance(x, torch.Tensor)]
        largest = max(largest, sum(x.numel() for x in tensors) * element)

    for module in model.modules():
        module.register_forward_hook(note)
    small = torch.zeros(1, 3, *(() if frames is None else (1,)), 32, 32, device="meta")
    with torch.no_grad():
        channels, *rest = model.encode(small).latent_dist.mode().shape[1:]
        side = 32 // rest[-1]
        if what == "decode":
            depth = () if frames is None else (frames,)
            value = torch.zeros(1, channels, *depth, size[0] // side, size[1] // side, device="meta")
        else:
            depth = () if frames is None else (_frames(vae, frames),)
            value = torch.zeros(1, 3, *depth, *size, device="meta")
        largest = 0
        with FlopCounterMode(display=False) as counter:
            getattr(model, what)(value)
    return float(counter.get_total_flops()), largest


def _frames(vae: Any, latents: int) -> int:
    """Frames of a clip with so many frames of latents."""
    factor = next(
        (int(value) for name in ("scale_factor_temporal", "temporal_compression_ratio")
         if (value := getattr(vae.config, name, None) or getattr(vae, name, None))), 4,
    )  # fmt: skip
    return (latents - 1) * factor + 1


def _bytes(count: float) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.1f} MiB"
