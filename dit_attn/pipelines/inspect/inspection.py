"""What attention does in a run: statistics per layer, head, step and guidance branch from samples of query rows.

    from dit_attn import models
    from dit_attn.pipelines.inspect.inspect import inspect

    pipe = models.load("tiny-video")
    found = inspect(pipe, {"prompt": "a large blue square moving right fast on white", "seed": 0})
    found.tensors["blocks_90"].nanmean((0, 2, 3))  # one number a layer
    found.save("outputs/inspect")

Nothing of S x S is built: a call costs rows x S, a few heads at a time, and what is kept is one number a statistic,
layer, head, step and branch.
"""

from __future__ import annotations

import json
import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dit_attn import files
from dit_attn.api import observing
from dit_attn.errors import DitAttnError
from dit_attn.eval import attention_stats as stats
from dit_attn.pipelines.compare.attention_map import picked_mask
from dit_attn.processors.core.call import AttentionCall, Request

if TYPE_CHECKING:
    from dit_attn.processors.core.layer import Layer
    from dit_attn.processors.core.tokens import Tokens

ROWS, BLOCK = 64, 64
AXES = ("branch", "layer", "step", "head")
TENSORS, META = "inspect.safetensors", "inspect.json"
_AT_ONCE = 1 << 25  # numbers of one kind in fp32 at a time
_Key = tuple[str, str, int, tuple[str, ...]]  # branch, layer, step, names of the statistics


@dataclass
class Inspection:
    """What was measured.

    Attributes:
        tensors: by statistic, (branches, layers, steps, heads) fp32; NaN where there was no such call.
        meta: names along the axes, meaning of every tensor, and how it was made; JSON values.
        output: what the observed run returned; not saved.
    """

    tensors: dict[str, torch.Tensor]
    meta: dict[str, Any]
    output: Any = field(default=None, repr=False)

    def save(self, folder: str | Path) -> tuple[Path, Path]:
        """Write ``inspect.safetensors`` and ``inspect.json``, whole or not at all; their paths.

        Raises:
            OSError: the folder cannot be written.
        """
        from safetensors.torch import save_file

        place = Path(folder)
        place.mkdir(parents=True, exist_ok=True)
        with files.atomic_path(place / TENSORS) as temporary:
            save_file(self.tensors, temporary, {"what": self.meta["what"]})
        files.write_json(place / META, self.meta)
        return place / TENSORS, place / META

    @classmethod
    def load(cls, folder: str | Path) -> Inspection:
        """What :meth:`save` wrote.

        Raises:
            DitAttnError: a file is missing or damaged, or the two do not belong together.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        place = Path(folder).expanduser()
        try:
            meta = json.loads((place / META).read_text(encoding="utf-8"))
            tensors = load_file(place / TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            raise DitAttnError(
                f"{place} holds no inspection that can be read ({type(error).__name__}: {error}); it needs {META} and "
                f"{TENSORS} of one run of `dit-attn inspect`"
            ) from error
        if not isinstance(meta, dict) or list(meta.get("statistics", ())) != sorted(tensors):
            raise DitAttnError(f"{META} and {TENSORS} in {place} are not of one run; make them again")
        return cls(tensors, meta)


class Collector:
    """An observer of attention calls (see :func:`dit_attn.observing`) that keeps means over sampled rows.

    Rows are those of the generated picture or clip (of the whole sequence where its parts are unknown), the same for
    all layers and branches of a step, others at the next step. The softmax looked at is the exact one of the call's q,
    k and mask, whether or not a method reads all of it.

    Args:
        rows: query rows per call at most.
        block: keys per block, and queries per block of the selection by means; blocks follow the sequence.
        seed: of the rows; the noise of the run is not touched.
        place: name of a layer, default its module path.
    """

    def __init__(
        self, rows: int = ROWS, block: int = BLOCK, seed: int = 0, place: Callable[[Layer], str] | None = None
    ) -> None:
        if rows < 1 or block < 1:
            raise DitAttnError(f"rows and block must be at least 1, got {rows} and {block}")
        self.rows, self.block, self.seed = rows, block, seed
        self.seen, self.seconds = 0, 0.0
        self.skipped: Counter[str] = Counter()
        self.sequences: dict[Tokens | None, None] = {}
        self._place = place or (lambda layer: layer.name)
        self._layers: dict[str, None] = {}
        self._found: dict[_Key, list[torch.Tensor]] = {}

    def __call__(self, call: AttentionCall, request: Request, out: torch.Tensor) -> None:
        """One attention call; ``out`` is (B, S, H, Dv)."""
        started = time.perf_counter()
        self.seen += 1
        reason = _unfit(call)
        if reason is not None:
            self.skipped[reason] += 1
            return
        layer = self._place(call.layer)
        self._layers.setdefault(layer)
        self.sequences.setdefault(call.tokens)
        picks = stats.sample_rows(*row_range(call), self.rows, self.seed + call.clock.step).to(call.q.device)
        found = measure(call, picks, self.block)
        values = torch.stack(list(found.values()), 1).cpu()  # (B, statistics, H)
        branches = call.branches or ("cond",) * len(values)
        for branch, value in zip(branches, values, strict=True):
            self._add((branch, layer, call.clock.step, tuple(found)), value)
        self.seconds += time.perf_counter() - started

    def _add(self, key: _Key, value: torch.Tensor) -> None:
        known = value.isfinite()
        new = [value.double().masked_fill(~known, 0.0), known.double()]
        old = self._found.get(key)
        self._found[key] = new if old is None else [a + b for a, b in zip(old, new, strict=True)]

    def tensors(self) -> dict[str, torch.Tensor]:
        """By statistic, (branches, layers, steps, heads) fp32, NaN where there was no such call."""
        axes = self.axes()
        names = sorted({name for *_, names in self._found for name in names})
        at = [{name: i for i, name in enumerate(axes[axis])} for axis in AXES[:3]]
        shape = tuple(len(axes[axis]) for axis in AXES)
        out = {name: torch.full(shape, torch.nan) for name in names}
        for (branch, layer, step, found), (total, count) in self._found.items():
            where = at[0][branch], at[1][layer], step
            mean = (total / count).float()  # 0 / 0 is NaN
            for name, row in zip(found, mean, strict=True):
                out[name][where][: len(row)] = row
        return out

    def axes(self) -> dict[str, list[str]]:
        """Names along the axes of :meth:`tensors`."""
        branches = sorted({key[0] for key in self._found}, key=lambda name: (name != "cond", name))
        steps = max((key[2] + 1 for key in self._found), default=0)
        heads = max((value.shape[-1] for value, _ in self._found.values()), default=0)
        numbered = {"step": [f"step {i + 1}" for i in range(steps)], "head": [f"head {i + 1}" for i in range(heads)]}
        return {"branch": branches, "layer": list(self._layers), **numbered}


def inspect(
    pipe: Any,
    call_kwargs: dict[str, Any],
    *,
    rows: int = ROWS,
    block: int = BLOCK,
    seed: int = 0,
    overhead: bool = True,
) -> Inspection:
    """Run a pipeline and measure its attention; what it makes is what it makes without.

    Methods that are on the pipeline stay on: the run is then theirs.

    Args:
        pipe: a stock pipeline.
        call_kwargs: arguments of its call; ``seed`` stands for a CPU generator of that seed.
        rows: query rows per attention call at most.
        block: tokens per block.
        seed: of the sampled rows.
        overhead: also make a plain run before, to say what watching costs and whether it changed anything.

    Raises:
        DitAttnError: unsupported family, or no self-attention call was seen.
    """
    call = dict(call_kwargs)
    if "seed" in call:
        call["generator"] = torch.Generator("cpu").manual_seed(call.pop("seed"))
    noise = _Noise(call.get("generator"))

    def run(**changes: Any) -> Any:
        noise.rewind()
        return pipe(**{**call, **changes})

    if overhead and "num_inference_steps" in call:
        run(num_inference_steps=1)  # the first call of a process pays for set-up
    return watch(pipe, run, Collector(rows, block, seed, namer(pipe)), overhead=overhead)


def watch(pipe: Any, run: Callable[[], Any], collector: Collector, *, overhead: bool = True) -> Inspection:
    """:func:`inspect` for any function that runs the pipeline, from the same noise every time.

    Raises:
        DitAttnError: unsupported family, or no self-attention call was seen.
    """
    timing: dict[str, Any] = {"plain_seconds": None, "overhead": None, "unchanged": None}
    if overhead:
        plain, timing["plain_seconds"] = _timed(run)
    with observing(pipe, collector):
        output, timing["observed_seconds"] = _timed(run)
    timing["watching_seconds"] = collector.seconds
    if overhead:
        timing["overhead"] = timing["observed_seconds"] / timing["plain_seconds"] - 1.0
        timing["unchanged"] = _same(plain, output)
    tensors = collector.tensors()
    if not tensors:
        why = "; ".join(f"{count} x {reason}" for reason, count in collector.skipped.items()) or "no call at all"
        raise DitAttnError(f"no self-attention call of {type(pipe).__name__} could be measured ({why})")
    return Inspection(tensors, describe(collector, tensors, timing), output)


def describe(collector: Collector, tensors: dict[str, torch.Tensor], timing: dict[str, Any]) -> dict[str, Any]:
    """The facts of an inspection, as JSON values."""
    return {
        "what": "statistics of the exact softmax of sampled query rows; every tensor is (branch, layer, step, head), "
        "fp32, mean over the rows and over the calls of that step; NaN: no such call",
        "axes": collector.axes(),
        "rows": collector.rows,
        "block": collector.block,
        "seed": collector.seed,
        "calls": collector.seen,
        "skipped": dict(collector.skipped),
        "sequences": [_sequence(tokens) for tokens in collector.sequences if tokens is not None],
        "timing": dict(timing),  # not rounded: a short run's ratio must follow from its seconds
        "statistics": {
            name: {**vars(stats.describe(name)), "shape": list(tensor.shape)} for name, tensor in tensors.items()
        },
    }


@torch.no_grad()
def measure(call: AttentionCall, picks: torch.Tensor, block: int) -> dict[str, torch.Tensor]:
    """Statistics of the rows ``picks`` (R,) of a call by name, (B, H) each; a few heads at a time."""
    batch, length, kv_heads, dim = call.k.shape
    group = call.q.shape[2] // kv_heads
    mask = picked_mask(call, picks)
    spans, grid = spans_of(call), _grid_of(call, picks)
    at_once = max(1, _AT_ONCE // (batch * length * max(dim, group * len(picks))))
    parts: dict[str, list[torch.Tensor]] = {}
    for low in range(0, kv_heads, at_once):
        heads = slice(low * group, (low + at_once) * group)
        q, k = call.q[:, :, heads], call.k[:, :, low : low + at_once]
        part = mask if mask is None or mask.shape[1] == 1 else mask[:, heads]
        logits = stats.row_logits(q[:, picks], k, call.scale, part)
        readable = (logits > -torch.inf).any(2).any(1)
        scores = stats.mean_scores(_block_means(call, q, picks, block), k.float(), block, readable)
        for name, value in stats.row_statistics(logits, spans, grid, block, scores).items():
            parts.setdefault(name, []).append(value)
    return {name: torch.cat(values, 1) for name, values in parts.items()}


def row_range(call: AttentionCall) -> tuple[int, int]:
    """First and last + 1 of the tokens of the generated picture or clip; the whole sequence where it is unknown."""
    for span in () if call.tokens is None else call.tokens.spans:
        if span.kind in ("video", "image"):
            return span.start, span.stop
    return 0, call.q.shape[1]


def spans_of(call: AttentionCall) -> list[tuple[str, int, int]]:
    """(name, start, stop) of the parts of the sequence; a second part of one kind is ``KIND.2``."""
    found, kinds = [], Counter[str]()
    for span in () if call.tokens is None else call.tokens.spans:
        kinds[span.kind] += 1
        number = kinds[span.kind]
        found.append((span.kind if number == 1 else f"{span.kind}.{number}", span.start, span.stop))
    return found


def namer(pipe: Any) -> Callable[[Layer], str]:
    """Names of layers; those of a second transformer say so."""
    second = getattr(pipe, "transformer_2", None)

    def name(layer: Layer) -> str:
        return f"transformer_2.{layer.name}" if second is not None and layer.session.model is second else layer.name

    return name


def _unfit(call: AttentionCall) -> str | None:
    """Why a call is not measured, or ``None``."""
    if call.q.shape[1] != call.k.shape[1]:
        return "cross attention"
    return "causal attention" if call.causal else None


def _grid_of(call: AttentionCall, picks: torch.Tensor) -> tuple[int, tuple[int, int, int], torch.Tensor] | None:
    for span in () if call.tokens is None else call.tokens.spans:
        if span.kind in ("video", "image"):
            return None if span.grid is None else (span.start, span.grid, picks - span.start)
    return None


def _block_means(call: AttentionCall, q: torch.Tensor, picks: torch.Tensor, block: int) -> torch.Tensor:
    """(B, R, H, D) fp32, the mean query of the block of visual rows that each picked row lies in."""
    start, stop = (call.tokens.visual_range if call.tokens is not None else None) or row_range(call)
    numbers, where = ((picks - start) // block).unique(return_inverse=True)
    rows = start + numbers[:, None] * block + torch.arange(block, device=q.device)
    inside = (rows < stop).float()
    weight = (inside / inside.sum(1, keepdim=True))[None, :, :, None, None]
    means = (q[:, rows.clamp(max=stop - 1)].float() * weight).sum(2)
    return means[:, where]


def _sequence(tokens: Tokens) -> dict[str, Any]:
    spans = [{"kind": s.kind, "start": s.start, "stop": s.stop, "grid": s.grid} for s in tokens.spans]
    uniform = None
    if tokens.grid is not None:
        uniform = {name: stats.uniform_distance(size) for name, size in zip(("dt", "dh", "dw"), tokens.grid)}
    return {"seq_len": tokens.seq_len, "spans": spans, "grid": tokens.grid, "uniform_distance": uniform}


class _Noise:
    """Generators of a run as they are now, to start every run from the same noise."""

    def __init__(self, generators: Any) -> None:
        given = generators if isinstance(generators, (list, tuple)) else [generators]
        self._own = [(one, one.get_state()) for one in given if one is not None]
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def rewind(self) -> None:
        for generator, state in self._own:
            generator.set_state(state)
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    _wait()
    started = time.perf_counter()
    out = run()
    _wait()
    return out, time.perf_counter() - started


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _same(a: Any, b: Any) -> bool:
    """Whether two results of a pipeline are equal bit for bit."""
    return all(np.array_equal(x, y) for x, y in zip(_arrays(a), _arrays(b), strict=True))


def _arrays(out: Any) -> list[np.ndarray]:
    for name in ("frames", "images"):
        out = getattr(out, name, out)
    items = out if isinstance(out, (list, tuple)) else [out]
    nested = [part for item in items for part in (item if isinstance(item, (list, tuple)) else [item])]
    return [x.float().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in nested]
