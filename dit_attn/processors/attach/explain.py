"""Estimate what a method can gain on a model at a size, before a run.

The figures are arithmetic, not measurements: floating-point operations of the linear layers and of attention, and from
them the upper bound of the speed-up (Amdahl) if skipped work cost nothing and all other work ran at the same rate.
"""

from __future__ import annotations

import inspect
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach import attach
from dit_attn.processors.attach.decision import run_device, sequence_length, settle
from dit_attn.processors.attach.families import Family, family_of
from dit_attn.processors.attach.layer_shape import compute_dtype, head_count, head_size
from dit_attn.processors.attach.sites import eligible_layers
from dit_attn.processors.attach.value_table import html_table, methods_text, percent, text_table
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.executor import MIN_TOKENS
from dit_attn.processors.core.kernel_choice import expected_kernel
from dit_attn.processors.methods.base import Method, resolve_count
from dit_attn.processors.methods.head_budget import is_full
from dit_attn.processors.methods.presets import PresetUse, preset_for, preset_use

_STEPS = 50  # assumed, where no pipeline says how many


@dataclass(frozen=True, repr=False)
class Explanation:
    """Estimate for one transformer call and one run. Prints as a table; ``to_dict()`` gives JSON values.

    Attributes:
        family: row of the family table.
        preset: preset that matches this very model, or ``None``.
        grid: (T, H, W) visual tokens.
        tokens: visual tokens of one sequence.
        layers: number of attention layers that can be wrapped.
        attention_share: attention's fraction of the floating-point operations of a step, in [0, 1].
        density: mean attention computed over a run, as a fraction of dense, with dense steps and layers; ``None`` where
            it depends on the data.
        attention_speedup: upper bound for attention.
        speedup: upper bound for the full step (Amdahl).
        fallbacks: what will use stock attention, and why.
        methods: settings of the methods.
        memory: bytes the methods store from step to step, for one sample with classifier-free guidance.
        host_memory: bytes of those that are in main memory.
        guidance: what a guidance method adds: ``heads`` and ``blocks`` it perturbs, ``passes`` per step of the run (a
            pass is one sample through the transformer), and their ``work`` without the blocks that are reused or
            skipped; ``None`` without one.
        presets: for methods whose settings are those of ``preset``, but for the ``changed`` ones.
        steps: of the run.
        operations: floating-point operations of one dense pass of one sample.
        decision: what the method ``auto`` picks, and why, in words under ``text``; ``None`` without it.
        kernel: kernel of plain sparse calls and why, where a property of this machine decides on it; else empty.
    """

    family: str
    preset: str | None
    grid: tuple[int, int, int]
    tokens: int
    layers: int
    attention_share: float
    density: float | None
    attention_speedup: float | None
    speedup: float | None
    fallbacks: tuple[str, ...]
    methods: tuple[dict[str, Any], ...]
    memory: int = 0
    host_memory: int = 0
    guidance: dict[str, float] | None = None
    presets: tuple[PresetUse, ...] = ()
    steps: int = _STEPS
    operations: float = 0.0
    decision: dict[str, Any] | None = None
    kernel: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    def __repr__(self) -> str:
        found = [methods_text(self.methods, self.presets), f"{self.tokens:,} tokens"]
        if self.density is None:
            found.append("density decided by the data")
        elif self._sparse:
            found.append(f"density {percent(self.density)}, up to {self.speedup:.2f}x for a step")
        return f"<Explanation: {', '.join(found)}>"

    def __str__(self) -> str:
        return text_table(self._rows(), label=14)

    def _repr_html_(self) -> str:
        return html_table(self._rows())

    @property
    def _sparse(self) -> bool:
        """Whether the density says anything: without a sparse method it is 1."""
        return self.density != 1.0 or (bool(self.methods) and self.guidance is None)

    def _rows(self) -> list[tuple[str, str]]:
        t, h, w = self.grid
        rows = [
            (
                "family",
                self.family + (f" (preset {self.preset})" if self.preset else " (no preset for this checkpoint)"),
            ),
            *(("preset", str(use)) for use in self.presets),
            *((("auto", self.decision["text"]),) if self.decision is not None else ()),
            ("visual tokens", f"{self.tokens:,} = {t} x {h} x {w}"),
            ("layers", f"{self.layers} attention layers can be wrapped"),
            ("attention", f"{percent(self.attention_share)} of the operations of a step"),
        ]
        if self.density is not None and self.speedup is not None and self._sparse:
            bound = f"{self.attention_speedup:.2f}x for attention, {self.speedup:.2f}x for a step"
            rows += [
                ("density", f"{percent(self.density)} of dense attention over {self.steps} steps"),
                ("upper bound", f"{bound}, by the number of operations"),
            ]
        if self.kernel:
            rows.append(("kernel", self.kernel))
        if self.memory:
            stored = f"{_bytes(self.memory)} stored from step to step (one sample, both branches)"
            there = f", {_bytes(self.host_memory)} of it in main memory" if self.host_memory else ""
            rows.append(("memory", stored + there))
        if self.guidance is not None:
            rows.append(("guidance", _guidance_line(self.guidance)))
        rows += [("fallback", reason) for reason in self.fallbacks]
        return rows


def explain_run(
    model: torch.nn.Module,
    pipe: Any,
    methods: tuple[Method, ...],
    height: int | None,
    width: int | None,
    num_frames: int | None,
    num_inference_steps: int | None = None,
) -> Explanation:
    """Estimate a run; arguments as for :func:`dit_attn.explain`."""
    family = family_of(model)
    given = {"height": height, "width": width, "num_frames": num_frames, "num_inference_steps": num_inference_steps}
    for name, value in given.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise DitAttnError(f"{name} must be a whole number of at least 1, got {value!r}")
    grid = visual_grid(model, pipe, height, width, num_frames)
    tokens = grid[0] * grid[1] * grid[2]
    names = eligible_layers(model, family)
    for method in methods:
        method.kept({name: head_count(model.get_submodule(name)) for name in names})
        method.check_model(type(model).__name__, len(names))
        method.check_heads(type(model).__name__, [head_count(model.get_submodule(name)) for name in names])
    attention, linear = _operations(model, family, names, tokens)
    part = attention / (attention + linear)
    steps = num_inference_steps or _call_default(pipe, "num_inference_steps") or _STEPS
    settled, decision = settle(model, methods, names, grid, steps)
    density, fallbacks = _expected_density(settled, len(names), grid, steps)
    pair = getattr(pipe, "transformer_2", None) is not None
    preset = preset_for(model, pair=pair)
    return Explanation(
        family=family.name,
        preset=preset.name if preset else None,
        grid=grid,
        tokens=tokens,
        layers=len(names),
        attention_share=part,
        density=density,
        attention_speedup=1.0 / density if density else None,
        speedup=1.0 / (1.0 - part + part * density) if density else None,
        fallbacks=fallbacks,
        methods=tuple(method.to_dict() for method in methods),
        memory=_memory(model, settled, names, tokens),
        host_memory=_memory(model, tuple(one for one in settled if one.cache_on_host), names, tokens),
        guidance=_guidance(model, methods),
        presets=tuple(use for method in methods if (use := preset_use(method, model, pair))),
        steps=steps,
        operations=attention + linear,
        decision=decision.to_dict() if decision is not None else None,
        kernel=_kernel(model, settled, names, tokens),
    )


def _kernel(model: torch.nn.Module, methods: tuple[Method, ...], names: list[str], tokens: int) -> str:
    """The kernel of the sparse method's calls, of a quarter of the blocks where its settings do not say how many."""
    sparse = next((method for method in methods if method.role == "sparse"), None)
    if sparse is None or not names:
        return ""
    layer, budget = model.get_submodule(names[0]), getattr(sparse, "density", None)
    density = budget if isinstance(budget, float) else 0.25
    seq_len = sequence_length(names, tokens)
    return expected_kernel(run_device(model), compute_dtype(layer), head_size(layer), seq_len, density)


def visual_grid(
    model: torch.nn.Module, pipe: Any, height: int | None, width: int | None, num_frames: int | None
) -> tuple[int, int, int]:
    """Return the (T, H, W) tokens of an image or video of the given size.

    Args:
        model: the transformer.
        pipe: the pipeline, whose autoencoder gives the compression; without one that of the family's row (4 in time).
        height, width: pixels; default: the pipeline's own.
        num_frames: frames; default: the pipeline's own, 1 for images.

    Raises:
        DitAttnError: a size under one token.
    """
    config, family = cast(Any, model.config), family_of(model)
    names = ("vae_scale_factor_spatial", "vae_spatial_compression_ratio", "vae_scale_factor")
    times = ("vae_scale_factor_temporal", "vae_temporal_compression_ratio")
    space = _first(pipe, names, family.latent_pixels)
    frames_per_latent = _first(pipe, times, family.latent_frames)
    patch = _patch_size(config)
    patch = (patch[0], patch[1] * family.packing, patch[2] * family.packing)
    sample = config.get("sample_size") or config.get("sample_height") or 64
    side = (sample if isinstance(sample, int) else max(sample)) * space
    height = height or _call_default(pipe, "height") or width or side
    width = width or _call_default(pipe, "width") or height
    frames = num_frames or _call_default(pipe, "num_frames") or 81
    latent_frames = _latent_frames(frames, frames_per_latent, family.chunk_frames) if _is_video(model) else 1
    cells = [(size, space * side) for size, side in zip((height, width), patch[1:])]
    rows, columns = ((size + cell - 1) // cell if family.pads else size // cell for size, cell in cells)
    grid = (max(latent_frames // patch[0], 1), rows, columns)
    if min(grid) < 1:
        raise DitAttnError(
            f"{height} x {width} is smaller than one token ({space * patch[1]} pixels); give a larger size"
        )
    return grid


def _latent_frames(frames: int, each: int, chunk: int) -> int:
    """Latent frames of some frames; the first one stands for itself, and with chunks the first one of each.

    With chunks, pipelines round frames up to whole ones and the two latent frames of another.
    """
    if not chunk:
        return frames // each + 1
    chunks = max(0, -(-(frames - 1 - each) // chunk))
    return chunks * ((chunk - 1) // each + 1) + 2


def _is_video(model: torch.nn.Module) -> bool:
    from dit_attn.processors.attach.families import conditioned_video, video

    return any(family_of(model).name == row.name for row in (*video.FAMILIES, *conditioned_video.FAMILIES))


def _patch_size(config: Any) -> tuple[int, int, int]:
    patch = config.get("patch_size") or config.get("latent_patch_size") or 1
    if isinstance(patch, (tuple, list)):
        return (patch[0], patch[1], patch[2]) if len(patch) == 3 else (1, patch[0], patch[1])
    return (config.get("patch_size_t") or 1, patch, patch)


def _first(source: Any, names: tuple[str, ...], default: int) -> int:
    for name in names:
        value = getattr(source, name, None)
        if isinstance(value, int):
            return value
    return default


def _call_default(pipe: Any, name: str) -> int | None:
    """Default of an argument of the pipeline's call, e.g. 480 for Wan's height."""
    parameter = inspect.signature(type(pipe).__call__).parameters.get(name) if pipe is not None else None
    return parameter.default if parameter is not None and isinstance(parameter.default, int) else None


def _operations(model: torch.nn.Module, family: Family, names: list[str], tokens: int) -> tuple[float, float]:
    """Multiply-add operations x 2 of attention and of the linear layers, for one sequence of one step."""
    seq_len = sequence_length(names, tokens)
    attention = 0.0
    for name in names:
        module: Any = model.get_submodule(name)
        attention += 4.0 * seq_len * seq_len * (head_count(module) or 1) * head_size(module)
    blocks = {name.split(".")[0] for name in names}
    linear = sum(
        2.0 * module.weight.numel() * seq_len
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.split(".")[0] in blocks
    )
    return attention, linear


def stored_memory(
    model: torch.nn.Module, pipe: Any, method: Method, height: int | None, width: int | None, num_frames: int | None
) -> int:
    """Return the bytes that a method stores from step to step, as an explanation has them; no layout is built.

    Args:
        model: the transformer.
        pipe: its pipeline.
        method: the method.
        height, width: in pixels.
        num_frames: of videos.
    """
    grid = visual_grid(model, pipe, height, width, num_frames)
    if not method.twin_at(grid):
        return 0
    return _memory(model, (method,), eligible_layers(model, family_of(model)), grid[0] * grid[1] * grid[2])


def _memory(model: torch.nn.Module, methods: tuple[Method, ...], names: list[str], tokens: int) -> int:
    """Bytes stored from step to step, for the two branches of one sample; dense layers store nothing."""
    element = next(model.parameters()).element_size()
    total = 0
    for method in methods:
        dense = getattr(method, "dense_layers", ())
        for name in (name for index, name in enumerate(names) if index not in dense):
            module: Any = model.get_submodule(name)
            total += 2 * method.cache_bytes(tokens, head_count(module) or 1, head_size(module), element)
    return total


def _guidance(model: torch.nn.Module, methods: tuple[Method, ...]) -> dict[str, float] | None:
    """What the guidance method among ``methods`` adds to a run.

    Raises:
        DitAttnError: it names a layer, head or block the model does not have.
    """
    guider = attach.prepare(model, methods, Clock()).guider
    if guider is None:
        return None
    plan, method = guider.plan, guider.method
    guided = 0.0 if plan.empty or not method.scale else (method.stop - method.start) / method.interval
    reused = 0 if plan.empty or not method.share_prefix or method.batched else guider.first_block
    left_out = {*guider.blocks[:reused], *plan.skipped}
    return {
        "heads": sum(len(heads) for heads in plan.strengths.values()),
        "blocks": len(plan.skipped) or len(plan.strengths),
        "passes": guided,
        "work": guided * (1.0 - len(left_out) / len(guider.blocks)),
    }


def _bytes(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _guidance_line(found: dict[str, float]) -> str:
    what = f"{found['heads']:.0f} heads in {found['blocks']:.0f} layers" if found["heads"] else (
        f"{found['blocks']:.0f} blocks skipped"
    )  # fmt: skip
    passes, work = found["passes"], found["work"]
    return (
        f"{what}; evaluations per step: {1 + passes:.2f} alone, {2 + passes:.2f} with CFG; "
        f"blocks run: x{1 + work:.2f} alone, x{1 + work / 2:.2f} with CFG"
    )


def _expected_density(
    methods: tuple[Method, ...], layers: int, grid: tuple[int, int, int], steps: int
) -> tuple[float | None, tuple[str, ...]]:
    """Mean density over a run, and the fallbacks."""
    tokens = grid[0] * grid[1] * grid[2]
    fallbacks = ["cross attention and text refiners: never wrapped"]
    if tokens < MIN_TOKENS:
        return 1.0, (*fallbacks, f"all calls: sequence under {MIN_TOKENS} tokens")
    sparse: Any = next((method for method in methods if method.role == "sparse"), None)
    if sparse is None:
        return 1.0, tuple(fallbacks)
    dense = resolve_count(sparse.dense_steps, steps) + resolve_count(sparse.dense_last_steps, steps)
    if dense:
        fallbacks.append(f"{dense} of {steps} steps: dense by setting")
    if sparse.dense_layers:
        fallbacks.append(f"layers {', '.join(map(str, sparse.dense_layers))}: dense by setting")
    if sparse.densities and (dense_fraction := sum(map(is_full, sparse.densities)) / len(sparse.densities)):
        fallbacks.append(f"{100 * dense_fraction:.0f} % of the layers and parts of the run: density 1 by setting")
    expected = sparse.density_at(grid)
    if expected is None:
        bound = getattr(sparse, "target_error", None)
        why = "top_p" if bound is None else f"target_error {bound:g}, from {percent(sparse.density)} up"
        return None, (*fallbacks, f"density: decided by the data ({why})")
    part = (1 - min(dense, steps) / steps) * (1 - len(sparse.dense_layers) / layers)
    return part * expected + (1 - part), tuple(fallbacks)
