"""The local engine: worker processes on this machine, one per GPU or so many on the CPU."""

from __future__ import annotations

import json
import os
import platform
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dit_attn import files
from dit_attn.pipelines.run.engine import Recipe
from dit_attn.pipelines.run.pool import Event, WorkerPool

PATIENCE = 10.0  # seconds that a worker has to end before it is killed
_ROOT = str(Path(__file__).resolve().parents[3])  # the folder that holds the package


class LocalEngine(WorkerPool):
    """Worker processes of this machine.

    Args:
        gpus: what ``CUDA_VISIBLE_DEVICES`` is for each worker, in turns; empty: as it is.
    """

    def __init__(self, gpus: Sequence[str] = ()) -> None:
        self._gpus = list(gpus)
        self._processes: dict[int, subprocess.Popen[str]] = {}
        self._events: queue.Queue[Event] = queue.Queue()

    def places(self) -> int:
        """Return the number of GPUs, 1 without any."""
        return max(1, len(self._gpus))

    def start(self, recipe: Recipe, workers: int) -> None:
        """Start so many processes; each gets its share of the cores."""
        self._threads = str(max(1, (os.cpu_count() or 1) // workers))
        super().start(recipe, workers)

    def stop(self) -> None:
        """End every process: those without a task at once, the others as soon as they notice."""
        for process in self._processes.values():
            if process.stdin is not None:
                with suppress(OSError):
                    process.stdin.close()
            process.terminate()
        for process in self._processes.values():
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._processes.clear()

    def name(self, worker: int) -> str:
        """Return machine and number, and the GPU that is its own."""
        gpu = f", GPU {self._gpus[worker % len(self._gpus)]}" if self._gpus else ""
        return f"{platform.node()}, worker {worker + 1}{gpu}"

    def _spawn(self, worker: int) -> None:
        paths = [_ROOT, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"OMP_NUM_THREADS": self._threads, **os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        if self._gpus:
            environment["CUDA_VISIBLE_DEVICES"] = self._gpus[worker % len(self._gpus)]
        debug = ["--debug"] if "--debug" in sys.argv else []
        with files.report_os_error("start a worker process", "give fewer --workers"):
            process = subprocess.Popen(
                [sys.executable, "-m", f"{__package__}.worker", *debug],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                env=environment,
                text=True,
                encoding="utf-8",
                start_new_session=True,  # Ctrl-C goes to the command alone
            )
        self._processes[worker] = process
        self._write(process, {**asdict(self._recipe), "name": self.name(worker)})
        threading.Thread(target=self._listen, args=(worker, process), daemon=True).start()

    def _send(self, worker: int, content: Any, again: bool) -> None:
        self._write(self._processes[worker], {"content": content, "again": again})

    def _receive(self) -> Event:
        return self._events.get()

    def _write(self, process: subprocess.Popen[str], data: dict[str, Any]) -> None:
        assert process.stdin is not None
        with suppress(OSError):  # it has died, which its listener says
            process.stdin.write(json.dumps(data) + "\n")
            process.stdin.flush()

    def _listen(self, worker: int, process: subprocess.Popen[str]) -> None:
        """Pass on what a process says, and that it has ended."""
        assert process.stdout is not None
        refused = False
        for line in process.stdout:
            try:
                answer = json.loads(line)
            except ValueError:  # cut short: it died while it wrote
                continue
            refused = answer["kind"] == "refused"
            self._events.put(Event(worker, **answer))
        process.stdout.close()
        code = process.wait()
        if not refused:
            self._events.put(Event(worker, "dead", f"{self.name(worker)} {_how_it_ended(code)}"))


def _how_it_ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}"
    with suppress(ValueError):
        return f"was killed ({signal.Signals(-code).name}; out of memory?)"
    return f"was killed (signal {-code})"
