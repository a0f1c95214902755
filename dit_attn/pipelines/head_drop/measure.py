"""What a model's runs lose when heads are left out: ours, random ones and those of a search, with and without refit.

    python -m dit_attn.pipelines.head_drop.measure tiny-image --output outputs/heads/tiny-image.json --resume

Every arm is a line of a log next to the record; ``--resume`` goes on with what is missing.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_attn import files, models
from dit_attn.errors import DitAttnError
from dit_attn.eval.shapes_world import items, world
from dit_attn.models.evaluate import current_commit
from dit_attn.models.export import environment
from dit_attn.pipelines.compare.statistics import mean_figure, psnr, verify_caption
from dit_attn.pipelines.head_drop.choose import choose_heads, first_heads, named_heads, random_heads
from dit_attn.pipelines.head_drop.dropped import DroppedHeads
from dit_attn.pipelines.head_drop.profile import HeadProfile, profile_heads
from dit_attn.pipelines.head_search import HeadHunter, SearchConfig
from dit_attn.pipelines.measurement_log import MeasurementLog
from dit_attn.pipelines.output import batch_of

MODELS = ("tiny-image", "tiny-joint", "tiny-video")
OBJECTIVE = "verifier"
DENSE = "dense"
FIGURES = ("psnr", "followed")
EQUAL = 99.0  # dB of outputs that are equal


@dataclass(frozen=True)
class DropMeasurement:
    """What is measured.

    Attributes:
        model: embedded model.
        fractions: of the heads that are left out; those of a small model are rounded to whole heads.
        profiled: training captions to profile on.
        count: held-out captions.
        steps: denoising steps.
        seeds: sets of random heads.
        searched: training captions that a search scores every head on; 0 leaves its arms out.
        device: where the model runs.
    """

    model: str = "tiny-image"
    fractions: tuple[float, ...] = (0.05, 0.1, 0.2, 0.3, 0.4)
    profiled: int = 24
    count: int = 24
    steps: int = 8
    seeds: int = 3
    searched: int = 4
    device: str = "cpu"

    @property
    def kind(self) -> str:
        """``image`` or ``video``."""
        return "video" if "num_frames" in models.call_defaults(self.model) else "image"


def measure(config: DropMeasurement, log: MeasurementLog, on_progress: Callable[[str], None] = print) -> dict[str, Any]:
    """Measure what is missing, and return the PSNR to dense outputs and the prompts followed, by arm.

    Args:
        config: what is measured.
        log: of the arms and the search.
        on_progress: callback(line).

    Returns:
        ``ablation`` of every head by layer, ``search`` (all heads, the best to perturb first), ``table`` and ``rows``.

    Raises:
        DitAttnError: nothing to measure, or more heads to leave out than the model has.
    """
    if min(config.count, config.profiled, config.seeds, config.steps, len(config.fractions)) < 1:
        raise DitAttnError("a measurement needs one caption, seed, step and fraction at least; raise what is 0")
    pipe = models.load(config.model).to(config.device)
    pipe.set_progress_bar_config(disable=True)
    call = {**models.call_defaults(config.model), "num_inference_steps": config.steps}
    known = world.split(config.kind)[False]
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0)).tolist()
    captions = [items.caption(known[place]) for place in order[: max(config.profiled, config.searched)]]
    profile = profile_heads(pipe, captions[: config.profiled], call=call, every=2)
    ranking = _search(pipe, captions[: config.searched], call, log) if config.searched else []
    prompts = [items.caption(item) for item in items.held_out_sample(config.kind, config.count)]
    dense: list[np.ndarray] = []
    for fraction in config.fractions:
        count = max(1, round(fraction * profile.heads))
        for name, drop in arms(profile, count, config.seeds, ranking).items():
            key = f"{count}: {name}"
            if key in log.rows:
                continue
            dense = dense or _frames(pipe, prompts, call)
            if DENSE not in log.rows:
                log.add(DENSE, {"dropped": 0, "of": profile.heads, "arm": DENSE, "followed": _followed(dense, prompts)})
            with drop.enabled(pipe):
                found = _frames(pipe, prompts, call)
            row = {
                "dropped": count, "of": profile.heads, "arm": name, "heads": drop.method.heads,
                "expected": drop.expected, "psnr": [min(round(psnr(a, b), 3), EQUAL) for a, b in zip(found, dense)],
                "followed": _followed(found, prompts),
            }  # fmt: skip
            log.add(key, row)
            on_progress(f"{count} of {profile.heads}, {name}: {_cell(table([row])[0])}")
    rows = [row for key, row in log.rows.items() if key != "search"]
    layers = {layer.name: layer.ablation.tolist() for layer in profile.layers}
    return {"ablation": layers, "search": ranking, "table": table(rows), "rows": rows}


def table(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return means over prompts with 95 % intervals, the sets of random heads as one arm.

    Args:
        rows: of the measurement, one per arm and number of heads.
    """
    found: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        arm = re.sub(r"^random \d+", "random", row["arm"])
        found.setdefault((row["dropped"], arm), []).append(row)
    return [
        {"dropped": count, "arm": arm, **{what: _mean(same, what) for what in FIGURES if what in same[0]}}
        for (count, arm), same in found.items()
    ]


def _mean(rows: Sequence[dict[str, Any]], what: str) -> dict[str, Any] | None:
    prompts = [place for row in rows for place in range(len(row[what]))]
    return mean_figure([value for row in rows for value in row[what]], prompts)


def text_of(rows: Sequence[dict[str, Any]], heads: int) -> str:
    """Return a table as text, an arm a line and a number of heads a column.

    Args:
        rows: of :func:`table`.
        heads: of the model.
    """
    counts = sorted({row["dropped"] for row in rows})
    cells = {(row["arm"], row["dropped"]): _cell(row) for row in rows}
    lines = [["dB to dense, prompts followed", *(f"{count} of {heads}" for count in counts)]]
    lines += [
        [arm, *(cells.get((arm, count), "") for count in counts)] for arm in dict.fromkeys(row["arm"] for row in rows)
    ]
    widths = [max(len(cell) for cell in column) for column in zip(*lines)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _cell(row: dict[str, Any]) -> str:
    """The figures of a row of the table: dB and percent."""
    formats = {"psnr": "{:.1f} dB", "followed": "{:.0%}"}
    return ", ".join(formats[what].format(row[what]["value"]) for what in FIGURES if row.get(what))


def arms(
    profile: HeadProfile, count: int, seeds: int, ranking: Sequence[tuple[str, int]] = ()
) -> dict[str, DroppedHeads]:
    """Return every way to leave out so many heads.

    Args:
        profile: of the model.
        count: of heads.
        seeds: sets of random heads.
        ranking: the heads by their score in a search for heads to perturb, the best first.
    """
    ours = choose_heads(profile, count)
    found = {
        "ours, refit": ours,
        "ours, no refit": choose_heads(profile, count, refitted=False),
        "ours, refit removed": named_heads(profile, ours.method.heads, refitted=False),
    }
    for refitted, word in ((True, "refit"), (False, "no refit")):
        for seed in range(seeds):
            found[f"random {seed}, {word}"] = random_heads(profile, count, seed, refitted=refitted)
        if ranking:
            found[f"search, {word}"] = first_heads(profile, ranking, count, refitted=refitted)
            found[f"search, its last, {word}"] = first_heads(profile, ranking[::-1], count, refitted=refitted)
    return found


def _search(pipe: Any, captions: list[str], call: dict[str, Any], log: MeasurementLog) -> list[tuple[str, int]]:
    """All heads by their score in the first round of a search, the best to perturb first."""
    if "search" not in log.rows:
        hunter = HeadHunter(pipe, captions, OBJECTIVE, SearchConfig(rounds=1, per_round=1), call=call)
        scores = hunter.search().rounds[0]["scores"]
        ranked = sorted(scores, key=lambda row: -(row[2] if row[2] is not None else float("-inf")))
        log.add("search", [[layer, head] for layer, head, _ in ranked])
    return [(layer, head) for layer, head in log.rows["search"]]


def _frames(pipe: Any, prompts: Sequence[str], call: dict[str, Any]) -> list[np.ndarray]:
    """(F, H, W, 3) uint8 of every prompt, prompt i with seed i; an image is one frame."""
    found = []
    for seed, prompt in enumerate(prompts):
        generator = torch.Generator("cpu").manual_seed(seed)
        made = batch_of(pipe(prompt=prompt, generator=generator, output_type="np", **call))
        assert made is not None
        pixels = np.asarray(made.items[0])
        found.append(np.rint(255 * (pixels if made.video else pixels[None])).astype(np.uint8))
    return found


def _followed(outputs: Sequence[np.ndarray], prompts: Sequence[str]) -> list[bool]:
    verdicts = [verify_caption(frames, prompt) for frames, prompt in zip(outputs, prompts, strict=True)]
    return [verdict is not None and all(verdict.values()) for verdict in verdicts]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m dit_attn.pipelines.head_drop.measure", description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("--count", type=int, default=24, help="held-out captions (default: %(default)s)")
    parser.add_argument("--profiled", type=int, default=24, help="captions of the profile (default: %(default)s)")
    parser.add_argument("--searched", type=int, default=4, help="captions of the search, 0 for none")
    parser.add_argument("--steps", type=int, default=8, help="denoising steps (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="sets of random heads (default: %(default)s)")
    parser.add_argument("--fractions", type=float, nargs="+", help="of the heads (default: 0.05 to 0.4)")
    parser.add_argument("--device", default="cpu", help="where the model runs (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True, help="JSON record; its log stands next to it")
    parser.add_argument("--resume", action="store_true", help="go on with what the log lacks")
    args = parser.parse_args(argv)
    config = DropMeasurement(
        args.model, tuple(args.fractions or DropMeasurement.fractions), args.profiled, args.count, args.steps,
        args.seeds, args.searched, args.device,
    )  # fmt: skip
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        log = MeasurementLog(args.output.with_suffix(".jsonl"), asdict(config), args.resume)
        found = measure(config, log, lambda line: print(line, flush=True))
    except (DitAttnError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    files.write_json(args.output, {
        "what": "PSNR to the output of the dense model from the same noise, and whether all of the prompt is followed, "
        "with attention heads left out; expected: predicted relative squared error of the transformer's output, to "
        "first order",
        "command": f"python -m dit_attn.pipelines.head_drop.measure {shlex.join(argv or sys.argv[1:])}",
        "commit": current_commit(),
        "environment": environment(),
        "config": asdict(config),
        **found,
    })  # fmt: skip
    print(text_of(found["table"], found["rows"][0]["of"]))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
