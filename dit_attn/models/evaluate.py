"""Does an embedded model do what the caption says? Held-out captions, the stock pipeline, the world's verifiers.

python -m dit_attn.models.evaluate tiny-image --count 200 --output result.json --sheet sheet.png
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dit_attn import files
from dit_attn.contact_sheet import flow, tile
from dit_attn.eval.shapes_world import items as world_items
from dit_attn.eval.shapes_world.multi import MultiScene
from dit_attn.eval.shapes_world.multi_verify import ObjectVerdict, judge
from dit_attn.eval.shapes_world.outline import mean_outline
from dit_attn.models import evaluate_edits
from dit_attn.models.rates import RIGHT, WRONG, rate
from dit_attn.models.rates import interval as interval

if TYPE_CHECKING:
    from PIL.Image import Image


@dataclass(frozen=True)
class Sample:
    """One generated item with its verdict.

    Args:
        item: what the prompt says.
        output: (H, W, 3) image or (F, H, W, 3) video in [0, 1].
        verdict: attribute -> right or wrong.
        objects: verdict of each object, for scenes of several.
    """

    item: world_items.Item
    output: np.ndarray
    verdict: dict[str, bool]
    objects: tuple[ObjectVerdict, ...] = ()

    @property
    def right(self) -> bool:
        """Tell whether every attribute is right."""
        return all(self.verdict.values())

    @property
    def frames(self) -> np.ndarray:
        """Return the output as (F, H, W, 3); an image is one frame."""
        return self.output[None] if self.output.ndim == 3 else self.output


def generate(
    pipeline: Any, items: Sequence[world_items.Item], call: dict[str, Any], seed: int, batch: int = 8
) -> list[Sample]:
    """Make one sample per item through the stock `pipeline`; item i always gets the noise of `seed + i`.

    Args:
        call: keyword arguments of the call (see `dit_attn.models.call_defaults`).
    """
    out: list[Sample] = []
    for start in range(0, len(items), batch):
        part = items[start : start + batch]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        result = pipeline([world_items.caption(i) for i in part], generator=generators, output_type="np", **call)
        outputs = result.frames if hasattr(result, "frames") else result.images
        out += [judged(item, array) for item, array in zip(part, outputs, strict=True)]
    return out


def judged(item: world_items.Item, output: np.ndarray) -> Sample:
    """Verify an output, (H, W, 3) image or (F, H, W, 3) video in [0, 1]."""
    if isinstance(item, MultiScene):
        verdict = judge(output, item)
        return Sample(item, output, verdict.attributes(), verdict.objects)
    return Sample(item, output, world_items.verify(output[None] if output.ndim == 3 else output, item))


def _mean(values: Iterable[float | None]) -> dict[str, Any]:
    """Mean of the values that are there, with its 95 % interval (normal approximation)."""
    found = np.array([value for value in values if value is not None])
    if not len(found):
        return {"mean": None, "of": 0, "ci95": None}
    mean = float(found.mean())
    half = 1.959964 * float(found.std(ddof=1)) / math.sqrt(len(found)) if len(found) > 1 else math.inf
    ci95 = None if math.isinf(half) else [round(mean - half, 4), round(mean + half, 4)]
    return {"mean": round(mean, 4), "of": len(found), "ci95": ci95}


def table(samples: Sequence[Sample]) -> dict[str, Any]:
    """Compute accuracy per attribute, over all attributes, per full caption, and by seen or never-seen pair.

    ``outlines`` holds the mean ``perimeter`` and ``edge-width`` of the objects (`shapes_world.outline`), ``objects``,
    for scenes of several, how often an object is there and right, by their number in the scene.
    """
    attributes = list(samples[0].verdict) if samples else []
    objects = objects_table(samples)
    outlines = [mean_outline(s.frames) for s in samples]
    groups = {
        "seen_pairs": [s for s in samples if not world_items.never_seen(s.item)],
        "never_seen_pairs": [s for s in samples if world_items.never_seen(s.item)],
    }
    return {
        "attributes": {name: rate(s.verdict[name] for s in samples) for name in attributes},
        "all_attributes": rate(right for s in samples for right in s.verdict.values()),
        "whole_caption": rate(s.right for s in samples),
        **{name: rate(s.right for s in part) for name, part in groups.items()},
        "outlines": {name: _mean(one[name] for one in outlines) for name in ("perimeter", "edge-width")},
        **({"objects": objects} if objects else {}),
    }


def objects_table(samples: Sequence[Sample]) -> dict[str, Any]:
    """Compute how often an object is present and, where it is, how often each of its words is right.

    ``leak`` is the share of the objects present that have the color of another one of their scene.

    Returns:
        Rates by the number of objects of the scene ("1", "2", ...) and of "all"; empty without such scenes.
    """
    numbers = sorted({len(s.objects) for s in samples} - {0})
    groups = {str(number): [s for s in samples if len(s.objects) == number] for number in numbers}
    if groups:
        groups["all"] = list(samples)
    return {name: _objects([one for s in part for one in s.objects]) for name, part in groups.items()}


def _objects(verdicts: Sequence[ObjectVerdict]) -> dict[str, Any]:
    there = [one for one in verdicts if one.present]
    words = ("color", "shape", "size", "place", "leak")
    given = {f"{word}_given_present": rate(getattr(one, word) for one in there) for word in words}
    return {"present": rate(one.present for one in verdicts), **given}


def evaluate(
    pipeline: Any, kind: str, call: dict[str, Any], count: int = 200, seed: int = 0, batch: int = 8
) -> tuple[dict[str, Any], list[Sample]]:
    """Score `count` held-out captions of `kind` (see `Recipe`): `table` with timing, and the samples."""
    items = world_items.held_out_sample(kind, count, seed)
    pipeline.set_progress_bar_config(disable=True)
    started = time.perf_counter()
    samples = generate(pipeline, items, call, seed, batch)
    seconds = time.perf_counter() - started
    result = {"captions": len(samples), "seed": seed, "batch": batch, "call": call}
    return {**result, "seconds_per_sample": round(seconds / max(1, len(samples)), 3), **table(samples)}, samples


def contact_sheet(samples: Sequence[Sample], columns: int = 8, height: int = 128) -> Image:
    """Draw the samples with captions and wrong attributes; green borders mark what is right, red ones the rest."""
    cells = []
    for sample in samples:
        wrong = ", ".join(name for name, right in sample.verdict.items() if not right)
        note, border = (f"wrong: {wrong}", WRONG) if wrong else ("", RIGHT)
        pixels = (sample.frames * 255).round().astype(np.uint8)
        cells.append(tile(pixels, world_items.caption(sample.item), note, height, strip=4, border=border))
    return flow(cells, width=columns * (height + 8))


def main(argv: Sequence[str] | None = None) -> int:
    """Score an embedded model and write the result with everything needed to repeat it."""
    from dit_attn.models.export import environment
    from dit_attn.models.recipe import RECIPES, recipe
    from dit_attn.models.registry import call_defaults, info, load

    parser = argparse.ArgumentParser(prog="python -m dit_attn.models.evaluate", description=main.__doc__)
    parser.add_argument("name", choices=sorted(name for name, one in RECIPES.items() if one.kind != "inspect"))
    parser.add_argument("--count", type=int, default=200, help="held-out captions or edits (default: 200)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's own choice)")
    parser.add_argument("--guidance-scale", type=float, help="default: the model's own")
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--size", type=int, help="height and width in pixels (default: the model's own)")
    parser.add_argument("--run", type=Path, help="folder of a training run: score its checkpoint, not shipped weights")
    parser.add_argument("--tail", action="store_true", help="the run in --run is a tail")
    parser.add_argument("--output", type=Path, help="JSON file (default: only print)")
    parser.add_argument("--sheet", type=Path, help="PNG file of the first 64 samples")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    call = call_defaults(args.name)
    given = {"guidance_scale": args.guidance_scale, "num_inference_steps": args.steps}
    given |= {"height": args.size, "width": args.size}
    call.update({key: value for key, value in given.items() if value is not None})
    kind = recipe(args.name).kind
    steps: int | None
    if args.run:
        pipeline, steps = _of_run(args.run, recipe(args.name, tail=args.tail))
    else:
        pipeline, steps = load(args.name), info(args.name).steps_trained
    if kind == "edit":
        figures, edited = evaluate_edits.evaluate(pipeline, call, args.count, args.seed, args.batch)
    else:
        figures, samples = evaluate(pipeline, kind, call, args.count, args.seed, args.batch)
    words = [args.name, "--count", args.count, "--seed", args.seed, "--batch", args.batch]
    for flag in ("guidance_scale", "steps", "size", "run"):
        if getattr(args, flag) is not None:
            words += [f"--{flag.replace('_', '-')}", getattr(args, flag)]
    words += ["--tail"] * args.tail
    items = "edits" if kind == "edit" else "captions"
    command = " ".join(map(str, ["python -m dit_attn.models.evaluate", *words]))
    record = {
        "model": args.name,
        "what": f"held-out {items}, dense attention, stock pipeline; 95 % Wilson intervals",
        "command": command,
        "commit": current_commit(),
        "environment": environment(),
        "training_steps": steps,
        **figures,
    }
    if args.output:
        files.write_json(args.output, record)
    if args.sheet:
        with files.atomic_path(args.sheet) as temporary:
            drawn = evaluate_edits.contact_sheet(edited[:64]) if kind == "edit" else contact_sheet(samples[:64])
            drawn.save(temporary)
    print(json.dumps(record, indent=1))
    return 0


def _of_run(folder: Path, chosen: Any) -> tuple[Any, int]:
    """Pipeline of the averaged weights of a training run's checkpoint, and the steps it has done."""
    from dit_attn.models.export import pipeline_of
    from dit_attn.models.loop import Run

    run = Run(chosen, seed=0, device=torch.device("cpu"))
    run.restore(folder)
    return pipeline_of(run), run.step


def current_commit() -> str:
    """Return the commit of the working copy, "" outside one."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, check=False
        )
    except OSError:
        return ""
    return done.stdout.strip()


if __name__ == "__main__":
    raise SystemExit(main())
