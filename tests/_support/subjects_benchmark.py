"""Do subjects keep what is theirs? ``python -m tests._support.subjects_benchmark`` generates, verifies and compares.

Every prompt describes different objects; every arm makes it from the same noise. The world's verifier says of each
object whether it is there and has its color and shape, or the color of another one. Results go to a JSONL file line by
line, so that a run that is stopped goes on where it was; the record is made from that file.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch

import dit_attn
from dit_attn import models
from dit_attn.contact_sheet import Tile, grid
from dit_attn.eval.shapes_world import multi
from dit_attn.eval.shapes_world.multi import MultiScene, SceneObject
from dit_attn.models.evaluate import generate, interval
from dit_attn.pipelines.compare.statistics import difference_figure
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.regions import regions_of, visual_masks
from dit_attn.processors.methods.base import Method
from tests._support.other_environment import write_record

MARGIN = 0.06  # around an object, of the canvas, in its box
SIDES = (("left", "right"), ("bottom", "top"))  # places that tiny-joint knows from its own captions
BATCH = 64  # scenes drawn at once
Arm = tuple[Callable[[MultiScene], list[Method]], dict[str, Any]]


def subject(one: SceneObject, box: bool = True) -> dict[str, Any]:
    """A subject of an object: its size, color and shape, with a box around it."""
    x, y = multi.PLACES[one.place]
    half = multi.SIZES[one.size] + MARGIN
    region = {"box": [max(0.0, x - half), max(0.0, y - half), min(1.0, x + half), min(1.0, y + half)]} if box else {}
    return {"piece": f"{one.size} {one.color} {one.shape}", **region}


def isolation(**settings: Any) -> Arm:
    """Isolation of all objects."""
    return lambda scene: [dit_attn.SubjectIsolation(subjects=tuple(map(subject, scene.objects)), **settings)], {}


def with_sparse(arm: Arm) -> Arm:
    """The same with block-sparse attention at density 0.25."""
    sparse = dit_attn.BlockSparse(density=0.25, q_block=32, kv_block=32, dense_steps=0.1)
    return lambda scene: [*arm[0](scene), sparse], arm[1]


def with_isolation(arm: Arm) -> Arm:
    """The same with isolation of words and regions."""
    return lambda scene: [*isolation(isolate_image=True)[0](scene), *arm[0](scene)], arm[1]


def guided(scale: float) -> Arm:
    """Plain guidance at another scale."""
    return lambda scene: [], {"guidance_scale": scale}


@dataclass(frozen=True)
class Lift(Method):
    """Lift the words of some pieces by a fixed factor, each in a region.

    Attributes:
        lifts: objects with ``piece``, ``factor`` and ``box``.
    """

    sites: ClassVar[tuple[str, ...]] = ("text",)

    lifts: tuple[dict[str, Any], ...] = ()

    def request(self, call: AttentionCall, request: Request) -> None:
        """Add the biases."""
        if call.tokens is None or call.tokens.grid is None or not call.attends_to_text:
            return
        for lift in self.lifts:
            (rows,) = visual_masks(regions_of([lift], call.tokens.grid), call.tokens)
            request.add_span_bias(call, rows, call.prompt_tokens(lift["piece"]), math.log(lift["factor"]))


def lifted(factor: float, wrong: bool = False) -> Arm:
    """Each object's words by a factor in its own box; ``wrong``: the words of the next object there."""

    def methods(scene: MultiScene) -> list[Method]:
        known = [subject(one) for one in scene.objects]
        words = known[1:] + known[:1] if wrong else known
        lifts = [{**a, "piece": b["piece"], "factor": factor} for a, b in zip(known, words, strict=True)]
        return [Lift(lifts=tuple(lifts))]

    return methods, {}


def scaled(**settings: Any) -> Arm:
    """SaaS on the objects."""

    def methods(scene: MultiScene) -> list[Method]:
        return [dit_attn.SaaS(pieces=tuple(subject(one)["piece"] for one in scene.objects), **settings)]

    return methods, {}


def found(**settings: Any) -> Arm:
    """Isolation whose regions are looked for."""

    def methods(scene: MultiScene) -> list[Method]:
        return [dit_attn.SubjectIsolation(subjects=tuple(subject(one, False) for one in scene.objects), **settings)]

    return methods, {}


ARMS: dict[str, dict[str, Arm]] = {
    "isolation": {
        "stock": (lambda scene: [], {}),
        "words": isolation(),
        "regions": isolation(isolate_text=False, isolate_image=True),
        "words and regions": isolation(isolate_image=True),
        "words, soft 2": isolation(strength=2.0),
        "words, first 40 %": isolation(stop=0.4),
        "guidance 4": guided(4.0),
        "guidance 6": guided(6.0),
        "block-sparse 0.25": with_sparse((lambda scene: [], {})),
        "words, block-sparse 0.25": with_sparse(isolation()),
        "found words and regions": found(isolate_image=True),
        "found, whatever the quality": found(isolate_image=True, min_quality=0.0),
    },
    "saas": {
        "stock": (lambda scene: [], {}),
        "guidance 4": guided(4.0),
        "guidance 6": guided(6.0),
        "fixed 4": lifted(4.0),
        "wrong words 4": lifted(4.0, wrong=True),
        "the paper's rule": scaled(measure="post", clamp=None, min_quality=0.0),
        "gated": scaled(),
        "not gated": scaled(min_quality=0.0),
        "closed loop 0.1": scaled(target=0.1, min_quality=0.0, stop=1.0),
        "isolation and gated": with_isolation(scaled()),
    },
}


def scenes_of(model: str, objects: int, count: int, seed: int) -> list[MultiScene]:
    """Different scenes of some objects, held out where the model was trained on such; sides only for tiny-joint."""
    if model != "tiny-joint":
        return multi.held_out_sample(count, seed, (objects, objects))
    draw, found = torch.Generator().manual_seed(seed), {}
    while len(found) < count:
        for scene in multi.sample_scenes(BATCH, draw, (objects, objects)):
            if tuple(sorted(one.place for one in scene.objects)) in SIDES:
                found[multi.caption(scene)] = scene
    return list(found.values())[:count]


def run(options: argparse.Namespace, arms: dict[str, Arm]) -> None:
    """Make what is missing, prompt by prompt, all arms of a prompt in turn."""
    pipe = models.load(options.model)
    pipe.set_progress_bar_config(disable=True)
    call = models.call_defaults(options.model)
    call["max_sequence_length"] = multi.TEXT_LENGTH if options.objects > 2 else 20
    call["num_inference_steps"] = options.steps or call["num_inference_steps"]
    done = {(line["arm"], line["item"]) for line in read(options.lines)}
    options.lines.parent.mkdir(parents=True, exist_ok=True)
    scenes = scenes_of(options.model, options.objects, options.count, options.seed)
    for item, scene in enumerate(scenes):
        for name, (methods, more) in arms.items():
            if (name, item) in done:
                continue
            started = time.perf_counter()
            dit_attn.enable(pipe, *methods(scene))
            (sample,) = generate(pipe, [scene], {**call, **more}, options.seed + item, batch=1)
            verdict = {"background": sample.verdict["background"], "whole": sample.right}
            line = {
                "arm": name, "item": item, "caption": multi.caption(scene),
                "seconds": round(time.perf_counter() - started, 2), **verdict,
                "objects": [asdict(one) for one in sample.objects], "reports": reports(pipe),
            }  # fmt: skip
            with options.lines.open("a") as file:
                file.write(json.dumps(line) + "\n")
            if options.images:
                options.images.mkdir(parents=True, exist_ok=True)
                np.save(image_file(options.images, item, name), (sample.output * 255).astype(np.uint8))


def image_file(folder: Path, item: int, arm: str) -> Path:
    """Where the image of a prompt and an arm is kept."""
    return folder / f"{item:04d}_{arm.replace(' ', '-')}.npy"


def reports(pipe: Any) -> dict[str, Any]:
    """What the methods say of the run."""
    found = getattr(dit_attn.summary(pipe), "reports", {})
    return {slug: report.figures() for slug, report in found.items() if hasattr(report, "figures")}


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
    """Rates of every arm, and differences to the base over the prompts that both have."""
    by_arm = {name: {line["item"]: line for line in lines if line["arm"] == name} for name in names}
    return {name: _row(by_arm[name], by_arm.get(base, {})) for name in names if by_arm[name]}


def _row(arm: dict[int, Any], base: dict[int, Any]) -> dict[str, Any]:
    shared = sorted(set(arm) & set(base))
    seconds = float(np.median([line["seconds"] for line in arm.values()]))
    row: dict[str, Any] = {"prompts": len(arm), "seconds": round(seconds, 2)}
    for word in ("present", "color", "shape", "leak", "both"):
        flags = {item: [_flag(one, word) for one in line["objects"]] for item, line in arm.items()}
        other = {item: [_flag(one, word) for one in base[item]["objects"]] for item in shared}
        row[word] = _figure(flags, other, shared)
    for word in ("background", "whole"):
        row[word] = _figure({item: [line[word]] for item, line in arm.items()},
                            {item: [base[item][word]] for item in shared}, shared)  # fmt: skip
    return row


def _flag(one: dict[str, Any], word: str) -> bool:
    return bool(one["color"] and one["shape"]) if word == "both" else bool(one[word])


def _figure(flags: dict[int, list[bool]], base: dict[int, list[bool]], shared: Sequence[int]) -> dict[str, Any]:
    """A rate with its interval, its difference to the base, objects mended and broken, and McNemar's exact p."""
    every = [x for values in flags.values() for x in values]
    out = {"rate": round(sum(every) / len(every), 4), "right": sum(every), "of": len(every)}
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
    folder: Path, lines: Sequence[dict[str, Any]], names: Sequence[str], path: Path, items: Sequence[int]
) -> None:
    """Draw some prompts as rows, the arms as columns."""
    from PIL import Image

    captions = {line["item"]: line["caption"] for line in lines}
    rows = [
        [
            Tile((Image.fromarray(np.load(image_file(folder, item, name))),), captions[item] * (not at))
            for at, name in enumerate(names)
        ]
        for item in items
    ]
    grid(rows, columns=tuple(names)).save(path, optimize=True)


def main() -> None:
    """Generate what is missing, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", choices=tuple(ARMS), default="isolation", help="arms to run (default: %(default)s)")
    parser.add_argument("--model", default="tiny-joint")
    parser.add_argument("--objects", type=int, default=2, help="objects of a prompt (default: %(default)s)")
    parser.add_argument("--count", type=int, default=96, help="prompts (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help="default: the model's own")
    parser.add_argument("--arms", nargs="+", help="some of the arms; default: all")
    parser.add_argument("--quick", action="store_true", help="two prompts of four steps: does it run?")
    parser.add_argument("--lines", type=Path, help="JSONL file of the results; default: next to the record")
    parser.add_argument("--images", type=Path, help="folder to keep the images in")
    parser.add_argument("--sheet", type=Path, help="PNG of the first four prompts, from --images")
    parser.add_argument("--output", type=Path, help="the record; default: benchmarks/subjects/MODEL_WHAT_OBJECTS.json")
    options = parser.parse_args()
    if options.quick:
        options.count, options.steps = 2, 4
    name = f"{options.model}_{options.what}_{options.objects}{'_quick' if options.quick else ''}"
    options.output = options.output or Path("outputs" if options.quick else "benchmarks/subjects") / f"{name}.json"
    options.lines = options.lines or Path("outputs") / f"{name}.jsonl"
    arms = {key: ARMS[options.what][key] for key in options.arms or ARMS[options.what]}
    run(options, arms)
    lines = [line for line in read(options.lines) if line["item"] < options.count]
    words = [f"--{key} {getattr(options, key)}" for key in ("what", "model", "objects", "count", "seed", "steps")
             if getattr(options, key) is not None]  # fmt: skip
    command = f"python -m tests._support.subjects_benchmark {' '.join(words)}"
    write_record(options.output, command, {
        "model": options.model, "objects": options.objects, "arms": compare(lines, list(ARMS[options.what])),
    })  # fmt: skip
    if options.sheet and options.images:
        sheet(options.images, lines, list(arms), options.sheet, range(min(4, options.count)))


if __name__ == "__main__":
    main()
