"""Inspect what attention does in a run: statistics per layer, head, step and guidance branch.

    from dit_attn import models
    from dit_attn.pipelines.inspect import inspect

    pipe = models.load("tiny-video")
    found = inspect(pipe, {"prompt": "a large purple circle moving left fast on black", "seed": 0})
    found.tensors["blocks_90"].nanmean((0, 2, 3))  # one number per layer
    found.save("outputs/inspect")

The statistics are measured on sampled query rows: no S x S matrix is built, a call costs rows x S, a few heads at a
time, and one number is stored per statistic, layer, head, step and branch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_attn import files
from dit_attn.api import observing
from dit_attn.errors import DitAttnError
from dit_attn.eval import attention_stats as stats
from dit_attn.pipelines.inspect.collector import BLOCK, ROWS, Collector
from dit_attn.pipelines.output import batch_of
from dit_attn.pipelines.transformers import transformers_of
from dit_attn.processors.attach.attach import session_of
from dit_attn.processors.core.layer import Layer
from dit_attn.processors.core.tokens import Tokens

TENSORS, META = "inspect.safetensors", "inspect.json"


@dataclass
class Inspection:
    """Statistics of the attention of one run.

    Attributes:
        tensors: by statistic, (branches, layers, steps, heads) fp32; NaN where there was no such call.
        meta: names along the axes, meaning of every tensor, and how it was made; JSON values.
        output: what the observed run returned; not saved.
    """

    tensors: dict[str, torch.Tensor]
    meta: dict[str, Any]
    output: Any = field(default=None, repr=False)

    def save(self, folder: str | Path) -> tuple[Path, Path]:
        """Write ``inspect.safetensors`` and ``inspect.json``, each atomically; returns their paths.

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
        """Read the files that :meth:`save` wrote.

        Raises:
            DitAttnError: a file is missing or damaged, or the two are not of one run.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        place = Path(folder).expanduser()
        try:
            meta = files.parse_json((place / META).read_bytes())
            tensors = load_file(place / TENSORS)
        except (OSError, ValueError, SafetensorError) as error:
            raise DitAttnError(
                f"{place} holds no inspection that can be read ({type(error).__name__}: {error}); it needs {META} and "
                f"{TENSORS} of one run of `dit-attn inspect`"
            ) from error
        if not isinstance(meta, dict) or list(meta.get("statistics", ())) != sorted(tensors):
            raise DitAttnError(f"{META} and {TENSORS} in {place} are not of one run; make them again")
        return cls(tensors, meta)


def inspect(
    pipe: Any,
    call_kwargs: dict[str, Any],
    *,
    rows: int = ROWS,
    block: int = BLOCK,
    seed: int = 0,
    overhead: bool = True,
) -> Inspection:
    """Run a pipeline and measure its attention; the output equals that of a run without measuring.

    Enabled methods stay enabled: the run is then theirs.

    Args:
        pipe: a stock pipeline.
        call_kwargs: arguments of its call; ``seed`` stands for a CPU generator of that seed.
        rows: query rows per attention call at most.
        block: tokens per block.
        seed: of the sampled rows.
        overhead: also make a plain run first, to record the cost of measuring and that the output is unchanged.

    Raises:
        DitAttnError: unsupported family, or the run has no self-attention call that can be measured.
    """
    call = dict(call_kwargs)
    if "seed" in call:
        call["generator"] = torch.Generator("cpu").manual_seed(call.pop("seed"))
    noise = _NoiseState(call.get("generator"))

    def run(**changes: Any) -> Any:
        noise.restore()
        return pipe(**{**call, **changes})

    if overhead and "num_inference_steps" in call:
        run(num_inference_steps=1)  # the first call of a process includes set-up
    return inspect_run(pipe, run, Collector(rows, block, seed, layer_namer(pipe)), overhead=overhead)


def inspect_run(pipe: Any, run: Callable[[], Any], collector: Collector, *, overhead: bool = True) -> Inspection:
    """Measure the attention of any function that runs the pipeline.

    Args:
        pipe: a stock pipeline.
        run: runs it, from the same noise every time.
        collector: gets the attention calls.
        overhead: also make a plain run first, see :func:`inspect`.

    Raises:
        DitAttnError: unsupported family, or the run has no self-attention call that can be measured.
    """
    timing: dict[str, Any] = {"plain_seconds": None, "overhead": None, "unchanged": None}
    if overhead:
        plain, timing["plain_seconds"] = _timed(run)
    with observing(pipe, collector):
        output, timing["observed_seconds"] = _timed(run)
    timing["watching_seconds"] = collector.seconds
    if overhead:
        timing["overhead"] = timing["observed_seconds"] / timing["plain_seconds"] - 1.0
        timing["unchanged"] = _equal(plain, output)
    tensors = collector.tensors()
    if not tensors:
        why = "; ".join(f"{count} x {reason}" for reason, count in collector.skipped.items()) or "no call at all"
        raise DitAttnError(f"no self-attention call of {type(pipe).__name__} could be measured ({why})")
    return Inspection(tensors, _meta(collector, tensors, timing), output)


def _meta(collector: Collector, tensors: dict[str, torch.Tensor], timing: dict[str, Any]) -> dict[str, Any]:
    """The facts of an inspection, as JSON values."""
    return {
        "what": "statistics of the exact softmax of sampled query rows; every tensor is (branch, layer, step, head), "
        "fp32, mean over the rows and over the calls of that step; NaN: no such call",
        "axes": collector.axes(),
        "rows": collector.rows,
        "block": collector.block,
        "seed": collector.seed,
        "calls": collector.calls,
        "skipped": dict(collector.skipped),
        "sequences": [_sequence(tokens) for tokens in collector.sequences if tokens is not None],
        "timing": dict(timing),  # not rounded: a short run's ratio must follow from its seconds
        "statistics": {
            name: {**vars(stats.describe(name)), "shape": list(tensor.shape)} for name, tensor in tensors.items()
        },
    }


def layer_namer(pipe: Any) -> Callable[[Layer], str]:
    """Return a function that names layers; the layers of a second transformer get the prefix ``transformer_2.``."""
    second = transformers_of(pipe).get("transformer_2")

    def name(layer: Layer) -> str:
        session = None if second is None else session_of(second)
        return f"transformer_2.{layer.name}" if session is not None and layer in session.layers else layer.name

    return name


def _sequence(tokens: Tokens) -> dict[str, Any]:
    spans = [{"kind": s.kind, "start": s.start, "stop": s.stop, "grid": s.grid} for s in tokens.spans]
    uniform = None
    if tokens.grid is not None:
        uniform = {name: stats.uniform_distance(size) for name, size in zip(("dt", "dh", "dw"), tokens.grid)}
    return {"seq_len": tokens.seq_len, "spans": spans, "grid": tokens.grid, "uniform_distance": uniform}


class _NoiseState:
    """The states of all random generators of a run, to start every run from the same noise."""

    def __init__(self, generators: Any) -> None:
        given = generators if isinstance(generators, (list, tuple)) else [generators]
        self._own = [(one, one.get_state()) for one in given if one is not None]
        self._cpu = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore(self) -> None:
        for generator, state in self._own:
            generator.set_state(state)
        torch.set_rng_state(self._cpu)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


def _timed(run: Callable[[], Any]) -> tuple[Any, float]:
    _synchronize()
    started = time.perf_counter()
    out = run()
    _synchronize()
    return out, time.perf_counter() - started


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _equal(a: Any, b: Any) -> bool:
    """Whether two results of a pipeline are equal bit for bit."""
    return all(np.array_equal(x, y) for x, y in zip(_arrays(a), _arrays(b), strict=True))


def _arrays(out: Any) -> list[np.ndarray]:
    made = batch_of(out)
    items = out if made is None else made.items
    items = items if isinstance(items, (list, tuple)) else [items]
    nested = [part for item in items for part in (item if isinstance(item, (list, tuple)) else [item])]
    return [x.float().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x) for x in nested]
