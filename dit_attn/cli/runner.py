"""Run the jobs of one command: one after the other, each saved as soon as it is there."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import dit_attn
from dit_attn import contact_sheet
from dit_attn.cli import load_pipeline, outputs
from dit_attn.cli.jobs import Job, load_images
from dit_attn.cli.outputs import Finished, Media
from dit_attn.cli.progress import progress_bar
from dit_attn.cli.run_record import ItemResult, Run
from dit_attn.errors import DitAttnError, RunStopped, reason
from dit_attn.remote import Place, RemotePath, relative_to

if TYPE_CHECKING:
    from dit_attn.processors.attach.summary import Summary


def find_finished(jobs: Sequence[Job], folder: Place, setup: dict[str, Any]) -> dict[int, Finished]:
    """Find outputs that are there already, by job index.

    Raises:
        RunStopped: the address cannot be reached.
    """
    found = {}
    present = _listed(folder)
    for job in jobs:
        digest = job.digest(setup)
        if present is not None and present.isdisjoint((f"{job.stem}.json", f"{job.stem}_{digest[:8]}.json")):
            continue
        one = outputs.finished(folder, outputs.place(folder, job.stem, digest), digest)
        if one is not None:
            found[job.index] = one
    return found


def _listed(folder: Place) -> set[str] | None:
    """The names at an address, by one request in the place of several for every job; ``None`` for a path."""
    with outputs.report_unrecoverable(folder, "list"):
        return folder.names() if isinstance(folder, RemotePath) else None


@dataclass
class Items:
    """The items of one command, or its part of them.

    Attributes:
        jobs: in order.
        total: items of all processes.
        with_sheet: collect cells for the contact sheet.
        done: outputs to skip, by job index.
    """

    jobs: Sequence[Job]
    total: int
    with_sheet: bool = False
    done: dict[int, Finished] = field(default_factory=dict)

    @property
    def todo(self) -> list[Job]:
        """The jobs whose output is not there."""
        return [job for job in self.jobs if job.index not in self.done]


def run_jobs(run: Run, items: Items, on_item: Callable[[str], None]) -> list[ItemResult]:
    """Make every job's output. A failed item does not stop the others.

    Args:
        run: what the items share.
        items: of this process.
        on_item: callback(line), after every item.

    Raises:
        DitAttnError: outputs cannot be written (full disk); what is finished stays.
        KeyboardInterrupt: no half file is left.
    """
    with progress_bar(len(items.jobs), "items") as bar:
        for job in items.jobs:
            if job.index in items.done:
                found = items.done[job.index]
                result, media = skipped_item(job, found), outputs.read_media(found.path) if items.with_sheet else None
            else:
                result, media = _attempt(run, job)
            add_result(run, result, media if items.with_sheet else None)
            bar.clear()
            on_item(describe_item(result, items.total))
            bar.update()
    return run.results


def add_result(run: Run, result: ItemResult, media: Media | None) -> None:
    """Add what became of a job to the run; with media, also a cell of the contact sheet."""
    run.results.append(result)
    if media is not None:
        run.tiles[result.index] = tile_of(result, media)


def tile_of(result: ItemResult, media: Media) -> contact_sheet.Tile:
    """Return the cell of an item on the contact sheet."""
    return contact_sheet.tile(media.frames, result.prompt, _note(result))


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
    return outputs.media_of(result, pipe), time.perf_counter() - started


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
    about = {"native_pass": relative_to(path, run.folder), "sigma": made.sigma, "steps": made.steps}
    facts = ItemFacts(made.summary, {"stages": {**about, "seconds": seconds}})
    return outputs.media_of(made.output), sum(made.seconds.values()), facts


def make_item(run: Run, job: Job) -> tuple[ItemResult, Media]:
    """Make one output and save it.

    Raises:
        Exception: whatever the pipeline raises, see :func:`explain_failure`.
    """
    if run.stages is not None:
        media, seconds, facts = _make_in_stages(run, job)
        return save_item(run, job, media, seconds, facts), media
    media, seconds = call_pipeline(run.pipe, job)
    return save_item(run, job, media, seconds), media


def failed_item(job: Job, why: str) -> ItemResult:
    """Return the result of a job that could not be made, with one line why."""
    return ItemResult(job.index, job.prompt, job.seed, "failed", error=why)


def explain_failure(error: Exception) -> tuple[str, bool]:
    """Return one line for what an item raised, and whether it says all there is: then another try is of no use."""
    explained = isinstance(error, (outputs.NotFinite, DitAttnError))
    return _hint(reason(error) if explained else f"{type(error).__name__}: {reason(error)}", error), explained


def _attempt(run: Run, job: Job) -> tuple[ItemResult, Media | None]:
    try:
        return make_item(run, job)
    except RunStopped:
        raise
    except Exception as error:  # whatever one item does, the others go on; the line names it
        if "--debug" in sys.argv:
            import traceback

            traceback.print_exc()
        return failed_item(job, explain_failure(error)[0]), None


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


def skipped_item(job: Job, done: Finished) -> ItemResult:
    """Return the result of a job whose output is there already."""
    head = (job.index, job.prompt, job.seed, "skipped", str(done.path), done.seconds, done.density)
    return ItemResult(*head, warnings=done.warnings)


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
