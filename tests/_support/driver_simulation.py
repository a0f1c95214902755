"""How many jobs a second pass through the driver? ``python -m tests._support.driver_simulation`` writes the record.

1,000 workers without models end their tasks in a random order; some die and are started again. Tasks and answers are
the JSON of ``generate``. The rate is that of one core (processor time), since the driver is one thread.
"""

from __future__ import annotations

import argparse
import heapq
import json
import random
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dit_attn.cli.jobs import Job
from dit_attn.pipelines.run import Recipe, Task
from dit_attn.pipelines.run.pool import Event, WorkerPool
from tests._support.other_environment import write_record

OUTPUT = Path(__file__).resolve().parents[2] / "benchmarks" / "engines" / "driver.json"
DYING = 0.001  # of the tries


class SimulatedPool(WorkerPool):
    """Workers whose tasks end in a random order, by a clock of their own."""

    def __init__(self, seed: int = 0) -> None:
        self._random = random.Random(seed)
        self._clock, self._count = 0.0, 0
        self._events: list[tuple[float, int, int, str]] = []  # time, order, worker, JSON

    def _add(self, worker: int, answer: dict[str, Any]) -> None:
        self._count += 1
        due = self._clock + self._random.random()
        heapq.heappush(self._events, (due, self._count, worker, json.dumps(answer)))

    def _spawn(self, worker: int) -> None:
        self._add(worker, {"kind": "ready"})

    def _send(self, worker: int, content: Any, again: bool) -> None:
        job = json.loads(json.dumps({"content": content, "again": again}))["content"]
        if self._random.random() < DYING:
            self._add(worker, {"kind": "dead", "value": "killed"})
            return
        head = {"index": job["index"], "prompt": job["prompt"], "seed": job["seed"], "status": "done"}
        tail = {"file": f"outputs/mine/{job['index']:04d}.png", "seconds": 1.25, "density": 0.25, "warnings": []}
        self._add(worker, {"kind": "done", "value": {**head, **tail}})

    def _receive(self) -> Event:
        self._clock, _, worker, text = heapq.heappop(self._events)
        return Event(worker, **json.loads(text))


def jobs(count: int) -> Iterator[Task]:
    """Jobs as those of ``generate``, made one by one."""
    call = {"height": 1024, "width": 1024, "num_inference_steps": 50, "guidance_scale": 5.0}
    for index in range(count):
        yield Task(index, asdict(Job(index, f"a large red circle at the left on white, number {index}", index, call)))


def simulate(workers: int, count: int, marks: int = 10) -> dict[str, Any]:
    """Pass ``count`` jobs through a driver of ``workers``; return rates, and memory at ``marks`` places on the way."""
    pool = SimulatedPool()
    pool.start(Recipe("nowhere:make"), workers)
    done, tries, memory = 0, 0, []
    wall, cpu = time.perf_counter(), time.process_time()
    for outcome in pool.run(jobs(count)):
        done += 1
        tries += outcome.tries
        if done % max(1, count // marks) == 0 and tracemalloc.is_tracing():
            memory.append(tracemalloc.get_traced_memory()[0])
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    rates = {"jobs_per_cpu_second": round(done / cpu), "jobs_per_wall_second": round(done / wall)}
    return {"workers": workers, "jobs": done, "tries": tries, **rates, "bytes_held": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--jobs", type=int, default=1_000_000)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    args = parser.parse_args()
    timed = simulate(args.workers, args.jobs)
    tracemalloc.start()
    traced = simulate(args.workers, args.jobs // 10)  # tracing makes it slower: rates are those of the run before
    import resource

    content = {
        "what": "stub jobs through the driver of an engine, with retries; memory in bytes, traced in a run of its own",
        "timed": {name: value for name, value in timed.items() if name != "bytes_held"},
        "memory": {name: traced[name] for name in ("workers", "jobs", "bytes_held")},
        "peak_resident_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
    }
    command = f"python -m tests._support.driver_simulation --workers {args.workers} --jobs {args.jobs}"
    write_record(args.output, command, content)
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
