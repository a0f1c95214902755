"""What the items of one command share, and what became of each of them."""

from __future__ import annotations

import hashlib
import inspect
import platform
import shlex
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dit_attn
from dit_attn import contact_sheet
from dit_attn.cli import load_pipeline, model_source, outputs
from dit_attn.cli.load_pipeline import LoadConfig, parse_loras
from dit_attn.errors import DitAttnError

if TYPE_CHECKING:
    from dit_attn.cli.high_resolution import TwoStages
    from dit_attn.pipelines.run import Shard
    from dit_attn.processors.attach.summary import Summary
    from dit_attn.processors.methods.base import Method
    from dit_attn.remote import Place

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate")
# Frames per second the model was trained on, by the beginning of its pipeline's name, where its call does not say.
_FPS = {"Wan": 16, "SkyReels": 24, "Hunyuan": 24, "LTX": 24, "Mochi": 30, "Allegro": 15, "Cosmos": 24, "Kandinsky5": 24}
_FPS |= {"MiniMaxH3": 24}


@dataclass(frozen=True)
class ItemResult:
    """What became of one job.

    Attributes:
        index, prompt, seed: of the job.
        status: ``"done"``, ``"skipped"`` (there already) or ``"failed"``.
        file: path or address of the output, ``None`` when it failed.
        seconds: time of the pipeline call, ``None`` when it was not made.
        density: attention computed over the run, as a share of dense, dense steps included; ``None`` without a method.
        error: one line, for a failed item.
        warnings: what was requested of the pipeline and did not happen, one line each.
    """

    index: int
    prompt: str
    seed: int
    status: str
    file: str | None = None
    seconds: float | None = None
    density: float | None = None
    error: str | None = None
    warnings: tuple[str, ...] = ()


@dataclass
class Run:
    """Everything the items of one command share.

    Attributes:
        pipe: the pipeline, methods enabled.
        methods: what is enabled on it.
        watched: whether ``dit_attn.summary`` works on it.
        folder: where outputs go.
        setup: what decides the outputs besides the jobs (model, methods, precision ...); part of every job's hash.
        facts: what goes into every sidecar besides (command, versions, device).
        fps: frames per second of videos.
        results: filled as the run goes.
        tiles: cells of the contact sheet by index of the job, when there will be one.
        stages: every item is made in two stages; the methods are enabled in the second alone.
        last_summary: what the methods did in the last item that was made in stages.
    """

    pipe: Any
    methods: tuple[Method, ...]
    folder: Place
    setup: dict[str, Any]
    facts: dict[str, Any]
    fps: int
    watched: bool = False
    results: list[ItemResult] = field(default_factory=list)
    tiles: dict[int, contact_sheet.Tile] = field(default_factory=dict)
    stages: TwoStages | None = None
    last_summary: Summary | None = None


def new_run(
    load: LoadConfig,
    methods: tuple[Method, ...],
    folder: Place,
    argv: Sequence[str],
    fps: int | None = None,
    pipe: Any = None,
    stages: TwoStages | None = None,
) -> Run:
    """Make a run without results.

    Args:
        load: the pipeline, which need not be loaded yet.
        methods: what is enabled on it.
        folder: where outputs go.
        argv: the command line, for the sidecars.
        fps: frames per second of videos; ``None``: those of the model.
        pipe: the pipeline, if it is loaded.
        stages: how every item is made in two stages.
    """
    source = load.source
    setup = {
        "model": source.name,
        "revision": source.revision,
        "fingerprint": source.fingerprint,
        "pipeline": source.pipeline.__name__,
        "methods": [method.to_dict() for method in methods],
        "dtype": str(load.dtype).removeprefix("torch."),
        "variant": load.variant,
        "lora": [{**spec, "fingerprint": _fingerprint(spec["lora_id"])} for spec in parse_loras(load.lora)],
        "attention_backend": load.attention_backend,
        **({} if stages is None else {"high_resolution": stages.to_dict()}),
    }
    facts = {"device": _device_name(load.device), "versions": versions(), "command": shlex.join(["dit-attn", *argv])}
    fps = fps or frames_per_second(source.pipeline, source.kind == "embedded")
    return Run(pipe, methods, folder, setup, facts, fps, stages=stages)


def load_run(run: Run, load: LoadConfig, bar: bool = False) -> None:
    """Give a run its pipeline, with the methods enabled.

    Args:
        run: the run.
        load: what it was made of.
        bar: draw a bar over the steps, on terminals.

    Raises:
        DitAttnError: weights that cannot be loaded.
    """
    started = time.perf_counter()
    run.pipe = load_pipeline.load_pipeline(load, bar=bar)
    if run.methods and run.stages is None:
        dit_attn.enable(run.pipe, *run.methods)
    else:
        with suppress(DitAttnError):  # a family that cannot be watched is generated with all the same
            dit_attn.watch(run.pipe)
            run.watched = True
    load_pipeline.compile_pipeline(run.pipe, load.compile)
    run.facts["commit"] = load_pipeline.commit_of(load.source)
    run.facts["load_seconds"] = round(time.perf_counter() - started, 3)


def methods_enabled(run: Run) -> AbstractContextManager[Any]:
    """The methods of a run for the length of a block; without methods the pipeline stays stock, untouched."""
    return dit_attn.enabled(run.pipe, *run.methods) if run.methods else nullcontext()


def describe_setup(run: Run) -> dict[str, str]:
    """Return model, methods and folder as texts, for ``--dry-run``."""
    setup = run.setup
    return {
        "model": f"{setup['model']} ({setup['pipeline']}, {setup['dtype']}, {run.facts['device']})",
        "methods": "; ".join(outputs.to_json(method) for method in setup["methods"]) or "none (stock attention)",
        **({} if run.stages is None else {"stages": run.stages.describe()}),
        "folder": str(run.folder),
    }


def report(run: Run, seconds: float) -> dict[str, Any]:
    """Return the full run as JSON values: ``run.json`` and ``--json``."""
    counts = {status: sum(r.status == status for r in run.results) for status in ("done", "skipped", "failed")}
    return {
        "folder": str(run.folder),
        **counts,
        "seconds": round(seconds, 3),
        **run.setup,
        **run.facts,
        "items": [asdict(result) for result in run.results],
    }


def describe_shard(shard: Shard, digests: Sequence[str]) -> dict[str, Any]:
    """Return what a shard's report says of the run it is a part of.

    Args:
        shard: which part.
        digests: of the jobs of all parts, in order.
    """
    return {**asdict(shard), "items": len(digests), "jobs": hashlib.sha256("".join(digests).encode()).hexdigest()}


def versions() -> dict[str, str]:
    """Return the versions of what decides an output."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"dit_attn": dit_attn.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def frames_per_second(pipeline: type, embedded: bool) -> int:
    """Return the rate a video of this pipeline class is saved with when the user gives none: that it is made for."""
    if embedded:
        return 6
    parameters = inspect.signature(pipeline.__call__).parameters
    for name in ("frame_rate", "fps"):
        if name in parameters and isinstance(parameters[name].default, (int, float)):
            return round(parameters[name].default)
    return next((fps for start, fps in _FPS.items() if pipeline.__name__.startswith(start)), 8)


def _fingerprint(adapter: str) -> str | None:
    place = Path(adapter).expanduser()
    return model_source.fingerprint(place) if place.exists() else None


def _device_name(device: Any) -> str:
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)
