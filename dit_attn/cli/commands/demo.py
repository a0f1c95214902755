"""``dit-attn demo``: the embedded models, dense and block-sparse with the same seeds, as files and as one image."""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_attn.cli import options as flags
from dit_attn.cli import parser as parsers
from dit_attn.cli.table import Table, fields, show

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_attn.cli.jobs import Job
    from dit_attn.cli.outputs import Media
    from dit_attn.cli.run_record import ItemResult, Run
    from dit_attn.contact_sheet import Tile

METHOD = "block-sparse"
# None of these captions is in the training data of the embedded models.
PROMPTS = {
    "tiny-image": (
        "a large green cross at the bottom on gray",
        "two large purple triangles in a column on black",
        "three small red squares in a row on white",
        "a small blue cross at the left on black",
    ),
    "tiny-video": (
        "a large red cross moving right slowly on gray",
        "a large purple circle moving left fast on black",
        "a small green triangle moving down fast on white",
    ),
}
SEED = 7


@dataclass(frozen=True)
class Pair:
    """One prompt, generated twice from the same noise.

    Attributes:
        model, prompt, seed: what was generated.
        files: of the dense and the sparse run.
        seconds: of the two pipeline calls.
        density: attention computed in the sparse run, as a share of dense, dense steps included.
        met: attributes of the caption that the output shows, of how many, for both.
    """

    model: str
    prompt: str
    seed: int
    files: tuple[str, str]
    seconds: tuple[float, float]
    density: float | None
    met: tuple[tuple[int, int], tuple[int, int]]


GROUPS = {
    "output": (
        flags.Flag("output", "folder of the files", default="outputs/demo", short=("-o",), metavar="DIR"),
        flags.Flag("sheet", "also write the image of both sides here, e.g. docs/images/demo.png", metavar="FILE"),
        flags.Flag("json", "print a JSON report instead of text", bool),
    ),
    "run": (
        flags.Flag("prompts", "prompts per model", int, "all", low=1),
        flags.Flag("steps", "denoising steps", int, "the models' own, 20", low=1),
        *flags.only(flags.RUN, "device"),
    ),
}


@dataclass(frozen=True)
class DemoConfig:
    """One command.

    Attributes:
        device: where it runs.
        argv: the command line, for the records.
        output: folder of the files.
        sheet: second place of the image of both sides.
        prompts: per model; ``None`` for all.
        steps: denoising steps; ``None``: the models' own.
        json: print JSON.
    """

    device: Any
    argv: tuple[str, ...]
    output: Path = Path("outputs/demo")
    sheet: Path | None = None
    prompts: int | None = None
    steps: int | None = None
    json: bool = False

    @classmethod
    def from_options(cls, options: flags.Options) -> DemoConfig:
        """Check the flags.

        Raises:
            DitAttnError: no such device.
        """
        from dit_attn.cli import load_pipeline

        values = options.pick("prompts", "steps", "json")
        values |= {name: Path(text).expanduser() for name, text in options.pick("output", "sheet").items()}
        return cls(load_pipeline.pick_device(options.get("device", "auto")), options.argv, **values)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``demo``."""
    parsers.describe(
        parser,
        "demo [options]",
        "Generate images and videos with the embedded models, each dense and block-sparse from the same seed, print "
        "the summaries and the times, and make one image of everything.",
    )
    parsers.add_groups(parser, GROUPS)


def run(args: argparse.Namespace) -> int:
    """Make everything. Returns 0.

    Raises:
        DitAttnError: an argument does not fit, or the output folder cannot be written.
    """
    from dit_attn import contact_sheet
    from dit_attn.cli import load_pipeline, outputs

    config = DemoConfig.from_options(flags.merge(args, GROUPS))
    sheets = [config.output / "demo.png", *([config.sheet] if config.sheet else [])]
    for path in sheets:
        outputs.prepare_folder(path.parent)
    load_pipeline.quiet(show_progress=False)
    started = time.perf_counter()
    pairs: list[Pair] = []
    parts = []
    for model in PROMPTS:
        found, tiles = _compare(model, config)
        pairs += found
        parts.append(_part(model, tiles))
    for path in sheets:
        outputs.write_image(contact_sheet.stack(parts), path)
    seconds = round(time.perf_counter() - started, 1)
    data = {"folder": str(config.output), "sheets": [str(path) for path in sheets], "seconds": seconds}
    data["items"] = [asdict(pair) for pair in pairs]
    outputs.write_json(data, config.output / "demo.json")
    if config.json:
        print(json.dumps(data, indent=1))
    else:
        show(_table(pairs), "", fields({"files": config.output, "image": sheets[-1], "time": f"{seconds:.0f} s"}))
    return 0


def _compare(name: str, config: DemoConfig) -> tuple[list[Pair], list[list[Tile]]]:
    """Every prompt of a model dense and sparse, alternating, so that both see the same state of the machine."""
    from dit_attn.cli import jobs, model_source, resolve_methods, run_record
    from dit_attn.cli.load_pipeline import LoadConfig, load_pipeline, pick_dtype
    from dit_attn.cli.method_options import MethodSpec

    source = model_source.describe(name)
    options: dict[str, Any] = {"prompt": list(PROMPTS[name][: config.prompts]), "seed": SEED}
    if config.steps:
        options["steps"] = config.steps
    work = jobs.make_jobs(options, source.defaults)
    load = LoadConfig(source, config.device, pick_dtype("auto", source, config.device))
    pipe = load_pipeline(load)
    sides = []
    for specs in ([], [MethodSpec(METHOD)]):
        methods = resolve_methods.resolve(specs, source.transformer, None)
        folder = config.output / f"{name}-{METHOD if methods else 'dense'}"
        folder.mkdir(exist_ok=True)
        sides.append(run_record.new_run(load, methods, folder, config.argv, pipe=pipe))
    _warm_up(sides, work[0])
    pairs, tiles, summary = [], [], ""
    for job in work:
        _print(config, f"{name}  {job.prompt}")
        made = [_make(side, job) for side in sides]
        summary = made[1][2]
        pairs.append(_pair(name, job, made))
        tiles.append([_tile(pairs[-1], index, media) for index, (_, media, _) in enumerate(made)])
    _print(config, f"\n{summary}\n")
    return pairs, tiles


def _make(side: Run, job: Job) -> tuple[ItemResult, Media, str]:
    """One item with the side's methods on for its length only; the last is the printed summary."""
    import dit_attn
    from dit_attn.cli import run_record, runner

    with run_record.methods_enabled(side):
        media, seconds = runner.call_pipeline(side.pipe, job)
        summary = str(dit_attn.summary(side.pipe)) if side.methods else ""
        return runner.save_item(side, job, media, seconds), media, summary


def _warm_up(sides: list[Run], job: Job) -> None:
    """Two steps of each side: the first call of a process pays for what is initialised late."""
    from dit_attn.cli import run_record, runner

    for side in sides:
        with run_record.methods_enabled(side):
            runner.call_pipeline(side.pipe, replace(job, call={**job.call, "num_inference_steps": 2}))


def _pair(model: str, job: Job, made: list[tuple[ItemResult, Media, str]]) -> Pair:
    (dense, dense_media, _), (sparse, sparse_media, _) = made
    return Pair(
        model=model,
        prompt=job.prompt,
        seed=job.seed,
        files=(str(dense.file), str(sparse.file)),
        seconds=(dense.seconds or 0.0, sparse.seconds or 0.0),
        density=sparse.density,
        met=(_met(job.prompt, dense_media), _met(job.prompt, sparse_media)),
    )


def _met(prompt: str, media: Media) -> tuple[int, int]:
    """How many attributes of the caption the output shows, of how many; read from the pixels."""
    from dit_attn.eval.shapes_world import verify, world

    item = world.parse(prompt)
    values = media.frames.astype("float32") / 255.0
    if isinstance(item, world.VideoScene):
        verdict = verify.verify_video(values, item)
    else:
        verdict = verify.verify_image(values[0], item)
    return sum(verdict.values()), len(verdict)


def _tile(pair: Pair, side: int, media: Media) -> Tile:
    from dit_attn import contact_sheet

    density = 1.0 if side == 0 else pair.density or 1.0
    right, total = pair.met[side]
    note = f"{pair.seconds[side]:.1f} s, density {density:.2f}, {right} of {total} attributes right"
    title = pair.prompt if side == 0 else "the same prompt and seed"
    return contact_sheet.tile(media.frames, title, note, height=128 if media.video else 318, strip=5)


def _part(model: str, tiles: list[list[Tile]]) -> Image:
    """The part of the image about one model: images two prompts a row, videos one."""
    from dit_attn import contact_sheet

    wide = len(tiles) > 1 and len(tiles[0][0].frames) == 1
    rows = [tiles[i] + [cell for row in tiles[i + 1 : i + 2] for cell in row] for i in range(0, len(tiles), 2)]
    return contact_sheet.grid(rows if wide else tiles, model, ("dense", METHOD) * (2 if wide else 1))


def _table(pairs: list[Pair]) -> Table:
    rows = []
    for pair in pairs:
        times = [f"{seconds:.1f} s" for seconds in pair.seconds]
        met = ", ".join(f"{right}/{total}" for right, total in pair.met)
        rows.append((pair.model, pair.prompt, *times, f"{pair.density or 1.0:.2f}", met))
    titles = ("model", "prompt", ">dense", ">sparse", ">density", ">attributes right")
    return Table(titles, rows, folded=("prompt",))


def _print(config: DemoConfig, text: str) -> None:
    if not config.json:
        print(text, flush=True)
