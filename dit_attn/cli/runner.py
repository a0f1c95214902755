"""Running the jobs of one command: one after the other, each saved as soon as it is there."""

from __future__ import annotations

import platform
import shlex
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dit_attn
from dit_attn.cli import load, outputs, sheet, source
from dit_attn.cli.args import reason
from dit_attn.cli.jobs import Job, load_picture
from dit_attn.cli.outputs import Media
from dit_attn.errors import DitAttnError, RunStopped

if TYPE_CHECKING:
    from dit_attn.cli.source import Source
    from dit_attn.processors.method import Method

_PACKAGES = ("torch", "diffusers", "transformers", "accelerate")
# Frames per second the model was trained on, by the beginning of its pipeline's name.
_FPS = {"Wan": 16, "SkyReels": 24, "Hunyuan": 24, "LTX": 24, "Mochi": 30, "Allegro": 15, "Cosmos": 24, "Kandinsky5": 24}


@dataclass(frozen=True)
class ItemResult:
    """What became of one job.

    Attributes:
        index, prompt, seed: of the job.
        status: ``"done"``, ``"skipped"`` (was there already) or ``"failed"``.
        file: path of the output, ``None`` when it failed.
        seconds: time of the pipeline call, ``None`` when it was not made.
        density: executed share of the attention map over the run, dense steps included; ``None`` without a method.
        error: one line, for a failed item.
        warnings: what the pipeline was asked for and did not do, one line each.
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
        pipe: the pipeline, methods on.
        methods: what is on it.
        watched: whether ``dit_attn.summary`` can be asked of it.
        folder: where outputs go.
        setup: what decides the outputs besides the jobs (model, methods, precision ...); part of every job's hash.
        facts: what goes into every sidecar besides (command, versions, device).
        fps: frames per second of videos.
        results: filled as the run goes.
        tiles: cells of the contact sheet, when there will be one.
    """

    pipe: Any
    methods: tuple[Method, ...]
    folder: Path
    setup: dict[str, Any]
    facts: dict[str, Any]
    fps: int
    watched: bool = False
    results: list[ItemResult] = field(default_factory=list)
    tiles: list[sheet.Tile] = field(default_factory=list)


def new_run(
    pipe: Any,
    model: Source,
    methods: tuple[Method, ...],
    options: dict[str, Any],
    dtype: Any,
    device: Any,
    folder: Path,
    argv: list[str],
) -> Run:
    """A run without results.

    Args:
        pipe: the pipeline, or ``None`` when it is not loaded yet.
        model: where it comes from.
        methods: what is on it.
        options: flags that decide outputs (variant, lora, attention_backend, fps).
        dtype, device: of the weights.
        folder: where outputs go.
        argv: the command line, for the sidecars.
    """
    loras = options.get("lora", [])
    setup = {
        "model": model.name,
        "revision": model.revision,
        "fingerprint": model.fingerprint,
        "pipeline": model.pipeline.__name__,
        "methods": [method.to_dict() for method in methods],
        "dtype": str(dtype).removeprefix("torch."),
        "variant": options.get("variant"),
        "lora": [{**spec, "fingerprint": _fingerprint(spec["lora_id"])} for spec in load.parse_loras(loras)],
        "attention_backend": options.get("attention_backend"),
    }
    facts = {"device": _device_name(device), "versions": versions(), "command": shlex.join(["dit-attn", *argv])}
    fps = options.get("fps") or frames_per_second(model.pipeline, model.kind == "embedded")
    return Run(pipe, methods, folder, setup, facts, fps)


def find_finished(jobs: list[Job], folder: Path, setup: dict[str, Any]) -> dict[int, Path]:
    """Outputs that are there already, by job index."""
    found = {}
    for job in jobs:
        digest = job.digest(setup)
        path = outputs.finished(folder, outputs.place(folder, job.stem, digest), digest)
        if path is not None:
            found[job.index] = path
    return found


def run_jobs(
    run: Run, jobs: list[Job], done: dict[int, Path], with_sheet: bool, say: Callable[[str], None]
) -> list[ItemResult]:
    """Make every job's output. A failed item does not stop the others.

    Args:
        run: what the items share.
        jobs: all jobs, in order.
        done: outputs to skip, by job index.
        with_sheet: collect cells for the contact sheet.
        say: called with one line per item.

    Raises:
        DitAttnError: outputs cannot be written (full disk); what is finished stays.
        KeyboardInterrupt: no half file is left.
    """
    from tqdm import tqdm

    bar = tqdm(total=len(jobs), desc="items", unit="item", disable=not sys.stderr.isatty() or len(jobs) < 2)
    with bar:
        for job in jobs:
            if job.index in done:
                result, media = _skipped(job, done[job.index], with_sheet)
            else:
                result, media = _attempt(run, job)
            run.results.append(result)
            if with_sheet and media is not None:
                run.tiles.append(sheet.tile(media, job.prompt, _note(result)))
            bar.clear()
            say(describe_item(result, len(jobs)))
            bar.update()
    return run.results


def warn(told: Iterable[str], total: int) -> None:
    """Print each warning of a command's items once, with how many of ``total`` items it is about."""
    for text, count in Counter(told).items():
        print(f"dit-attn: warning: {text} ({count} of {total} items)", file=sys.stderr)


def describe_item(result: ItemResult, total: int) -> str:
    """The line printed for an item."""
    head = f"[{result.index + 1}/{total}]"
    if result.status == "failed":
        return f"{head} failed: {result.error} (prompt {result.prompt!r}, seed {result.seed})"
    if result.status == "skipped":
        return f"{head} {result.file}  already there"
    density = f", density {result.density:.2f}" if result.density is not None else ""
    return f"{head} {result.file}  {result.seconds:.1f} s{density}"


def call_pipeline(pipe: Any, job: Job) -> tuple[Media, float]:
    """One pipeline call with its own CPU generator; the media and the seconds it took.

    Raises:
        outputs.NotFinite: NaN in the output.
    """
    import inspect

    import torch

    arguments = {**job.call, **{key: load_picture(path, key) for key, path in job.pictures().items()}}
    taken = inspect.signature(type(pipe).__call__).parameters
    arguments |= {"prompt": job.prompt, "generator": torch.Generator("cpu").manual_seed(job.seed)}
    if "output_type" in taken:
        arguments["output_type"] = "np"
    _synchronize(torch)
    started = time.perf_counter()
    result = pipe(**arguments)
    _synchronize(torch)
    return outputs.media_of(result), time.perf_counter() - started


def versions() -> dict[str, str]:
    """Versions of what decides an output."""
    from importlib.metadata import PackageNotFoundError, version

    found = {"dit_attn": dit_attn.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def frames_per_second(pipeline: type, embedded: bool) -> int:
    """The rate a video of this pipeline class is saved with when the user gives none."""
    name = pipeline.__name__
    return 6 if embedded else next((fps for start, fps in _FPS.items() if name.startswith(start)), 8)


def _attempt(run: Run, job: Job) -> tuple[ItemResult, Media | None]:
    head = (job.index, job.prompt, job.seed)
    try:
        media, seconds = call_pipeline(run.pipe, job)
        return save_item(run, job, media, seconds), media
    except RunStopped:
        raise
    except Exception as error:  # whatever one item does, the others go on; the line names it
        if "--debug" in sys.argv:
            import traceback

            traceback.print_exc()
        said = isinstance(error, (outputs.NotFinite, DitAttnError))
        why = reason(error) if said else f"{type(error).__name__}: {reason(error)}"
        return ItemResult(*head, "failed", error=_hint(why, error)), None


def save_item(run: Run, job: Job, media: Media, seconds: float) -> ItemResult:
    """Write the output and its sidecar; the methods must still be on the pipeline, for their summary."""
    digest = job.digest(run.setup)
    stem = outputs.place(run.folder, job.stem, digest)
    path = run.folder / f"{stem}{media.ending}"
    seen = dit_attn.summary(run.pipe) if run.methods or run.watched else None
    summary = seen if run.methods else None
    warnings = seen.warnings if seen else ()
    settings = {"prompt": job.prompt, "seed": job.seed, "call": job.call, **run.setup}
    outputs.write_media(media, path, run.fps, {"prompt": job.prompt, "dit_attn": outputs.to_json(settings)})
    sidecar = {
        "file": path.name,
        "sha256": outputs.sha256(path),
        "job_hash": digest,
        "kind": "video" if media.video else "image",
        "size": list(media.frames.shape[:3] if media.video else media.frames.shape[1:3]),
        "fps": run.fps if media.video else None,
        **settings,
        **run.facts,
        "seconds": round(seconds, 4),
        "summary": summary.to_dict() if summary else None,
        "warnings": list(warnings),
    }
    outputs.write_json(sidecar, run.folder / f"{stem}.json")
    density = summary.run_density if summary else None
    done = (job.index, job.prompt, job.seed, "done", str(path), round(seconds, 4), density)
    return ItemResult(*done, warnings=warnings)


def _skipped(job: Job, path: Path, with_sheet: bool) -> tuple[ItemResult, Media | None]:
    sidecar = outputs.read_sidecar(path.with_suffix(".json"))
    density = (sidecar.get("summary") or {}).get("run_density")
    head = (job.index, job.prompt, job.seed, "skipped", str(path), sidecar.get("seconds"), density)
    result = ItemResult(*head, warnings=tuple(sidecar.get("warnings", ())))
    return result, outputs.read_media(path) if with_sheet else None


def _fingerprint(adapter: str) -> str | None:
    place = Path(adapter).expanduser()
    return source.fingerprint(place) if place.exists() else None


def _device_name(device: Any) -> str:
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else str(device)


def _note(result: ItemResult) -> str:
    density = f"  density {result.density:.2f}" if result.density is not None else ""
    return f"seed {result.seed}" + (f"  {result.seconds:.1f} s" if result.seconds is not None else "") + density


def _hint(why: str, error: BaseException) -> str:
    import torch

    if isinstance(error, torch.OutOfMemoryError):
        return "out of GPU memory; try --cpu-offload model, --vae-tiling, or a smaller size"
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):  # what torch says of main memory
        return "out of memory; try a smaller size, --vae-tiling, or --dtype bf16"
    return why


def _synchronize(torch: Any) -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def report(run: Run, seconds: float) -> dict[str, Any]:
    """The whole run as JSON values: ``run.json`` and ``--json``."""
    counts = {status: sum(r.status == status for r in run.results) for status in ("done", "skipped", "failed")}
    return {
        "folder": str(run.folder),
        **counts,
        "seconds": round(seconds, 3),
        **run.setup,
        **run.facts,
        "items": [asdict(result) for result in run.results],
    }
