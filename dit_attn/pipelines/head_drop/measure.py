"""How far a model's runs move when heads are dropped: chosen ones with and without refit, and random ones.

python -m dit_attn.pipelines.head_drop.measure tiny-image --output outputs/heads/tiny-image.json
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from dit_attn import files, models
from dit_attn.eval.shapes_world import items, world
from dit_attn.kernels.benchmark.timing import timed
from dit_attn.models.evaluate import current_commit
from dit_attn.models.export import environment
from dit_attn.pipelines.head_drop.drop import HeadDrop, choose_heads, random_heads
from dit_attn.pipelines.head_drop.profile import profile_heads


@dataclass(frozen=True)
class DropMeasurement:
    """What is measured.

    Attributes:
        model: embedded model.
        profiled: training captions to profile on.
        count: held-out captions.
        steps: denoising steps.
        seeds: sets of random heads.
        repeats: timed rounds of a transformer call, dense and with dropped heads in turns.
    """

    model: str = "tiny-image"
    profiled: int = 4
    count: int = 6
    steps: int = 8
    seeds: int = 2
    repeats: int = 9


def measure(config: DropMeasurement) -> dict[str, Any]:
    """Return relative L2 distances of the final latents to dense ones, by number of heads and way to choose them."""
    pipe = models.load(config.model)
    pipe.set_progress_bar_config(disable=True)
    call = {**models.call_defaults(config.model), "num_inference_steps": config.steps}
    known = world.split("image")[False]
    order = torch.randperm(len(known), generator=torch.Generator().manual_seed(0)).tolist()
    profile = profile_heads(pipe, [items.caption(known[i]) for i in order[: config.profiled]], call=call, every=2)
    prompts = [items.caption(item) for item in items.held_out_sample("image", config.count)]
    dense = [_latents(pipe, prompt, index, call) for index, prompt in enumerate(prompts)]
    rows = []
    for count in range(1, 1 + 2 * profile.heads // 5):  # up to 40 % of the heads
        arms = {
            "refit": choose_heads(profile, count),
            "no refit": choose_heads(profile, count, refit=False),
            **{f"random {seed}, refit": random_heads(profile, count, seed) for seed in range(config.seeds)},
        }
        for name, drop in arms.items():
            drop.apply(pipe)
            found = [_latents(pipe, prompt, index, call) for index, prompt in enumerate(prompts)]
            drop.remove(pipe)
            errors = [float((a - b).norm() / b.norm()) for a, b in zip(found, dense)]
            rows.append({
                "dropped": count, "of": profile.heads, "arm": name, "kept": drop.kept, "expected": drop.expected,
                "error": statistics.fmean(errors), "errors": errors,
            })  # fmt: skip
        rows[-len(arms)]["time_ratio"] = _time_ratio(pipe, arms["refit"], call, config.repeats)
    layers = {layer.name: layer.ablation.tolist() for layer in profile.layers}
    return {"config": asdict(config), "ablation": layers, "rows": rows}


def _latents(pipe: Any, prompt: str, seed: int, call: dict[str, Any]) -> torch.Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    return pipe(prompt=prompt, generator=generator, output_type="latent", **call).images


def _time_ratio(pipe: Any, drop: HeadDrop, call: dict[str, Any], repeats: int) -> float:
    """Median over the rounds of the time of a transformer call with dropped heads over that of a dense one."""
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: given.append((args, kwargs)), with_kwargs=True
    )
    _latents(pipe, "a large red circle at the left on white", 0, {**call, "num_inference_steps": 1})
    handle.remove()
    args, kwargs = given[0]
    ratios = []
    with torch.no_grad():
        for _ in range(repeats + 1):
            before = timed(lambda: pipe.transformer(*args, **kwargs), torch.device("cpu"))
            drop.apply(pipe)
            ratios.append(timed(lambda: pipe.transformer(*args, **kwargs), torch.device("cpu")) / before)
            drop.remove(pipe)
    return statistics.median(ratios[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m dit_attn.pipelines.head_drop.measure", description=__doc__)
    parser.add_argument("model", choices=("tiny-image", "tiny-joint"))
    parser.add_argument("--count", type=int, default=6, help="held-out captions (default: %(default)s)")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    found = measure(DropMeasurement(args.model, count=args.count))
    record = {
        "what": "relative L2 distance of final latents to those of the dense model, same noise, with attention heads "
        "dropped; expected: predicted squared error of the transformer's output",
        "command": f"python -m dit_attn.pipelines.head_drop.measure {args.model} --count {args.count}",
        "commit": current_commit(),
        "environment": environment(),
        **found,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(args.output, record)
    for row in found["rows"]:
        print(f"{row['dropped']} of {row['of']}, {row['arm']}: {row['error']:.4f}", row.get("time_ratio", ""))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
