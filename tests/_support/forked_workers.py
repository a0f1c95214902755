"""Worker processes that are forked from one which has imported the libraries, so that a test need not wait for them.

The local engine starts each worker as a process of its own, and its own tests keep it so. What other tests are about is
what workers make: for them, :func:`use` puts a fork where the engine starts a process. Pipes, signals, exit codes and
what the worker runs are the same.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from multiprocessing.reduction import DupFd
from types import SimpleNamespace
from typing import Any

import pytest

PRELOAD = ("dit_attn.pipelines.run.worker", "tests._support.forked_workers", "tests._support.imported")


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """Start the workers of the local engine by forks until the test ends."""
    names = ("PIPE", "TimeoutExpired")
    stand_in = SimpleNamespace(Popen=ForkedWorker, **{name: getattr(subprocess, name) for name in names})
    monkeypatch.setattr("dit_attn.pipelines.run.local.subprocess", stand_in)


class ForkedWorker:
    """What ``subprocess.Popen`` is to the engine."""

    def __init__(self, command: Sequence[str], env: dict[str, str], **options: Any) -> None:
        assert list(command[1:3]) == ["-m", "dit_attn.pipelines.run.worker"] and options.pop("start_new_session")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(PRELOAD))
        theirs_in, ours_in = os.pipe()
        ours_out, theirs_out = os.pipe()
        pipes = DupFd(theirs_in), DupFd(theirs_out)
        self._process = context.Process(target=_work, args=(*pipes, list(command[3:]), env, os.getcwd()))
        self._process.start()
        os.close(theirs_in)
        os.close(theirs_out)
        self.stdin = os.fdopen(ours_in, "w", encoding="utf-8")
        self.stdout = os.fdopen(ours_out, encoding="utf-8")

    @property
    def returncode(self) -> int | None:
        """As of ``Popen``: below 0, the signal that ended it."""
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """Wait until it has ended."""
        self._process.join(timeout)
        code = self._process.exitcode
        if code is None:
            raise subprocess.TimeoutExpired("worker", timeout or 0.0)
        return code

    def terminate(self) -> None:
        """Send SIGTERM."""
        self._process.terminate()

    def kill(self) -> None:
        """Send SIGKILL."""
        self._process.kill()


def _work(given: Any, answers: Any, words: list[str], environment: dict[str, str], folder: str) -> None:
    import torch

    from dit_attn.pipelines.run import worker

    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(int(environment["OMP_NUM_THREADS"]))
    os.dup2(given.detach(), 0)
    os.dup2(answers.detach(), 1)
    sys.stdin = os.fdopen(0, encoding="utf-8")
    sys.argv = ["worker", *words]
    sys.exit(worker.main())
