"""Run the jobs of one command: one after the other, each saved as soon as it is there."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dit_attn
from dit_attn import contact_sheet
from dit_attn.cli import load_pipeline, outputs
from dit_attn.cli.jobs import Job, load_images
from dit_attn.cli.outputs import Finished, Media
from dit_attn.cli.progress import progress_bar
from dit_attn.cli.run_record import ItemResult, Run
from dit_attn.errors import DitAttnError, RunStopped, reason

if TYPE_CHECKING:
    from dit_attn.processors.attach.summary import Summary


def find_finished(jobs: Sequence[Job], folder: Path, setup: dict[str, Any]) -> dict[int, Finished]:
    """Find outputs that are there already, by job index."""
    found = {}
    for job in jobs:
        digest = job.digest(setup)
        one = outputs.finished(folder, outputs.place(folder, job.stem, digest), digest)
        if one is not None:
            found[job.index] = one
    return found


def run_jobs(
    run: Run,
    jobs: Sequence[Job],
    done: dict[int, Finished],
    with_sheet: bool,
    on_item: Callable[[str], None],
    total: int,
) -> list[ItemResult]:
    """Make every job's output. A failed item does not stop the others.

    Args:
        run: what the items share.
        jobs: those of this process, in order.
        done: outputs to skip, by job index.
        with_sheet: collect cells for the contact sheet.
        on_item: callback(line), after every item.
        total: items of all processes.

    Raises:
        DitAttnError: outputs cannot be written (full disk); what is finished stays.
        KeyboardInterrupt: no half file is left.
    """
    with progress_bar(len(jobs), "items") as bar:
        for job in jobs:
            if job.index in done:
                result, media = _skipped(job, done[job.index], with_sheet)
            else:
                result, media = _attempt(run, job)
            run.results.append(result)
            if with_sheet and media is not None:
                run.tiles[job.index] = contact_sheet.tile(media.frames, job.prompt, _note(result))
            bar.clear()
            on_item(describe_item(result, total))
            bar.update()
    return run.results


def warn(warnings: Iterable[str], total: int) -> None:
    """Print each warning of a command's items once, with how many of ``total`` items it is about."""
    for text, count in Counter(warnings).items():
        print(f"dit-attn: warning: {text} ({count} of {total} items)", file=sys.stderr)


def describe_item(result: ItemResult, total: int) -> str:
    """Return the line printed for an item."""
    head = f"[{result.index + 1}/{total}]"
    if result.status == "failed":
        return f"{head} failed: {result.error} (prompt {result.prompt!r}, seed {result.seed})"
    if result.status == "skipped":
        return f"{head} {result.file}  already there"
    density = f", density {result.density:.2f}" if result.density is not None else ""
    return f"{head} {result.file}  {result.seconds:.1f} s{density}"


def call_pipeline(pipe: Any, job: Job) -> tuple[Media, float]:
    """Call the pipeline once with a CPU generator of its own; return the media and the seconds it took.

    Raises:
        outputs.NotFinite: NaN in the output.
    """
    import torch

    arguments = call_arguments(pipe, job)
    _synchronize(torch)
    started = time.perf_counter()
    result = pipe(**arguments)
    _synchronize(torch)
    return outputs.media_of(result), time.perf_counter() - started


def call_arguments(pipe: Any, job: Job) -> dict[str, Any]:
    """Return the arguments of the pipeline's call for a job, with a CPU generator of its own."""
    import inspect

    import torch

    arguments = {**job.call, **{key: load_images(path, key) for key, path in job.images().items()}}
    arguments |= {"prompt": job.prompt, "generator": torch.Generator("cpu").manual_seed(job.seed)}
    if "output_type" in inspect.signature(type(pipe).__call__).parameters:
        arguments["output_type"] = "np"
    return arguments


def _make_in_stages(run: Run, job: Job) -> tuple[Media, float, ItemFacts]:
    """Make an item in two stages; the third value is what its sidecar says of them."""
    assert run.stages is not None
    path = run.stages.native_file(job, run.folder, run.setup)

    def on_stage(name: str) -> None:
        load_pipeline.show_steps(run.pipe, name)

    made = run.stages.make(run.pipe, call_arguments(run.pipe, job), path, on_stage)
    run.last_summary = made.summary or run.last_summary
    seconds = {name: round(value, 4) for name, value in made.seconds.items()}
    about = {"native_pass": str(path.relative_to(run.folder)), "sigma": made.sigma, "steps": made.steps}
    facts = ItemFacts(made.summary, {"stages": {**about, "seconds": seconds}})
    return outputs.media_of(made.output), sum(made.seconds.values()), facts


def _attempt(run: Run, job: Job) -> tuple[ItemResult, Media | None]:
    head = (job.index, job.prompt, job.seed)
    try:
        if run.stages is not None:
            media, seconds, facts = _make_in_stages(run, job)
            return save_item(run, job, media, seconds, facts), media
        media, seconds = call_pipeline(run.pipe, job)
        return save_item(run, job, media, seconds), media
    except RunStopped:
        raise
    except Exception as error:  # whatever one item does, the others go on; the line names it
        if "--debug" in sys.argv:
            import traceback

            traceback.print_exc()
        explained = isinstance(error, (outputs.NotFinite, DitAttnError))
        why = reason(error) if explained else f"{type(error).__name__}: {reason(error)}"
        return ItemResult(*head, "failed", error=_hint(why, error)), None


@dataclass(frozen=True)
class ItemFacts:
    """What an item's sidecar says where its pipeline cannot be asked any more.

    Attributes:
        summary: of the methods.
        more: further entries.
    """

    summary: Summary | None
    more: dict[str, Any]


def save_item(run: Run, job: Job, media: Media, seconds: float, facts: ItemFacts | None = None) -> ItemResult:
    """Write the output and its sidecar; without ``facts`` the methods must still be enabled, for their summary."""
    digest = job.digest(run.setup)
    if facts is None:
        facts = ItemFacts(dit_attn.summary(run.pipe) if run.methods or run.watched else None, {})
    found = facts.summary
    summary = found if run.methods else None
    warnings = found.warnings if found else ()
    settings = {"prompt": job.prompt, "seed": job.seed, "call": job.call, **run.setup}

    def sidecar(name: str, sha256: str) -> dict[str, Any]:
        return {
            "file": name,
            "sha256": sha256,
            "job_hash": digest,
            "kind": "video" if media.video else "image",
            "size": list(media.frames.shape[:3] if media.video else media.frames.shape[1:3]),
            "fps": run.fps if media.video else None,
            **settings,
            **run.facts,
            **facts.more,
            "seconds": round(seconds, 4),
            "summary": summary.to_dict() if summary else None,
            "warnings": list(warnings),
        }

    text = {"prompt": job.prompt, "dit_attn": outputs.to_json(settings)}
    path = outputs.save(media, run.folder, job.stem, digest, run.fps, text, sidecar)
    density = summary.run_density if summary else None
    done = (job.index, job.prompt, job.seed, "done", str(path), round(seconds, 4), density)
    return ItemResult(*done, warnings=warnings)


def _skipped(job: Job, done: Finished, with_sheet: bool) -> tuple[ItemResult, Media | None]:
    head = (job.index, job.prompt, job.seed, "skipped", str(done.path), done.seconds, done.density)
    return ItemResult(*head, warnings=done.warnings), outputs.read_media(done.path) if with_sheet else None


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
