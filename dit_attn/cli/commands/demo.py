"""``dit-attn demo``: the embedded models, dense and block-sparse with the same seeds, as files and as one picture."""

from __future__ import annotations

import argparse
import json
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_attn.errors import DitAttnError

if TYPE_CHECKING:
    from PIL.Image import Image

    from dit_attn.contact_sheet import Tile
    from dit_attn.cli.jobs import Job
    from dit_attn.cli.outputs import Media
    from dit_attn.cli.runner import ItemResult, Run
    from dit_attn.processors.methods.base import Method

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
        model, prompt, seed: what was asked for.
        files: of the dense and the sparse run.
        seconds: of the two pipeline calls.
        density: executed share of the attention map of the sparse run, dense steps included.
        met: attributes of the caption that the output shows, of how many, for both.
    """

    model: str
    prompt: str
    seed: int
    files: tuple[str, str]
    seconds: tuple[float, float]
    density: float | None
    met: tuple[tuple[int, int], tuple[int, int]]


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``demo`` and return its parser."""
    parser = subparsers.add_parser(
        "demo",
        help="generate with the embedded models, dense and sparse, and make a picture of both",
        description="Generate images and videos with the embedded models, each dense and block-sparse from the same "
        "seed, print the summaries and the times, and make one picture of everything.",
    )
    parser.add_argument("--output", "-o", default="outputs/demo", metavar="DIR", help="folder (default: outputs/demo)")
    parser.add_argument("--picture", metavar="FILE", help="also write the picture here, e.g. docs/images/demo.png")
    parser.add_argument("--prompts", type=int, metavar="N", help="prompts per model (default: all)")
    parser.add_argument("--steps", type=int, metavar="N", help="denoising steps (default: the models' own, 20)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N, mps (default: auto)")
    parser.add_argument("--json", action="store_true", help="print a JSON report instead of text")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Make everything. Returns 0.

    Raises:
        DitAttnError: an argument does not fit, or the output folder cannot be written.
    """
    from dit_attn import contact_sheet
    from dit_attn.cli import load_pipeline, outputs

    for name in ("prompts", "steps"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise DitAttnError(f"--{name} must be at least 1, got {getattr(args, name)}")
    folder = Path(args.output).expanduser()
    pictures = [folder / "demo.png", *([Path(args.picture).expanduser()] if args.picture else [])]
    for path in pictures:
        outputs.prepare_folder(path.parent)
    device = load_pipeline.pick_device(args.device)
    load_pipeline.quiet(show_progress=False)
    started = time.perf_counter()
    pairs: list[Pair] = []
    parts = []
    for model in PROMPTS:
        found, tiles = _compare(model, args, folder, device)
        pairs += found
        parts.append(_part(model, tiles))
    for path in pictures:
        outputs.write_image(contact_sheet.stack(parts), path)
    seconds = round(time.perf_counter() - started, 1)
    data = {"folder": str(folder), "pictures": [str(path) for path in pictures], "seconds": seconds}
    data["items"] = [asdict(pair) for pair in pairs]
    outputs.write_json(data, folder / "demo.json")
    _say(args, f"{_table(pairs)}\n\nfiles    {folder}\npicture  {pictures[-1]}\ntime     {seconds:.0f} s")
    if args.json:
        print(json.dumps(data, indent=1))
    return 0


def _compare(name: str, args: argparse.Namespace, folder: Path, device: Any) -> tuple[list[Pair], list[list[Tile]]]:
    """Every prompt of a model dense and sparse, alternating, so that both see the same state of the machine."""
    from dit_attn.cli import jobs, load_pipeline, method_options, model_source, runner

    model = model_source.describe(name)
    options: dict[str, Any] = {"prompt": list(PROMPTS[name][: args.prompts]), "seed": SEED}
    if args.steps:
        options["steps"] = args.steps
    work = jobs.make_jobs(options, model.defaults)
    dtype = load_pipeline.pick_dtype("auto", model, device)
    pipe = load_pipeline.load_pipeline(model, {}, device, dtype)
    pipe.set_progress_bar_config(disable=True)
    sides = []
    for wanted in ([], [method_options.Wanted(METHOD)]):
        chosen = method_options.resolve(wanted, model.transformer, None)
        sides.append(
            runner.new_run(pipe, model, chosen, options, dtype, device, folder / _folder(name, chosen), args.argv)
        )
        sides[-1].folder.mkdir(exist_ok=True)
    _warm_up(sides, work[0])
    pairs, tiles, summary = [], [], ""
    for job in work:
        _say(args, f"{name}  {job.prompt}")
        made = [_make(side, job) for side in sides]
        summary = made[1][2]
        pairs.append(_pair(name, job, made))
        tiles.append([_tile(pairs[-1], index, media) for index, (_, media, _) in enumerate(made)])
    _say(args, f"\n{summary}\n")
    return pairs, tiles


def _make(side: Run, job: Job) -> tuple[ItemResult, Media, str]:
    """One item with the side's methods on for its length only; the last is the printed summary."""
    import dit_attn
    from dit_attn.cli import runner

    with _methods_on(side):
        media, seconds = runner.call_pipeline(side.pipe, job)
        summary = str(dit_attn.summary(side.pipe)) if side.methods else ""
        return runner.save_item(side, job, media, seconds), media, summary


def _methods_on(side: Run) -> AbstractContextManager[Any]:
    """The methods of a side for the length of a block; the dense side stays the stock pipeline, untouched."""
    import dit_attn

    return dit_attn.enabled(side.pipe, *side.methods) if side.methods else nullcontext()


def _warm_up(sides: list[Run], job: Job) -> None:
    """Two steps of each side: the first call of a process pays for what is initialised late."""
    from dit_attn.cli import runner

    for side in sides:
        with _methods_on(side):
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
    """The part of the picture about one model: images two prompts a row, videos one."""
    from dit_attn import contact_sheet

    wide = len(tiles) > 1 and len(tiles[0][0].frames) == 1
    rows = [tiles[i] + [cell for row in tiles[i + 1 : i + 2] for cell in row] for i in range(0, len(tiles), 2)]
    return contact_sheet.grid(rows if wide else tiles, model, ("dense", METHOD) * (2 if wide else 1))


def _table(pairs: list[Pair]) -> str:
    lines = [f"{'model':<12}{'prompt':<52}{'dense':>8}{'sparse':>8}{'density':>9}{'attributes':>14}"]
    for pair in pairs:
        met = ", ".join(f"{right}/{total}" for right, total in pair.met)
        times = "".join(f"{seconds:>6.1f} s" for seconds in pair.seconds)
        lines.append(f"{pair.model:<12}{pair.prompt:<52}{times}{pair.density or 1.0:>9.2f}{met:>14}")
    return "\n".join(lines)


def _folder(model: str, chosen: tuple[Method, ...]) -> str:
    return f"{model}-{METHOD if chosen else 'dense'}"


def _say(args: argparse.Namespace, text: str) -> None:
    if not args.json:
        print(text, flush=True)
