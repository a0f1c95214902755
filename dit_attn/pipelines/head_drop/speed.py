"""How long attention layers and whole transformer calls take with heads left out, against dense, in turns.

python -m dit_attn.pipelines.head_drop.speed --output outputs/heads/speed.json
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from dit_attn import files, models
from dit_attn.kernels.benchmark.timing import timed
from dit_attn.models.evaluate import current_commit
from dit_attn.models.export import environment
from dit_attn.pipelines.head_drop.choose import random_heads
from dit_attn.pipelines.head_drop.measure import MODELS
from dit_attn.pipelines.head_drop.profile import profile_heads

FRACTIONS = (0.0, 0.1, 0.2, 0.4)


def measure_speed(model: str, rounds: int, fractions: Sequence[float] = FRACTIONS) -> list[dict[str, Any]]:
    """Return the times of an embedded model's call with heads left out, relative to dense.

    Every round runs the dense model and each fraction once, in turns. Which heads go makes no difference to the time:
    they are drawn at random, with the refit.

    Args:
        model: embedded model.
        rounds: after one that is not counted.
        fractions: of the heads that are left out.

    Returns:
        Per fraction: ``dropped``, ``of``, and the medians over the rounds of ``attention`` (all attention layers) and
        ``call`` (the transformer), relative to the dense call of the same round.
    """
    pipe = models.load(model)
    pipe.set_progress_bar_config(disable=True)
    call = {**models.call_defaults(model), "num_inference_steps": 1}
    given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    handle = pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: given.append((args, kwargs)), with_kwargs=True
    )
    profile = profile_heads(pipe, [models.available()[model].example], call=call, every=1)
    handle.remove()
    args, kwargs = given[0]
    drops = [random_heads(profile, fraction, 0) for fraction in fractions]
    layers = [pipe.transformer.get_submodule(layer.name) for layer in profile.layers]
    ratios: dict[int, list[tuple[float, float]]] = {index: [] for index in range(len(drops))}
    with torch.no_grad():
        for _ in range(rounds + 1):
            dense = _times(pipe.transformer, layers, args, kwargs)
            for index, drop in enumerate(drops):
                with drop.enabled(pipe):
                    found = _times(pipe.transformer, layers, args, kwargs)
                ratios[index].append((found[0] / dense[0], found[1] / dense[1]))
    return [
        {
            "fraction": fraction, "dropped": drop.dropped[0], "of": profile.heads,
            "attention": round(statistics.median(pair[0] for pair in ratios[index][1:]), 3),
            "call": round(statistics.median(pair[1] for pair in ratios[index][1:]), 3),
        }
        for index, (fraction, drop) in enumerate(zip(fractions, drops))
    ]  # fmt: skip


def _times(model: Any, layers: Sequence[Any], args: Any, kwargs: Any) -> tuple[float, float]:
    """Seconds in the attention layers, and of the whole call."""
    spent = [0.0]

    def clocked(layer: Any) -> Any:
        stock = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            out: list[Any] = []
            spent[0] += timed(lambda: out.append(stock(*args, **kwargs)), torch.device("cpu"))
            return out[0]

        return forward

    with ExitStack() as stack:
        for layer in layers:
            layer.forward = clocked(layer)
            stack.callback(delattr, layer, "forward")
        whole = timed(lambda: model(*args, **kwargs), torch.device("cpu"))
    return spent[0], whole


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(prog="python -m dit_attn.pipelines.head_drop.speed", description=__doc__)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--note", default="", help="what else the machine did meanwhile")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args(argv)
    found = {model: measure_speed(model, args.rounds) for model in MODELS}
    record = {
        "what": "time with heads left out over the time of the dense model, median over interleaved rounds: all "
        "attention layers with their projections, and one call of the transformer",
        "command": f"python -m dit_attn.pipelines.head_drop.speed {shlex.join(argv or sys.argv[1:])}",
        "note": args.note,
        "commit": current_commit(),
        "environment": environment(),
        "models": found,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    files.write_json(args.output, record)
    for model, rows in found.items():
        for row in rows:
            print(f"{model}, {row['dropped']} of {row['of']}: attention {row['attention']}, call {row['call']}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
