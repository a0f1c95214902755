"""Hold densities that follow the error against fixed dense steps, at equal executed share, in few and many steps.

    python benchmarks/error_control/measure.py tiny-video --count 24 \\
        --output benchmarks/error_control/tiny-video.json --resume

Every item is made dense, with a fixed density and the preset's dense steps, with the same density and none, and with
``target_error``. Its bound is tuned beforehand, on prompts of its own, so that the share is that of the arm with dense
steps, measurements counted. Measurements are appended to a log next to the output, so that ``--resume`` goes on where a
run was interrupted, also with other numbers of steps or densities; the record has those of the log that have all items.

Two processes share the items by ``--shard 1/2`` and ``--shard 2/2``; each tunes for itself, to the same bounds. A last
call without it and with ``--resume`` reads all their logs, measures what is missing and writes the record.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import dit_attn
from dit_attn import models
from dit_attn.cli import outputs
from dit_attn.cli.commands.bench.model import load_average
from dit_attn.eval.shapes_world import items
from dit_attn.models.evaluate import current_commit
from dit_attn.models.export import environment
from dit_attn.pipelines import MeasurementLog
from dit_attn.pipelines.compare.statistics import difference_figure, mean_figure, ratio_figure, verify_caption
from dit_attn.pipelines.measurement_log import shard_log
from dit_attn.pipelines.run import Shard
from dit_attn.processors.methods.presets import preset_for

KINDS = {"tiny-image": "image", "tiny-video": "video"}
STEPS = (4, 8, 20, 50)
DENSITIES = (0.125, 0.25)
POOL = 96  # items are the first of so many, prompts to tune on the last
TUNING = 2  # prompts
ROUNDS = 7  # bounds that are tried, each half a factor closer
CLOSE = 0.01  # of the wanted share
FIGURES = ("psnr", "error", "followed", "share", "measuring", "seconds", "cpu seconds")


@dataclass(frozen=True)
class Arm:
    """One way to make an item: its name, the method (``None`` for dense), and the number of steps."""

    name: str
    method: Any
    steps: int

    @property
    def key(self) -> str:
        """Name of its measurements."""
        return f"{self.name}|{self.steps}"


class Bench:
    """An embedded model that makes items with and without a method.

    Args:
        name: of the model.
        slug: of the method, with the settings of the model's preset.
        device: where it runs.
    """

    def __init__(self, name: str, slug: str, device: str = "cpu") -> None:
        self.pipe, self.call = models.load(name).to(device), models.call_defaults(name)
        self.pipe.set_progress_bar_config(disable=True)
        settings = {k: v for k, v in preset_for(None, name).methods.get(slug, {}).items() if k != "provenance"}
        self.method: Any = dit_attn.Method.from_dict({**settings, "method": slug})
        pool = items.held_out_sample(KINDS[name], POOL)
        self.prompts = [items.caption(item) for item in pool]

    def make(self, index: int, arm: Arm) -> tuple[torch.Tensor, dict[str, float]]:
        """Frames (F, H, W, 3) in [0, 1] of an item, and what they cost."""
        call = {**self.call, "num_inference_steps": arm.steps, "generator": torch.Generator().manual_seed(index)}
        if arm.method is not None:
            dit_attn.enable(self.pipe, arm.method)
        started, cpu = time.perf_counter(), time.process_time()
        try:
            out = self.pipe(self.prompts[index], output_type="pt", **call)
            cost = {"seconds": time.perf_counter() - started, "cpu seconds": time.process_time() - cpu}
            found = dit_attn.summary(self.pipe) if arm.method is not None else None
        finally:
            dit_attn.disable(self.pipe)
        frames = out.frames[0] if hasattr(out, "frames") else out.images
        cost["share"] = 1.0 if found is None else found.run_density or 1.0
        cost["measuring"] = 0.0 if found is None else found.measuring_share
        return frames.float().clamp(0, 1).permute(0, 2, 3, 1).cpu(), cost

    def fixed(self, steps: int, density: float) -> list[Arm]:
        """The preset's dense steps, and none."""
        preset = replace(self.method, density=density)
        none = replace(preset, dense_steps=0, dense_last_steps=0)
        return [Arm(f"dense steps {density:g}", preset, steps), Arm(f"fixed {density:g}", none, steps)]

    def controlled(self, steps: int, density: float, bound: float) -> Arm:
        """Half the density and more, by the error."""
        method = replace(self.method, density=density / 2, dense_steps=0, dense_last_steps=0, target_error=bound)
        return Arm(f"controlled {density:g}", method, steps)

    def tuned(self, steps: int, density: float, log: MeasurementLog) -> float:
        """The bound with the share of the arm with dense steps, on the prompts to tune on."""
        key = f"bound|{density:g}|{steps}"
        if key not in log.rows:
            wanted = self._share(self.fixed(steps, density)[0])
            low, high = 0.01, 2.0
            for _ in range(ROUNDS):
                bound = math.sqrt(low * high)
                share = self._share(self.controlled(steps, density, bound))
                low, high = (bound, high) if share > wanted else (low, bound)
                if abs(share / wanted - 1.0) < CLOSE:
                    break
            log.add(key, {"bound": bound, "share": share, "wanted": wanted})
        found: float = log.rows[key]["bound"]
        return found

    def _share(self, arm: Arm) -> float:
        return sum(self.make(POOL - 1 - place, arm)[1]["share"] for place in range(TUNING)) / TUNING


def judge(frames: torch.Tensor, dense: torch.Tensor, prompt: str) -> dict[str, float]:
    """How far frames are from those of dense attention, and whether they follow the prompt."""
    apart = float((frames - dense).square().mean())
    verdict = verify_caption((frames * 255).round().byte().numpy(), prompt) or {}
    return {
        "psnr": -10.0 * math.log10(max(apart, 1e-10)),
        "error": float((frames - dense).norm() / dense.norm()),
        "followed": float(all(verdict.values())),
    }


def table(rows: dict[str, Any], count: int, steps: list[int], densities: list[float]) -> list[dict[str, Any]]:
    """Figures of every arm with 95 % intervals, and of the controlled ones their distance to the others."""
    found = []
    for number in steps:
        names = [f"{kind} {density:g}" for density in densities for kind in ("dense steps", "fixed", "controlled")]
        for name in ("dense", *names):
            mine = _of(rows, f"{name}|{number}", count)
            if not mine:
                continue
            row: dict[str, Any] = {"arm": name, "steps": number}
            row |= {figure: mean_figure([one[figure] for one in mine]) for figure in FIGURES}
            if name.startswith("controlled"):
                row["bound"] = rows[f"bound|{name.split()[1]}|{number}"]["bound"]
                for kind in ("dense steps", "fixed"):
                    other = _of(rows, f"{kind} {name.split()[1]}|{number}", count)
                    row[f"psnr - {kind}"] = difference_figure([x["psnr"] for x in mine], [x["psnr"] for x in other])
                    row[f"share / {kind}"] = ratio_figure([x["share"] for x in mine], [x["share"] for x in other])
            found.append(row)
    return found


def _of(rows: dict[str, Any], key: str, count: int) -> list[dict[str, float]]:
    """The measurements of an arm, none unless it has all items."""
    found = [rows[f"{key}|{index}"] for index in range(count) if f"{key}|{index}" in rows]
    return found if len(found) == count else []


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", choices=sorted(KINDS))
    parser.add_argument("--method", choices=("rectified-spaattn", "block-sparse"), default="rectified-spaattn")
    parser.add_argument("--count", type=int, default=24, help="items")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--densities", type=float, nargs="+", default=list(DENSITIES))
    parser.add_argument("--threads", type=int, help="of torch (default: its own)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, required=True, help="JSON record; its log stands next to it")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--shard", type=Shard.parse, metavar="I/N", help="every Nth item, with a log of their own")
    parser.add_argument("--quick", action="store_true", help="one item, 4 steps, density .25")
    args = parser.parse_args()
    if args.quick:
        args.count, args.steps, args.densities = 1, [4], [0.25]
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench(args.model, args.method, args.device)
    setup = {"model": args.model, "method": bench.method.to_dict(), "environment": environment()}
    setup |= {"device": args.device} if args.device != "cpu" else {}
    log = shard_log(args.output, setup, args.resume, args.shard)
    part = args.shard.part(range(args.count)) if args.shard else list(range(args.count))
    before = load_average()
    for steps in args.steps:
        arms = [Arm("dense", None, steps)]
        for density in args.densities:
            bound = bench.tuned(steps, density, log)
            arms += [*bench.fixed(steps, density), bench.controlled(steps, density, bound)]
        for place, index in enumerate(part, 1):
            missing = [arm for arm in arms if f"{arm.key}|{index}" not in log.rows]
            if not missing:
                continue
            dense, cost = bench.make(index, arms[0])
            for arm in missing:
                frames = dense
                if arm.method is not None:
                    frames, cost = bench.make(index, arm)
                log.add(f"{arm.key}|{index}", {**judge(frames, dense, bench.prompts[index]), **cost})
            print(f"{steps} steps: {place} of {len(part)} items", flush=True)
    if args.shard:
        return
    steps = sorted({*STEPS, *args.steps})
    record = {
        "what": "densities that follow the error (target_error) next to fixed ones with the preset's dense steps and "
        "with none; the bound is tuned to the share of the former on prompts of its own",
        "command": "python benchmarks/error_control/measure.py " + " ".join(_words(args)),
        "commit": current_commit(),
        "environment": environment(),
        "load_average": {"before": before, "after": load_average(), "cores": os.cpu_count()},
        **setup,
        "items": args.count,
        "rows": table(log.rows, args.count, steps, sorted({*DENSITIES, *args.densities})),
    }
    outputs.write_json(record, args.output)
    for row in record["rows"]:
        shown = "  ".join(
            f"{name} {row[name]['value']:.3f}" for name in (*FIGURES, "psnr - dense steps") if row.get(name)
        )
        print(f"{row['steps']} steps, {row['arm']}: {shown}")


def _words(args: argparse.Namespace) -> list[str]:
    numbers = [f"--{name} {' '.join(f'{x:g}' for x in getattr(args, name))}" for name in ("steps", "densities")]
    more = [f"--threads {args.threads}"] * bool(args.threads) + [f"--device {args.device}"] * (args.device != "cpu")
    return [args.model, f"--method {args.method}", f"--count {args.count}", *numbers, *more]


if __name__ == "__main__":
    main()
