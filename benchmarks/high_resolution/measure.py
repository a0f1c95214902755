"""Hold ways to make large images and clips against each other on the embedded models: layout, outlines, detail, time.

    python benchmarks/high_resolution/measure.py tiny-video --count 48 \\
        --output benchmarks/high_resolution/tiny-video.json --resume

Every item has one prompt, one seed and one native pass, from which all two-stage arms and the enlargement go on; native
passes are kept next to the output. Measurements are appended to a log there, so that ``--resume`` goes on where a run
was interrupted, also with other arms, noise levels or factors. The record has every arm of the log that has all items.
Windows come first: they take about half of the time of dense attention at 2x, and less above.

    --only @windows                the arms without dense attention
    --only @published              what the paper compares, and dense attention at interpolated positions
    --only "two stages window"     one arm

Two processes share the items by ``--shard 1/2`` and ``--shard 2/2``; each compares its items in turns on its own. A
last call without it and with ``--resume`` reads all their logs, measures what is missing and writes the record.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dit_attn
from dit_attn import InwardWindow, models
from dit_attn.cli import outputs
from dit_attn.cli.commands.bench.model import load_average
from dit_attn.contact_sheet import Tile, grid, tile
from dit_attn.eval.shapes_world import items
from dit_attn.eval.shapes_world.multi import MultiScene
from dit_attn.eval.shapes_world.multi_verify import detail
from dit_attn.eval.shapes_world.outline import mean_outline
from dit_attn.eval.shapes_world.verify import detect_objects
from dit_attn.models.evaluate import current_commit
from dit_attn.models.export import environment
from dit_attn.pipelines import HighResolution, MeasurementLog
from dit_attn.pipelines.compare.statistics import difference_figure, mean_figure, ratio_figure, verify_caption
from dit_attn.pipelines.high_resolution import NativePass
from dit_attn.pipelines.high_resolution.latents import enlarged, form_of
from dit_attn.pipelines.measurement_log import shard_log
from dit_attn.pipelines.run import Shard

KINDS = {"tiny-image": "image", "tiny-joint": "image", "tiny-multi": "multi", "tiny-video": "video"}
FACTORS = {"tiny-image": (2, 3, 4), "tiny-joint": (2, 3, 4), "tiny-multi": (2, 3, 4), "tiny-video": (2, 3)}
SIGMAS = (0.5, 0.7, 0.9)
POSITIONS = ("interpolated", "ntk", "dype", "plain positions")  # words of arms
POOL = 96  # items are the first of so many, whatever --count is
FIGURES = ("whole", "count", "objects", "sharpness", "perimeter", "edge-width", "detail")
_OVERRIDE = {"override": "text", "interval": 2}
# Methods of a pass from noise at the large size, and of the second stage after a native pass; None is dense attention.
DIRECT: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "window": {},
    "dense, interpolated": {"whole": True, "rotary": "interpolated"},
    "dense, ntk": {"whole": True, "rotary": "ntk"},
    "dense, dype": {"whole": True, "rotary": "dype"},
    "single pass, pooled": {"rotary": "interpolated", "outside": "pooled"},
    "single pass, pooled, plain positions": {"outside": "pooled"},
    "single pass, anchors": {"rotary": "interpolated", "outside": "anchors"},
    "single pass, anchors, plain positions": {"outside": "anchors"},
    "single pass, damped anchors": {"rotary": "interpolated", "outside": "anchors", "outside_bias": -1.0},
}
STAGES: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "window": {},
    "window + override, twin extrapolated": _OVERRIDE,
    "window + override, twin interpolated": {**_OVERRIDE, "twin_rotary": "interpolated"},
    "window, interpolated": {"rotary": "interpolated"},
    "window, interpolated + override": {**_OVERRIDE, "rotary": "interpolated", "twin_rotary": "interpolated"},
    "dense, interpolated": {"whole": True, "rotary": "interpolated"},
}
SETS: dict[str, Callable[[str], bool]] = {
    "@windows": lambda name: not any(word in name for word in ("dense", "override", "plain positions")),
    "@published": lambda name: name in {
        "bilinear", "direct dense", "direct window", "direct dense, interpolated", "two stages dense",
        "two stages window", "two stages window + override, twin extrapolated",
        "two stages window + override, twin interpolated", "two stages window, interpolated",
    },
}  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """One way to make an item.

    Attributes:
        name: of the arm.
        make: (factor, prompt, seed, native pass) to frames (F, H, W, 3) uint8 and seconds.
        factor: of the native size.
        sigma: noise level of the second stage; ``None`` for what has none.
    """

    name: str
    make: Callable[[str, int, NativePass], tuple[np.ndarray, float]]
    factor: int
    sigma: float | None = None

    @property
    def key(self) -> str:
        """Name of its measurements."""
        return f"{self.name}|{self.factor}|{self.sigma}"

    @property
    def dense(self) -> bool:
        """Whether some pass at the large size is dense."""
        return "dense" in self.name or "override" in self.name


class Bench:
    """An embedded model with the calls of all arms.

    Args:
        name: of the model.
        steps: of a full schedule; ``None`` for the model's own.
        device: where it runs.
    """

    def __init__(self, name: str, steps: int | None, device: str = "cpu") -> None:
        self.name, self.pipe = name, models.load(name).to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.call = models.call_defaults(name) | ({"num_inference_steps": steps} if steps else {})
        size = (self.call.pop("height"), self.call.pop("width"))
        self.size, self.video = size, form_of(self.pipe).video
        self.tokens = HighResolution(self.pipe).tokens(size)

    def method(self, settings: dict[str, Any] | None, factor: int) -> InwardWindow | None:
        """The method of an arm; ``whole`` is dense attention of which the positions alone differ."""
        if settings is None:
            return None
        rest = {name: value for name, value in settings.items() if name != "whole"}
        whole = {"window": tuple(factor * n for n in self.tokens)} if "whole" in settings else {}
        return InwardWindow(native=self.tokens, **whole, **rest)

    def native(self, prompt: str, seed: int, folder: Path) -> NativePass:
        """The native pass of an item, made once."""
        what = json.dumps([self.name, prompt, seed, self.call], sort_keys=True)
        path = folder / f"{hashlib.sha256(what.encode()).hexdigest()[:16]}.safetensors"
        if path.is_file():
            return NativePass.load(path)
        make = HighResolution(self.pipe, None)
        first = make.native_pass(prompt, native=self.size, generator=_generator(seed), **self.call)
        first.save(path)
        return first

    def enlarge(self, factor: int) -> Any:
        """The native pass, or its enlargement."""

        def make(prompt: str, seed: int, first: NativePass) -> tuple[np.ndarray, float]:
            height, width = (factor * n for n in self.size)
            values = first.values.float()
            return _frames(values if factor == 1 else enlarged(values, height, width, "bilinear")), 0.0

        return make

    def direct(self, settings: dict[str, Any] | None, factor: int) -> Any:
        """One pass from noise at the large size."""
        height, width = (factor * n for n in self.size)
        method = self.method(settings, factor)

        def make(prompt: str, seed: int, first: NativePass) -> tuple[np.ndarray, float]:
            methods = () if method is None else (method,)
            call = {**self.call, "generator": _generator(seed), "height": height, "width": width, "output_type": "pt"}
            started = time.perf_counter()
            if methods:
                with dit_attn.enabled(self.pipe, *methods):
                    out = self.pipe(prompt, **call)
            else:
                out = self.pipe(prompt, **call)
            seconds = time.perf_counter() - started
            return _frames(out.frames.transpose(1, 2) if self.video else out.images), seconds

        return make

    def stages(self, settings: dict[str, Any] | None, factor: int, sigma: float) -> Any:
        """The second stage alone, from the native pass of the item."""
        height, width = (factor * n for n in self.size)
        run = HighResolution(self.pipe, self.method(settings, factor), sigma=sigma)

        def make(prompt: str, seed: int, first: NativePass) -> tuple[np.ndarray, float]:
            call = {**self.call, "generator": _generator(seed), "output_type": "pt"}
            out = run(prompt, height=height, width=width, native=self.size, first=first, **call)
            return _frames(out.frames.transpose(1, 2) if self.video else out.images), sum(out.seconds.values())

        return make

    def arms(self, factors: tuple[int, ...], sigmas: tuple[float, ...]) -> list[Arm]:
        """All arms, windows first; those that are about positions only where the model has rotary tables."""
        direct, stages = (self._fitting(arms) for arms in (DIRECT, STAGES))
        found = [Arm("native", self.enlarge(1), 1)]
        for factor in factors:
            found.append(Arm("bilinear", self.enlarge(factor), factor))
            found += [Arm(f"direct {n}", self.direct(s, factor), factor) for n, s in direct.items()]
            for sigma in sigmas:
                made = stages.items()
                found += [Arm(f"two stages {n}", self.stages(s, factor, sigma), factor, sigma) for n, s in made]
        return sorted(found, key=lambda arm: (arm.factor, arm.dense))

    def _fitting(self, arms: dict[str, dict[str, Any] | None]) -> dict[str, dict[str, Any] | None]:
        if self.video:  # the others have tables of positions that are resized
            return arms
        kept = {name: s for name, s in arms.items() if not any(word in name for word in POSITIONS)}
        return {name: s and {key: s[key] for key in s if key != "rotary"} for name, s in kept.items()}


def judge(frames: np.ndarray, prompt: str, item: Any) -> dict[str, float | None]:
    """The figures of one output."""
    verdict = verify_caption(frames, prompt) or {}
    gray = torch.from_numpy(frames).float().mean(-1)
    edges = torch.nn.functional.conv2d(gray[:, None], torch.tensor([[[[0.0, 1, 0], [1, -4, 1], [0, 1, 0]]]]))
    textured = detail(frames[0], item) if isinstance(item, MultiScene) else None
    return {
        "whole": float(all(verdict.values())),
        "count": float(verdict.get("count", all(verdict.values()))),
        "objects": float(np.mean([len(detect_objects(frame)) for frame in frames])),
        "sharpness": float(edges.std()),
        "detail": textured,
        **mean_outline(frames),
    }


def _frames(values: torch.Tensor) -> np.ndarray:
    """(F, H, W, 3) uint8 of one image (1, 3, H, W) or clip (1, 3, F, H, W) in [0, 1]."""
    frames = values[0].transpose(0, 1) if values.ndim == 5 else values
    return (frames.detach().float().clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sample(model: str, count: int, filled: bool) -> Any:
    """The items; more of them begin with the same ones."""
    if filled:
        return items.multi.held_out_sample(max(count, POOL), objects=(1, 3), filled=True)[:count]
    return items.held_out_sample(KINDS[model], max(count, POOL))[:count]


def draw(bench: Bench, arms: list[Arm], chosen: list[Any], folder: Path, path: Path) -> None:
    """Draw items as rows and arms as columns, the middle frame of clips, all at one size."""
    rows: list[list[Tile]] = []
    for index, item in enumerate(chosen):
        prompt = items.caption(item)
        first = bench.native(prompt, index, folder)
        made = [arm.make(prompt, index, first)[0] for arm in arms]
        height = max(192, *(len(frames[0]) for frames in made))
        middle = [frames[len(frames) // 2 :][:1] for frames in made]
        rows.append([tile(frame, prompt * (not place), height=height) for place, frame in enumerate(middle)])
    grid(rows, columns=[f"{arm.name} {arm.sigma or ''}".strip() for arm in arms]).save(path, optimize=True)


@dataclass(frozen=True)
class Progress:
    """What is left of a run, from what its arms took so far."""

    log: MeasurementLog
    arms: list[Arm]
    items: list[int]

    def __str__(self) -> str:
        left, unknown = 0.0, 0
        for arm in self.arms:
            done = [row["cpu seconds"] for i in self.items if (row := self.log.rows.get(f"{arm.key}|{i}"))]
            unknown += not done
            left += (len(self.items) - len(done)) * float(np.mean(done)) if done else 0.0
        return f"about {left / 3600:.2f} core-hours left" + (f", and {unknown} arms not begun" if unknown else "")


def table(rows: dict[str, Any], arms: list[Arm], count: int) -> list[dict[str, Any]]:
    """Figures of every arm with 95 % intervals: means, the difference from native, and the share of dense time."""
    found = []
    native = [rows[f"native|1|None|{i}"] for i in range(count)]
    for arm in arms:
        mine = [rows[f"{arm.key}|{i}"] for i in range(count)]
        other = "direct dense" if arm.sigma is None else "two stages dense"
        dense = [rows.get(f"{other}|{arm.factor}|{arm.sigma}|{i}") for i in range(count)]
        row: dict[str, Any] = {"arm": arm.name, "factor": arm.factor, "sigma": arm.sigma}
        row |= {name: mean_figure([one[name] for one in mine]) for name in FIGURES}
        row["whole - native"] = difference_figure([x["whole"] for x in mine], [x["whole"] for x in native])
        row["seconds"], row["cpu seconds"] = (mean_figure([one[n] for one in mine]) for n in ("seconds", "cpu seconds"))
        if all(dense) and arm.name not in ("native", "bilinear"):
            for name, of in (("time / dense", "seconds"), ("cpu / dense", "cpu seconds")):
                row[name] = ratio_figure([x[of] for x in mine], [x[of] for x in dense if x])
        found.append(row)
    return found


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", choices=sorted(KINDS))
    parser.add_argument("--count", type=int, default=48, help="items")
    parser.add_argument("--factors", type=int, nargs="+", help="of the native size")
    parser.add_argument("--sigmas", type=float, nargs="+", default=list(SIGMAS))
    parser.add_argument("--steps", type=int, help="of a full schedule (default: the model's)")
    parser.add_argument("--only", nargs="+", metavar="ARM", help="arms or sets of them, besides native (default: all)")
    parser.add_argument("--threads", type=int, help="of torch (default: its own)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--filled", action="store_true", help="tiny-multi: captions with fills, for detail")
    parser.add_argument("--output", type=Path, required=True, help="JSON record; its log stands next to it")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="draw the items instead, at most a few")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--shard", type=Shard.parse, metavar="I/N", help="every Nth item, with a log of their own")
    parser.add_argument("--quick", action="store_true", help="two items, the smallest factor, sigma .9, 2 steps")
    args = parser.parse_args()
    if args.filled and KINDS[args.model] != "multi":
        parser.error(f"--filled: {args.model} draws no fills; leave it out, or take tiny-multi")
    if args.quick:
        args.count, args.sigmas, args.steps = 2, [0.9], 2
        args.factors = [FACTORS[args.model][0]]
    if args.threads:
        torch.set_num_threads(args.threads)
    bench = Bench(args.model, args.steps, args.device)
    arms = bench.arms(tuple(args.factors or FACTORS[args.model]), tuple(args.sigmas))
    if args.only:
        names = {arm.name for arm in arms}
        wanted = {name for given in args.only for name in filter(SETS.get(given, given.__eq__), names)}
        if unknown := [given for given in args.only if given not in SETS and given not in names]:
            parser.error(f"no such arm: {', '.join(unknown)}; there are {', '.join([*SETS, *sorted(names)])}")
        arms = [arm for arm in arms if arm.name in ("native", *wanted)]
    chosen = sample(args.model, args.count, args.filled)
    if args.sheet:
        return draw(bench, arms, chosen, args.output.with_suffix(".native"), args.sheet)
    setup = {"model": args.model, "steps": args.steps, "filled": args.filled, "environment": environment()}
    setup |= {"device": args.device} if args.device != "cpu" else {}
    log = shard_log(args.output, setup, args.resume, args.shard)
    part = args.shard.part(list(enumerate(chosen))) if args.shard else list(enumerate(chosen))
    before, todo = load_average(), Progress(log, arms, [index for index, _ in part])
    for place, (index, item) in enumerate(part, 1):
        missing = [arm for arm in arms if f"{arm.key}|{index}" not in log.rows]
        if not missing:
            continue
        prompt = items.caption(item)
        first = bench.native(prompt, index, args.output.with_suffix(".native"))
        for arm in missing:
            started = time.process_time()
            frames, seconds = arm.make(prompt, index, first)
            times = {"seconds": seconds, "cpu seconds": time.process_time() - started}
            log.add(f"{arm.key}|{index}", {**judge(frames, prompt, item), **times})
        print(f"{place} of {len(part)} items; {todo}", flush=True)
    if args.shard:
        return
    factors = {*FACTORS[args.model], *(args.factors or ())}
    every = bench.arms(tuple(sorted(factors)), tuple(sorted({*SIGMAS, *args.sigmas})))
    arms = [arm for arm in every if all(f"{arm.key}|{i}" in log.rows for i in range(args.count))]
    record = {
        "what": "ways to make images and clips above the native size, one native pass and one seed an item; seconds of "
        "two stages are those of the second",
        "command": "python benchmarks/high_resolution/measure.py " + " ".join(_words(args)),
        "commit": current_commit(),
        "environment": environment(),
        "load_average": {"before": before, "after": load_average(), "cores": os.cpu_count()},
        **setup,
        "items": args.count,
        "rows": table(log.rows, arms, args.count),
    }
    outputs.write_json(record, args.output)
    for row in record["rows"]:
        shown = "  ".join(f"{n} {row[n]['value']:.2f}" for n in (*FIGURES, "cpu seconds", "cpu / dense") if row.get(n))
        print(f"{row['factor']}x {row['arm']} {row['sigma'] or ''}: {shown}")


def _words(args: argparse.Namespace) -> list[str]:
    sigmas, factors = (" ".join(map(str, x)) for x in (args.sigmas, args.factors or FACTORS[args.model]))
    more = [f"--steps {args.steps}"] * bool(args.steps) + ["--filled"] * args.filled
    more += [f"--only {' '.join(map(repr, args.only))}"] * bool(args.only)
    more += [f"--threads {args.threads}"] * bool(args.threads)
    more += [f"--device {args.device}"] * (args.device != "cpu")
    return [args.model, f"--count {args.count}", f"--sigmas {sigmas}", f"--factors {factors}", *more]


if __name__ == "__main__":
    main()
