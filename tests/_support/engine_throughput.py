"""How much faster are two workers than one? ``python -m tests._support.engine_throughput`` measures and records it.

16 images by one worker and by two, each with one thread, in turns; it needs two idle cores and takes some minutes. The
ratio is that of the items per second between the first file and the last, so that loading the weights does not count;
that of the commands, loading included, is recorded too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dit_attn.models.export import environment
from tests._support.other_environment import write_record

OUTPUT = Path(__file__).resolve().parents[2] / "benchmarks" / "engines" / "throughput.json"


def measure(workers: int, items: int, words: list[str]) -> dict[str, float]:
    """Make the items; return items per second while all workers are at work, and seconds of the command."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "dit_attn", "generate", *words, "--num-images-per-prompt", str(items)]
        command += ["--workers", str(workers), "--no-contact-sheet", "--output", folder]
        started = time.perf_counter()
        subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - started
        times = sorted(path.stat().st_mtime for path in Path(folder).glob("*.png"))
    assert len(times) == items
    return {"items_per_second": (items - workers) / (times[-1] - times[workers - 1]), "seconds": seconds}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    words = ["--model", "tiny-image", "--prompt", "a large red circle at the left on white"]
    rounds: list[dict[str, Any]] = []
    for number in range(args.rounds):
        order = (1, args.workers) if number % 2 == 0 else (args.workers, 1)
        rounds.append({str(workers): measure(workers, args.items, words) for workers in order})
        print(json.dumps(rounds[-1]), flush=True)
    many = str(args.workers)
    ratios = [one[many]["items_per_second"] / one["1"]["items_per_second"] for one in rounds]
    full = [one["1"]["seconds"] / one[many]["seconds"] for one in rounds]
    content = {
        "what": f"items per second of {many} workers over those of one, median of the rounds; full: of the commands",
        "environment": environment(),
        "load_average": os.getloadavg(),
        "items": args.items,
        "ratio": round(statistics.median(ratios), 3),
        "full": round(statistics.median(full), 3),
        "rounds": rounds,
    }
    write_record(args.output, "python -m tests._support.engine_throughput", content)
    print(f"{many} workers: {content['ratio']} x the items per second of one")


if __name__ == "__main__":
    main()
