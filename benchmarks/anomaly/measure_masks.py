"""Hold the sources of masks against masks that nothing has seen: sizes, shapes, and copies of the shots.

    python benchmarks/anomaly/measure_masks.py --output benchmarks/anomaly/tiny-inspect_masks.json

Two (product, defect) pairs of the inspection world, one of the training of tiny-inspect and one never trained on. From
the masks of a few shots come augmented ones (`real`), procedural ones (`drawn`) and those of a mask model (`learned`);
each source is compared with new true masks of the pair, and so are the shots and another set of true masks.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_attn import files, models
from dit_attn.cli import outputs
from dit_attn.cli.commands.bench.model import load_average
from dit_attn.contact_sheet import Tile, grid, tile
from dit_attn.eval.inspection_world.folders import write_folders
from dit_attn.eval.inspection_world.world import FIRST_HELD_OUT_SEED, HELD_OUT_PAIRS, Piece, draw
from dit_attn.models.evaluate import current_commit
from dit_attn.models.export import environment
from dit_attn.pipelines.anomaly import Backbone, Concept, MaskSource, TrainConfig, train
from dit_attn.pipelines.anomaly.mask_drawer import MaskDrawer
from dit_attn.pipelines.anomaly.mask_model import mask_problem
from dit_attn.pipelines.anomaly.mask_shapes import describe, distance, nearest_overlap
from dit_attn.pipelines.anomaly.mask_training import MaskTrainConfig, learn_masks
from dit_attn.pipelines.anomaly.masks import boxed
from dit_attn.pipelines.anomaly.orders import seed_of
from dit_attn.pipelines.anomaly.sources import Source, from_folders

PAIRS = (("metal", "scratch"), ("weave", "hole"))
SIZE = 64
COPY = 0.9  # intersection over union from which a mask is a copy of a shot
_NEW = FIRST_HELD_OUT_SEED + 9 * 10**8  # first seed of true masks that are no shots


def main() -> int:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shots", type=int, default=5)
    parser.add_argument("--steps", type=int, default=MaskTrainConfig.steps, help="optimizer steps of the mask model")
    parser.add_argument("--batch", type=int, default=MaskTrainConfig.batch)
    parser.add_argument("--embedding-steps", type=int, default=60, help="steps of a model without a LoRA; 0: none")
    parser.add_argument("--count", type=int, default=32, help="masks of every source and pair")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--sheet", type=Path, help="image of some masks of every source")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        source = Source()
        for product, defect in PAIRS:
            place = Path(folder) / product
            found = from_folders(*write_folders(place, product, defect, normals=4, shots=args.shots), product, defect)
            source.normals |= found.normals
            source.shots += found.shots
        pipe = models.load("tiny-inspect")
        pipe.set_progress_bar_config(disable=True)
        backbone = Backbone(pipe, SIZE)
        concept = train(backbone, source, TrainConfig(steps=1, batch=1, lora_rank=0), Path(folder))
        learning = MaskTrainConfig(steps=args.steps, batch=args.batch, trials=0)
        record = _facts(args)
        if args.embedding_steps:
            alone = replace(learning, steps=args.embedding_steps, lora_rank=0)
            record["embedding_alone"] = _learn(backbone, concept, alone, Path(folder), args.count // 5)[0]
        record["with_lora"], learned = _learn(backbone, concept, learning, Path(folder), args.count)
    record["pairs"], cells = {}, []
    for product, defect in PAIRS:
        masks = _masks(product, defect, concept, learned[f"{product}+{defect}"], args.count)
        record["pairs"][f"{product}+{defect}"] = _compare(masks, concept.shapes[f"{product}+{defect}"])
        record["pairs"][f"{product}+{defect}"]["in_training_of_model"] = (product, defect) not in HELD_OUT_PAIRS
        cells += [_cell(f"{product}+{defect}, {name}", masks[name]) for name in masks]
    if args.sheet:
        outputs.write_image(grid([[cell] for cell in cells]), args.sheet)
    files.write_json(args.output, record)
    return 0


def _facts(args: argparse.Namespace) -> dict[str, Any]:
    command = f"python {Path(sys.argv[0]).as_posix()} --steps {args.steps} --batch {args.batch} --shots {args.shots}"
    return {
        "model": "tiny-inspect", "what": "masks of three sources against new true masks of the same pair",
        "command": f"{command} --embedding-steps {args.embedding_steps} --count {args.count}",
        "commit": current_commit(), "environment": environment(), "load_average": load_average(),
        "shots": args.shots, "masks_per_source": args.count, "copy": f"overlap with a shot of at least {COPY}",
    }  # fmt: skip


def _learn(
    backbone: Backbone, concept: Concept, config: MaskTrainConfig, folder: Path, count: int
) -> tuple[dict[str, Any], dict[str, list[np.ndarray]]]:
    """Learn, and draw ``count`` masks of every pair: figures, and the masks, usable or not."""
    losses: list[float] = []
    wall, cpu = time.perf_counter(), time.process_time()
    learn_masks(backbone, concept, config, folder, on_progress=lambda done, total, loss: _note(losses, loss))
    spent = {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - cpu}
    drawer = MaskDrawer(backbone, concept)
    usable: dict[str, Any] = {}
    masks: dict[str, list[np.ndarray]] = {}
    cpu = time.process_time()
    for pair in concept.settings.pairs:
        drawn = [drawer.attempt(pair, seed_of(1, pair, number, "trial mask")) for number in range(count)]
        reasons = [reason.split(" is ")[0] if reason.startswith("its") else reason for _, reason in drawn]
        masks[pair] = [boxed(mask) for mask, _ in drawn if mask.any()]
        counts = dict(Counter(filter(None, reasons)))
        usable[pair] = {"usable": count - sum(counts.values()), "of": count, "rejected": counts}
    drawing = (time.process_time() - cpu) / (count * len(usable))
    return {
        "steps": config.steps, "batch": config.batch, "lora_rank": config.lora_rank,
        **{name: round(value, 1) for name, value in spent.items()}, "cpu_seconds_per_mask": round(drawing, 3),
        "loss": {"first 20": _rounded(np.mean(losses[:20])), "last 20": _rounded(np.mean(losses[-20:]))}, **usable,
    }, masks  # fmt: skip


def _note(losses: list[float], loss: float) -> None:
    losses.append(loss)
    if len(losses) % 20 == 0:
        print(f"{len(losses)} steps, loss {np.mean(losses[-20:]):.4f}", file=sys.stderr)


def _masks(
    product: str, defect: str, concept: Concept, learned: list[np.ndarray], count: int
) -> dict[str, list[np.ndarray]]:
    pair = f"{product}+{defect}"
    shapes = concept.shapes[pair]
    true = [boxed(draw(Piece(product, defect, _NEW + i), SIZE).mask) for i in range(2 * count)]
    out = {"reference": true[:count], "true": true[count:], "shots": shapes}
    for name in ("real", "drawn"):
        source = MaskSource(name, shapes)
        seeds = [seed_of(2, pair, number, name) for number in range(count)]
        out[name] = [boxed(source.shape(np.random.default_rng(seed))) for seed in seeds]
    return {**out, **({"learned": learned} if learned else {})}


def _compare(masks: dict[str, list[np.ndarray]], shapes: list[np.ndarray]) -> dict[str, Any]:
    found = {name: [describe(mask) for mask in group] for name, group in masks.items()}
    out: dict[str, Any] = {}
    for name, rows in found.items():
        means = {key: _quartiles([row[key] for row in rows]) for key in ("area", "elongation", "roughness")}
        good = sum(not mask_problem(np.pad(mask, 1), shapes) for mask in masks[name])
        out[name] = {"masks": len(rows), "usable": good, **means}
        if name != "reference":
            out[name]["distance_to_reference"] = {
                key: _rounded(distance([row[key] for row in rows], [row[key] for row in found["reference"]]))
                for key in means
            }
        if name != "shots":
            near = [nearest_overlap(mask, shapes) for mask in masks[name]]
            out[name]["overlap_with_nearest_shot"] = {
                "mean": _rounded(np.mean(near)), "highest": _rounded(np.max(near)),
                "copies": int(sum(value >= COPY for value in near)),
            }  # fmt: skip
    return out


def _quartiles(values: list[float]) -> list[float]:
    return [_rounded(value) for value in np.quantile(values, (0.25, 0.5, 0.75))]


def _rounded(value: Any) -> float:
    return round(float(value), 3)


def _cell(label: str, masks: list[np.ndarray]) -> Tile:
    row = []
    for mask in masks[:12]:
        side = max(40, *mask.shape)
        box = np.zeros((side, side), bool)
        top, left = ((side - length) // 2 for length in mask.shape)
        box[top : top + mask.shape[0], left : left + mask.shape[1]] = mask
        row.append(box[:40, :40])
    row += [np.zeros((40, 40), bool)] * (12 - len(row))
    pixels = np.repeat((np.concatenate(row, 1) * np.uint8(255))[..., None], 3, 2)
    return tile(pixels[None], label, "", height=80)


if __name__ == "__main__":
    sys.exit(main())
