"""Does re-weighting fill parts of a mask that stay empty? ``python -m tests._support.reweighting_benchmark``.

A concept is learned from five shots, and masks of two separate parts are painted on normal pieces that nothing has
seen. Every arm paints a batch from the same noise before the next batch begins. The normal twin is known, so that what
each part shows is exact: its ratio is 1 for the change that true defects make and 0 for none. Results go to a JSONL
file batch by batch, so that a run that is stopped goes on where it was.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from dit_attn import AdaptiveReweighting, models
from dit_attn.contact_sheet import grid, tile
from dit_attn.eval.inspection_world import world
from dit_attn.eval.inspection_world.folders import write_folders
from dit_attn.eval.inspection_world.measures import PASS, mean_change, measure
from dit_attn.models.export import environment
from dit_attn.pipelines.anomaly.backbone import Backbone
from dit_attn.pipelines.anomaly.benchmark.figures import interval
from dit_attn.pipelines.anomaly.concept import Concept
from dit_attn.pipelines.anomaly.generator import AnomalyGenerator
from dit_attn.pipelines.anomaly.masks import MaskSource
from dit_attn.pipelines.anomaly.orders import GenerateConfig, Order, seed_of
from dit_attn.pipelines.anomaly.sheet import outlined
from dit_attn.pipelines.anomaly.sources import from_folders
from dit_attn.pipelines.anomaly.training import TrainConfig, train
from tests._support.other_environment import write_record

MODEL, SIZE, SHOTS, OFF = "tiny-inspect", 64, 5, "off"
TASKS = ("metal+scratch", "granite+contamination")  # of the training, and never trained on
ARMS: dict[str, tuple[AdaptiveReweighting, ...]] = {
    OFF: (),
    **{mode: (AdaptiveReweighting(mode=mode),) for mode in ("bias", "gain", "logit")},
    "bias, up to 8": (AdaptiveReweighting(w_max=8.0, start=0.0, stop=1.0),),
}
GAP = 4  # pixels between the parts of a mask
EMPTY = PASS[0]  # a part whose ratio is below this is left out
MEASURES = ("lowest ratio", "lowest fill", "gap of ratios", "leak")


def two_parts(source: MaskSource, region: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A mask of two parts that lie apart: both as they are drawn."""
    while True:
        first, second = source.sample(region, rng), source.sample(region, rng)
        near = ndimage.binary_dilation(first, iterations=GAP)
        if not (near & second).any() and all(ndimage.label(x, np.ones((3, 3)))[1] == 1 for x in (first, second)):
            return first | second


def order_of(product: str, defect: str, number: int, masks: MaskSource) -> Order:
    """The pair ``number`` of a task: normal piece, mask and noise by its own seed."""
    piece = world.draw(world.Piece(product, "", world.FIRST_HELD_OUT_SEED + 8 * 10**8 + number), SIZE)
    rng = np.random.default_rng(seed_of(0, product, defect, number, "two parts"))
    pixels = (piece.normal * 255).round().astype(np.uint8)
    mask = two_parts(masks, piece.foreground, rng)
    return Order(product, defect, number, 0, Path(), pixels, mask, seed_of(0, product, defect, number))


def measured(image: np.ndarray, order: Order, reference: np.ndarray) -> dict[str, Any]:
    """What each part of a painted mask shows."""
    labels, count = ndimage.label(order.mask, np.ones((3, 3)))
    shown, normal = image / 255, order.pixels / 255
    parts = [measure(shown, normal, labels == part + 1, reference) for part in range(count)]
    leak = measure(shown, normal, order.mask, reference).leak
    ratios, fills = [one.ratio for one in parts], [one.fill for one in parts]
    return {
        "ratios": ratios, "fills": fills, "lowest ratio": min(ratios), "lowest fill": min(fills),
        "gap of ratios": max(ratios) - min(ratios), "parts left out": sum(x < EMPTY for x in ratios), "leak": leak,
    }  # fmt: skip


def learn(backbone: Backbone, task: str, folder: Path, seed: int) -> Concept:
    """The concept of a task, learned once."""
    product, defect = task.split("+")
    if not (folder / "concept.safetensors").is_file():
        found = write_folders(folder / "data", product, defect, normals=16, shots=SHOTS, size=SIZE, seed=2000 + seed)
        train(backbone, from_folders(*found, product, defect), TrainConfig(seed=seed), folder, model=MODEL)
    return Concept.load(folder / "concept.safetensors")


def run(count: int, batch: int, seed: int, lines: Path, tasks: Sequence[str], arms: Sequence[str]) -> None:
    """Paint what is missing, batch by batch, all arms of a batch one after another."""
    done = {(line["task"], line["number"], line["arm"]) for line in read(lines)}
    backbone = Backbone(models.load(MODEL), SIZE)
    backbone.pipe.set_progress_bar_config(disable=True)
    for task in tasks:
        product, defect = task.split("+")
        concept = learn(backbone, task, lines.parent / f"{lines.stem}_{task}", seed)
        masks = MaskSource("real", concept.shapes[task])
        first = world.FIRST_HELD_OUT_SEED + 7 * 10**8
        reference = mean_change([world.draw(world.Piece(product, defect, first + i), SIZE) for i in range(20)])
        config = GenerateConfig(seed=seed)
        painters = {arm: AnomalyGenerator(backbone.pipe, concept, config, methods=ARMS[arm]) for arm in arms}
        for start in range(0, count, batch):
            numbers = range(start, min(count, start + batch))
            orders = [order_of(product, defect, number, masks) for number in numbers]
            for arm, generator in painters.items():
                if all((task, number, arm) in done for number in numbers):
                    continue
                for one in generator.make(orders):
                    found = measured(one.image, one.order, reference)
                    add(lines, {"task": task, "number": one.order.number, "arm": arm, **found})


def concept_shares(task: str, lines: Path, seed: int, batch: int) -> dict[str, Any]:
    """Share of the attention of the masks that the learned vectors get, and the weights; means over the steps."""
    backbone = Backbone(models.load(MODEL), SIZE)
    backbone.pipe.set_progress_bar_config(disable=True)
    product, defect = task.split("+")
    concept = learn(backbone, task, lines.parent / f"{lines.stem}_{task}", seed)
    masks = MaskSource("real", concept.shapes[task])
    orders = [order_of(product, defect, number, masks) for number in range(batch)]
    out = {}
    for arm, w_max in (("weights of 1", 1.0), ("bias", None), ("bias, up to 8", 8.0)):
        method = AdaptiveReweighting(w_max=w_max, observe=True)
        generator = AnomalyGenerator(backbone.pipe, concept, GenerateConfig(seed=seed), methods=(method,))
        generator.make(orders)
        report = generator.painter.reports[method.slug]
        shares, weights, most = (list(x.values()) for x in (report.shares, report.means, report.highest))
        out[arm] = {"share": float(np.mean(shares)), "weight": float(np.mean(weights)), "largest weight": max(most)}
    return out


def sheet(path: Path, lines: Path, seed: int, rows: int = 4) -> None:
    """Draw some pairs of the first task as rows: the normal piece with the mask, and what every arm painted."""
    backbone = Backbone(models.load(MODEL), SIZE)
    backbone.pipe.set_progress_bar_config(disable=True)
    product, defect = TASKS[0].split("+")
    concept = learn(backbone, TASKS[0], lines.parent / f"{lines.stem}_{TASKS[0]}", seed)
    masks = MaskSource("real", concept.shapes[TASKS[0]])
    orders = [order_of(product, defect, number, masks) for number in range(rows)]
    columns = {"normal, mask": [outlined(order.pixels, order.mask) for order in orders]}
    for arm, given in ARMS.items():
        generator = AnomalyGenerator(backbone.pipe, concept, GenerateConfig(seed=seed), methods=given)
        columns[arm] = [one.image for one in generator.make(orders)]
    cells = [[tile(images[row][None], "", height=128) for images in columns.values()] for row in range(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    grid(cells, columns=tuple(columns)).save(path, optimize=True)


def add(path: Path, line: dict[str, Any]) -> None:
    """Append a result."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(json.dumps(line) + "\n")


def read(path: Path) -> list[dict[str, Any]]:
    """The results so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def compare(lines: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By task and arm: means with intervals, and paired differences to no re-weighting."""
    out: dict[str, Any] = {}
    for task in dict.fromkeys(line["task"] for line in lines):
        own = {arm: {x["number"]: x for x in lines if (x["task"], x["arm"]) == (task, arm)} for arm in ARMS}
        out[task] = {}
        for arm, rows in own.items():
            if not rows:
                continue
            left_out = sum(x["parts left out"] for x in rows.values())
            entry: dict[str, Any] = {"pairs": len(rows), "parts left out": left_out}
            for name in MEASURES:
                entry[name] = interval([x[name] for x in rows.values()])
                both = [(x[name], own[OFF][number][name]) for number, x in rows.items() if number in own[OFF]]
                if arm != OFF and both:
                    entry[name]["against off"] = interval([a - b for a, b in both])
            out[task][arm] = entry
    return out


def rounded(value: Any) -> Any:
    """The same with numbers of four digits after the point."""
    if isinstance(value, dict):
        return {key: rounded(one) for key, one in value.items()}
    if isinstance(value, list):
        return [rounded(one) for one in value]
    return round(float(value), 4) if isinstance(value, float) else value


def main() -> None:
    """Paint what is missing, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=24, help="pairs of every task and arm (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=TASKS)
    parser.add_argument("--arms", nargs="+", choices=tuple(ARMS), default=tuple(ARMS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lines", type=Path, default=Path("outputs/reweighting.jsonl"), help="results, line by line")
    parser.add_argument("--output", type=Path, default=Path(f"benchmarks/anomaly/{MODEL}_reweighting.json"))
    parser.add_argument("--sheet", type=Path, help="PNG of the first pairs")
    options = parser.parse_args()
    run(options.count, options.batch, options.seed, options.lines, options.tasks, options.arms)
    lines = [
        line for line in read(options.lines)
        if line["number"] < options.count and line["task"] in options.tasks and line["arm"] in options.arms
    ]  # fmt: skip
    shown = [f'"{arm}"' if " " in arm else arm for arm in options.arms]
    command = (
        f"python -m tests._support.reweighting_benchmark --count {options.count} --seed {options.seed} "
        f"--tasks {' '.join(options.tasks)} --arms {' '.join(shown)}"
    )
    settings = {arm: [method.to_dict() for method in ARMS[arm]] for arm in options.arms}
    write_record(options.output, command, rounded({
        "what": "masks of two parts painted with and without adaptive re-weighting, from the same noise; a part is "
        f"left out where its ratio is below {EMPTY}; intervals are Student's over the pairs, 95 %",
        "model": MODEL, "environment": environment(), "shots": SHOTS, "arms": settings, "tasks": compare(lines),
        "attention to the concept": {
            task: concept_shares(task, options.lines, options.seed, options.batch) for task in options.tasks
        },
        "pairs": lines,
    }))  # fmt: skip
    if options.sheet:
        sheet(options.sheet, options.lines, options.seed)


if __name__ == "__main__":
    main()
