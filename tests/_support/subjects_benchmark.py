"""Do subjects keep what is theirs? ``python -m tests._support.subjects_benchmark`` generates, verifies and compares.

Every prompt describes different objects, or is an instruction for an editing model; every arm makes it from the same
noise. The world's verifier says of each object whether it is there and has its color and shape, or the color of another
one, and of each piece of an instruction whether it is followed. Results go to a JSONL file line by line, so that a run
that is stopped goes on where it was; the record is made from that file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
import transformers
from diffusers import DiffusionPipeline

import dit_attn
from dit_attn import files
from dit_attn.cli.model_source import fingerprint, locate
from dit_attn.contact_sheet import grid, tile
from dit_attn.eval.shapes_world import edit_samples, edits, multi
from dit_attn.eval.shapes_world.edits import Edit
from dit_attn.models import evaluate_edits
from dit_attn.models.evaluate import generate, interval
from dit_attn.models.export import environment
from dit_attn.pipelines.compare.statistics import difference_figure
from tests._support.other_environment import write_record
from tests._support.subjects_arms import ARMS, Arm, Item, arms_of

SIDES = (("left", "right"), ("bottom", "top"))  # places that tiny-joint knows from its own captions
BATCH = 64  # scenes drawn at once
EDIT_SIZE = 128  # pixels of a shown input


def items_of(kind: str, objects: int, count: int, seed: int) -> Sequence[Item]:
    """Different scenes of some objects, or instructions of some pieces.

    Args:
        kind: what the model was trained on: held-out scenes of ``multi``, held-out edits of ``edit``; else scenes of
            pairs at sides, and of any other number.
    """
    if kind == "edit":
        return edit_samples.held_out_sample(count, seed, (objects, objects))
    if kind == "multi":
        return multi.held_out_sample(count, seed, (objects, objects))
    draw, found = torch.Generator().manual_seed(seed), {}
    while len(found) < count:
        for scene in multi.sample_scenes(BATCH, draw, (objects, objects)):
            if objects != 2 or tuple(sorted(one.place for one in scene.objects)) in SIDES:
                found[multi.caption(scene)] = scene
    return list(found.values())[:count]


def run(options: argparse.Namespace, arms: dict[str, Arm]) -> None:
    """Make what is missing, prompt by prompt, all arms of a prompt in turn.

    Raises:
        SystemExit: the lines are of another model, another number of steps or another seed.
    """
    diffusers.utils.logging.set_verbosity_error()  # CLIP cuts the captions off, which T5 does not
    transformers.logging.set_verbosity_error()
    _, folder, call = locate(options.model)
    kind = kind_of(folder)
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32).to(options.device)
    pipe.set_progress_bar_config(disable=True)
    if kind != "edit":
        call = {**call, "max_sequence_length": multi.TEXT_LENGTH if options.objects > 2 else 20}
    call["num_inference_steps"] = options.steps or call["num_inference_steps"]
    setup = f"{fingerprint(Path(folder))}, {call['num_inference_steps']} steps, seed {options.seed}"
    if options.size:
        call |= {"height": options.size, "width": options.size}
        setup += f", {options.size} px"
    lines = read(options.lines)
    if any(line.get("setup") != setup for line in lines):
        raise SystemExit(f"{options.lines} is of other weights, steps, seeds or sizes; give another file with --lines")
    done = {(line["arm"], line["item"]) for line in lines}
    for position, item in enumerate(items_of(kind, options.objects, options.count, options.seed)):
        for name, (methods, more) in arms.items():
            if (name, position) in done:
                continue
            started = time.perf_counter()
            dit_attn.enable(pipe, *methods(item))
            pixels, caption, verdict = make(pipe, item, {**call, **more}, options.seed + position)
            seconds = round(time.perf_counter() - started, 2)
            keep_image(image_file(options.images, position, name), pixels)
            line = {
                "arm": name, "item": position, "setup": setup, "caption": caption, "seconds": seconds,
                "distance": distance(pixels, image_file(options.images, position, "stock")),
                **verdict, "reports": reports(pipe),
            }  # fmt: skip
            add_line(options.lines, line)


def kind_of(folder: str | Path) -> str:
    """What the model in a folder was trained on; "" where it does not say."""
    trained = Path(folder, "training.json")
    return str(json.loads(trained.read_text())["recipe"]["kind"]) if trained.is_file() else ""


def make(pipe: Any, item: Item, call: dict[str, Any], seed: int) -> tuple[np.ndarray, str, dict[str, Any]]:
    """Generate one image.

    Returns:
        the image (H, W, 3) uint8; the caption or instruction; what the verifier says.
    """
    if isinstance(item, Edit):
        (edited,) = evaluate_edits.generate(pipe, [item], call, seed, batch=1)
        said = edited.verdict
        verdict = {"followed": said.followed, "kept": said.kept, "background": said.background,
                   "whole": all(said.attributes().values())}  # fmt: skip
        return (edited.output * 255).astype(np.uint8), edits.instruction(item.pieces), verdict
    (sample,) = generate(pipe, [item], call, seed, batch=1)
    verdict = {"background": sample.verdict["background"], "whole": sample.right,
               "objects": [asdict(one) for one in sample.objects]}  # fmt: skip
    return (sample.output * 255).astype(np.uint8), multi.caption(item), verdict


def image_file(folder: Path, item: int, arm: str) -> Path:
    """Where the image of a prompt and an arm is kept."""
    return folder / f"{item:04d}_{arm.replace(' ', '-')}.npy"


def keep_image(path: Path, pixels: np.ndarray) -> None:
    """Save an image (H, W, 3) uint8, complete or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with files.atomic_path(path) as temporary, temporary.open("wb") as stream:
        np.save(stream, pixels)


def distance(pixels: np.ndarray, stock: Path) -> float | None:
    """Root of the mean squared difference to the stock image, in [0, 1]; ``None`` where there is none."""
    if not stock.exists():
        return None
    other = np.load(stock).astype(np.float64)
    return round(float(np.sqrt(np.mean((pixels.astype(np.float64) - other) ** 2))) / 255, 6)


def reports(pipe: Any) -> dict[str, Any]:
    """What the methods say of the run."""
    found = getattr(dit_attn.summary(pipe), "reports", {})
    return {slug: report.figures() for slug, report in found.items() if hasattr(report, "figures")}


def add_line(path: Path, line: dict[str, Any]) -> None:
    """Append one result, on a line of its own where a run was stopped in the middle of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cut = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("a") as file:
        file.write("\n" * cut + json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """Lines of an earlier run; a line that was cut off is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    found = []
    for line in lines:
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return found


# -- the record --------------------------------------------------------------------------------------------------------


def compare(lines: Sequence[dict[str, Any]], names: Sequence[str], base: str = "stock") -> dict[str, Any]:
    """Rates of every arm, and differences to the base over the prompts that both have.

    A method is also compared with plain guidance of matched strength: that of the sweep whose images are as far from
    the stock ones as those of the method, or nearest to that (``matched``).
    """
    by_arm = {name: {line["item"]: line for line in lines if line["arm"] == name} for name in names}
    by_arm = {name: arm for name, arm in by_arm.items() if arm}
    rows = {name: _row(arm, by_arm.get(base, {})) for name, arm in by_arm.items()}
    sweep = {name: row["distance"] for name, row in rows.items() if name.startswith("guidance") and row["distance"]}
    for name, row in rows.items():
        if sweep and row["distance"] and name not in sweep:
            nearest = min(sweep, key=lambda one: abs(math.log(sweep[one] / row["distance"])))
            against = _row(by_arm[name], by_arm[nearest])
            main = "color" if "color" in against else "followed"
            row["matched"] = {
                "arm": nearest,
                "distance": sweep[nearest],
                main: against[main],
                "whole": against["whole"],
            }
    return rows


def _row(arm: dict[int, Any], base: dict[int, Any]) -> dict[str, Any]:
    shared = sorted(set(arm) & set(base))
    seconds = float(np.median([line["seconds"] for line in arm.values()]))
    far = [line["distance"] for line in arm.values() if line["distance"] is not None]
    row: dict[str, Any] = {"prompts": len(arm), "seconds": round(seconds, 2)}
    row |= {"distance": round(float(np.mean(far)), 5) if far else None, **_reported(list(arm.values()))}
    flags, other = ({item: flags_of(line) for item, line in lines.items()} for lines in (arm, base))
    for word in dict.fromkeys(word for found in flags.values() for word in found):
        row[word] = _figure(*({item: found[word] for item, found in each.items()} for each in (flags, other)), shared)
    return row


def flags_of(line: dict[str, Any]) -> dict[str, list[bool]]:
    """What the verifier says, by what it says it of: a flag for each object or piece, or one for the image."""
    found = {word: line[word] for word in ("followed", "kept") if word in line}
    for word in ("present", "color", "shape", "leak") if "objects" in line else ():
        found[word] = [bool(one[word]) for one in line["objects"]]
    if "objects" in line:
        found["both"] = [a and b for a, b in zip(found["color"], found["shape"], strict=True)]
    return found | {word: [line[word]] for word in ("background", "whole")}


def _reported(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means of what the methods report: regions that were found and used, and lifts."""
    isolation = [one for line in lines for one in line["reports"].get("isolation", {}).get("found", ())]
    pieces = [one for line in lines for one in line["reports"].get("saas", {}).get("pieces", ())]
    row = {}
    if isolation:
        row["found"] = {"quality": _mean(isolation, "quality"), "used": _mean(isolation, "used")}
    if pieces:
        row["lift"] = {name: _mean(pieces, name) for name in ("share", "ratio", "factor", "quality")}
    return row


def _mean(items: Sequence[dict[str, Any]], name: str) -> float:
    return round(sum(float(one[name]) for one in items) / len(items), 4)


def _figure(flags: dict[int, list[bool]], base: dict[int, list[bool]], shared: Sequence[int]) -> dict[str, Any]:
    """A rate with its interval, its difference to the base, objects mended and broken, and McNemar's exact p."""
    every = [x for values in flags.values() for x in values]
    out: dict[str, Any] = {"rate": round(sum(every) / max(1, len(every)), 4), "right": sum(every), "of": len(every)}
    out["ci95"] = interval(sum(every), len(every))
    pairs = [(a, b, item) for item in shared for a, b in zip(flags[item], base[item], strict=True)]
    if pairs:
        mended, broken = sum(a and not b for a, b, _ in pairs), sum(b and not a for a, b, _ in pairs)
        found = difference_figure([a for a, _, _ in pairs], [b for _, b, _ in pairs], [item for _, _, item in pairs])
        assert found is not None
        out["difference"] = {"value": round(found["value"], 4), "ci95": [round(x, 4) for x in found["ci95"] or ()]}
        out |= {"mended": mended, "broken": broken, "p": mcnemar(mended, broken)}
    return out


def mcnemar(mended: int, broken: int) -> float:
    """Exact two-sided p of McNemar's test."""
    count = mended + broken
    tail = sum(math.comb(count, k) for k in range(min(mended, broken) + 1)) / 2**count
    return min(1.0, 2 * tail)


def sheet(
    folder: Path,
    lines: Sequence[dict[str, Any]],
    names: Sequence[str],
    path: Path,
    items: Sequence[int],
    drawn: Sequence[Item] = (),
) -> None:
    """Draw some prompts as rows, the arms as columns.

    Args:
        folder: of the images.
        lines: of the results.
        names: of the arms.
        path: PNG file.
        items: numbers of the prompts.
        drawn: all items; the input of those that are edits is a column.
    """
    captions = {line["item"]: line["caption"] for line in lines}
    columns, rows = [*names], []
    for item in items:
        made = [image_file(folder, item, name) for name in names]
        tiles = [tile(np.load(one)[None], captions[item] * (not at), height=128) for at, one in enumerate(made)]
        edit = drawn[item] if drawn else None
        if isinstance(edit, Edit):
            source = 255 * multi.render_scenes([edit.source], EDIT_SIZE)[0].permute(1, 2, 0).numpy()
            tiles = [tile(source.astype(np.uint8)[None], "", height=128), *tiles]
        rows.append(tiles)
    if rows and len(rows[0]) > len(columns):
        columns = ["input", *columns]
    grid(rows, columns=columns).save(path, optimize=True)


def main() -> None:
    """Generate what is missing, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=tuple(ARMS), default="isolation", help="arms to run (default: %(default)s)")
    parser.add_argument("--model", default="tiny-joint", help="embedded model, or a folder that `train` wrote")
    parser.add_argument("--objects", type=int, default=2, choices=(1, 2, 3, 4),
                        help="of a prompt, or pieces of an instruction (default: 2)")  # fmt: skip
    parser.add_argument("--count", type=int, default=96, help="prompts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--size", type=int, metavar="PX", help="height and width; default: the model's own")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--arms", nargs="+", help="some of the arms; default: all")
    parser.add_argument("--quick", action="store_true", help="two prompts of four steps: does it run?")
    parser.add_argument("--lines", type=Path, help="JSONL file of the results; default: outputs/MODEL_WHAT_OBJECTS")
    parser.add_argument("--images", type=Path, help="folder of the images; default: next to the lines")
    parser.add_argument("--sheet", type=Path, help="PNG of the first four prompts")
    parser.add_argument("--output", type=Path, help="the record; default: benchmarks/subjects/MODEL_WHAT_OBJECTS.json")
    options = parser.parse_args()
    if options.quick:
        options.count, options.steps = 2, 4
    model = Path(options.model).name
    name = f"{model}_{options.what}_{options.objects}{'_quick' if options.quick else ''}"
    options.output = options.output or Path("outputs" if options.quick else "benchmarks/subjects") / f"{name}.json"
    options.lines = options.lines or Path("outputs") / f"{name}.jsonl"
    options.images = options.images or options.lines.with_suffix("")
    editing = kind_of(locate(options.model)[1]) == "edit"
    known = arms_of(options.what, options.objects, editing)
    unknown = set(options.arms or ()) - set(known)
    if unknown:
        parser.error(f"no such arms: {', '.join(unknown)}; there are {', '.join(known)}")
    arms = {key: known[key] for key in options.arms or known}
    try:
        run(options, arms)
    except KeyboardInterrupt:
        raise SystemExit(f"interrupted; the same command goes on with {options.lines}") from None
    lines = [line for line in read(options.lines) if line["item"] < options.count]
    given = {**vars(options), "model": model}
    words = [f"--{key} {given[key]}" for key in ("what", "model", "objects", "count", "seed", "steps", "size")
             if given[key] is not None]  # fmt: skip
    command = f"python -m tests._support.subjects_benchmark {' '.join(words)}"
    write_record(options.output, command, {
        "model": model, "objects": options.objects, "environment": environment(),
        "setup": lines[0]["setup"] if lines else "", "arms": compare(lines, list(known)),
    })  # fmt: skip
    if options.sheet:
        drawn = items_of(kind_of(locate(options.model)[1]), options.objects, options.count, options.seed)
        sheet(options.images, lines, list(arms), options.sheet, range(min(4, options.count)), drawn)


if __name__ == "__main__":
    main()
