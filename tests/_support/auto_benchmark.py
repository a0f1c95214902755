"""Is ``auto`` ever slower? ``python -m tests._support.auto_benchmark`` measures it and writes the record.

Arms are dense, ``auto`` and every fixed method that it chooses between, with the settings of the model's preset; each
round runs all of them in another order. The ratio of two arms is that of the same round, with a 95 % bootstrap interval
of the median. Two claims, each with a verdict:

* never slower: the upper end of auto / dense is at most 1.02;
* near the best: auto / best is at most 1.05 at the upper end, where the best is the fastest arm whose result is at
  least as close to dense as that of ``auto``.

Embedded models make full runs. Of the large ones a few layers with random weights, at their head size, are called step
by step on fixed inputs: what a step costs does not depend on them. No preset matches so few layers: settings are the
methods' defaults there. All of it takes about an hour and a half on two idle cores; most of that is 16,384 tokens.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

import dit_attn
from dit_attn import models
from dit_attn.kernels.cost import cost_table
from dit_attn.models.architectures import architecture
from dit_attn.models.export import environment
from dit_attn.processors.methods.auto import CANDIDATES
from tests._support.other_environment import write_record
from tests._support.overhead import bootstrap

OUTPUT = Path(__file__).resolve().parents[2] / "benchmarks" / "auto" / "cpu.json"
EMBEDDED = ("tiny-image", "tiny-video", "tiny-joint")
LARGE = ("wan2.1-1.3b", "flux", "pixart-sigma")
TOKENS = (1024, 4096, 16384)
NOT_SLOWER, NEAR_BEST = 1.02, 1.05
Run = Callable[[], torch.Tensor]


def measure(target: Any, run: Run, rounds: int) -> dict[str, Any]:
    """Time all arms in turns.

    Args:
        target: a pipeline or transformer.
        run: makes one run with what is enabled, and returns its result.
        rounds: timed ones, after one that warms up.
    """
    arms = {"dense": None, "auto": "auto", **{slug: slug for slug in CANDIDATES}}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    results: dict[str, torch.Tensor] = {}
    text = ""
    for turn in range(rounds + 1):
        names = [*arms][turn % len(arms) :] + [*arms][: turn % len(arms)]
        for name in names:
            method = arms[name]
            with nullcontext() if method is None else dit_attn.enabled(target, method):
                started = time.perf_counter()
                results[name] = run()
                taken = time.perf_counter() - started
                if name == "auto":
                    text = str(dit_attn.summary(target).reports.get("auto", "no call was asked for"))
            if turn:
                seconds[name].append(taken)
    errors = {name: _error(result, results["dense"]) for name, result in results.items()}
    return {"decision": text.split("\n"), **judge(seconds, errors)}


def judge(seconds: dict[str, list[float]], errors: dict[str, float]) -> dict[str, Any]:
    """The ratios with their intervals and the two verdicts.

    Args:
        seconds: of every round, by arm.
        errors: relative L2 distance from dense, by arm.
    """
    close = [name for name in seconds if name != "auto" and errors[name] <= errors["auto"]]
    best = min(close, key=lambda name: statistics.median(seconds[name]))
    dense, near = (_ratio(seconds["auto"], seconds[name]) for name in ("dense", best))
    return {
        "arms": {
            name: {"seconds": round(statistics.median(seconds[name]), 4), "error": round(errors[name], 5)}
            for name in seconds
        },
        "against_dense": dense,
        "best": best,
        "against_best": near,
        "never_slower": dense["ci95"][1] <= NOT_SLOWER,
        "near_best": near["ci95"][1] <= NEAR_BEST,
    }


def _ratio(ours: list[float], theirs: list[float]) -> dict[str, Any]:
    each = [a / b for a, b in zip(ours, theirs)]
    return {"value": round(statistics.median(each), 4), "ci95": bootstrap(each)}


def _error(found: torch.Tensor, dense: torch.Tensor) -> float:
    return float((found.float() - dense.float()).norm() / dense.float().norm().clamp(min=1e-30))


def embedded(name: str, steps: int) -> tuple[Any, Run]:
    """An embedded pipeline, and one run of it."""
    pipe = models.load(name)
    pipe.set_progress_bar_config(disable=True)
    call = {**models.call_defaults(name), "num_inference_steps": steps, "output_type": "latent", "return_dict": False}
    return pipe, lambda: pipe(models.info(name).example, generator=torch.Generator().manual_seed(0), **call)[0]


def large(name: str, tokens: int, steps: int, layers: int, heads: int) -> tuple[Any, Run]:
    """Some layers of a large model, and its calls in one run."""
    arch = architecture(name).sized(layers, heads).with_tokens(tokens)
    cpu, dtype = torch.device("cpu"), torch.float32
    model, inputs = arch.build(cpu, dtype), arch.call(cpu, dtype)

    @torch.no_grad()
    def run() -> torch.Tensor:
        for step in range(steps):
            with dit_attn.run_context(model, step=step, steps=steps, branch="cond"):
                out = model(**inputs, return_dict=False)[0]
        return torch.as_tensor(out)

    return model, run


def main() -> None:
    """Measure what is asked for and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=[*EMBEDDED, *LARGE], choices=[*EMBEDDED, *LARGE])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, help="of the large models")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--layers", type=int, default=2, help="of the large models")
    parser.add_argument("--heads", type=int, default=2, help="of the large models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    cases: list[tuple[str, int | None]] = [(name, None) for name in given.model if name in EMBEDDED]
    cases += [(name, tokens) for tokens in sorted(given.tokens) for name in given.model if name in LARGE]
    words = ["--model", *given.model, "--tokens", *given.tokens, "--steps", given.steps, "--rounds", given.rounds]
    words += ["--layers", given.layers, "--heads", given.heads, "--threads", given.threads]
    table = cost_table("cpu")
    rows: list[dict[str, Any]] = []
    for name, tokens in cases:
        made = embedded(name, given.steps) if tokens is None else large(
            name, tokens, given.steps, given.layers, given.heads
        )  # fmt: skip
        row = {"model": name, "tokens": tokens, **measure(*made, given.rounds)}
        rows.append(row)
        verdict = "never slower" if row["never_slower"] else "SLOWER"
        near = "near the best" if row["near_best"] else "NOT near the best"
        print(name, tokens or "", verdict, row["against_dense"], near, row["best"], row["against_best"], flush=True)
        record = {
            "what": "auto next to dense and to every fixed method, in turns; ratios of the same round, medians, 95 %",
            "environment": environment(),
            "costs": {"provenance": str(table), **table.to_dict()},
            "limits": {"never_slower": NOT_SLOWER, "near_best": NEAR_BEST},
            "rows": rows,
        }  # after every case, so that nothing is lost where a later one is stopped
        write_record(given.output, f"python -m tests._support.auto_benchmark {' '.join(map(str, words))}", record)


if __name__ == "__main__":
    main()
