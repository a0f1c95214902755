"""Layer by step maps of ``dit-attn compare``: one more run of the first item by every method, not timed."""

from __future__ import annotations

import time
from typing import Any

from dit_attn.api import observing
from dit_attn.cli import outputs, runner
from dit_attn.cli.commands.compare.config import CompareConfig, job_of
from dit_attn.cli.progress import progress_bar
from dit_attn.errors import RunStopped, reason
from dit_attn.pipelines.compare import comparison
from dit_attn.pipelines.compare.attention_map import AttentionRecorder
from dit_attn.pipelines.compare.records import Variant, fits

FILE = "maps.json"  # in the folder of every variant
_TABLE = list[list[float | None]]
_TYPES: dict[str, Any] = {
    "prompt": str, "seed": int, "seconds": float, "layers": list[str], "steps": int, "rows": int, "density": _TABLE,
    "error": _TABLE,
}  # fmt: skip
_FAILURES = (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError)


def find_maps(config: CompareConfig) -> dict[str, dict[str, Any]]:
    """Find the maps of an earlier run of the same first job, by label."""
    found = {}
    for variant in config.variants:
        run = config.runs[variant.label]
        data = outputs.read_sidecar(run.folder / FILE)
        digest = job_of(variant, config.jobs[0]).digest(run.setup)
        if data.get("job_hash") == digest and _is_map(data.get("maps")):
            found[variant.label] = data["maps"]
    return found


def _is_map(data: Any) -> bool:
    """Tell whether this is what :func:`make_maps` writes; an edited file is made again."""
    if not isinstance(data, dict) or not all(name in data and fits(data[name], kind) for name, kind in _TYPES.items()):
        return False
    widths = [data["steps"]] * len(data["layers"])
    return all([len(row) for row in data[kind]] == widths for kind in ("density", "error"))


def missing(config: CompareConfig, maps: dict[str, dict[str, Any]]) -> list[Variant]:
    """Return the variants that make attention sparse and have no map yet."""
    sparse = [v for v in config.variants if any(method.role != "guidance" for method in v.methods)]
    return [variant for variant in sparse if variant.label not in maps]


def make_maps(config: CompareConfig, pipe: Any, variants: list[Variant]) -> dict[str, dict[str, Any]]:
    """Run the first job of every variant once more and record its attention; a failure is given under ``failed``.

    Raises:
        RunStopped: the disk is full.
    """
    maps: dict[str, dict[str, Any]] = {}
    with progress_bar(len(variants), "maps, not timed", "variant") as bar:
        for variant in variants:
            maps[variant.label] = _map_of(config, pipe, variant)
            bar.update()
    return maps


def _map_of(config: CompareConfig, pipe: Any, variant: Variant) -> dict[str, Any]:
    run, job = config.runs[variant.label], job_of(variant, config.jobs[0])
    recorder, started = AttentionRecorder(), time.perf_counter()
    try:
        with comparison.variant_enabled(pipe, variant), observing(pipe, recorder):
            runner.call_pipeline(pipe, job)
    except RunStopped:
        raise
    except _FAILURES as failure:
        return {"failed": f"{type(failure).__name__}: {reason(failure) if str(failure) else 'no message'}"}
    facts = {"prompt": job.prompt, "seed": job.seed, "seconds": round(time.perf_counter() - started, 3)}
    found = {**facts, **recorder.maps()}
    outputs.write_json({"job_hash": job.digest(run.setup), "maps": found}, run.folder / FILE)
    return found
