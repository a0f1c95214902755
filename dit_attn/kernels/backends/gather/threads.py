"""Threads that compute tiles side by side, each on one core.

torch splits every operation over its threads and waits for all of them; a chunk takes about ten short operations. Where
other processes hold a core, each wait costs a turn of the scheduler. Parts of a call on threads of their own wait once,
and heads on threads of their own once for a call.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import torch

PARTS = 4  # per thread: a thread that is held up leaves its share to the others

LARGE = 1 << 17  # elements, from which on simple operations are worth the threads


@dataclass(frozen=True)
class _Pool:
    process: int  # threads do not survive a fork
    threads: int
    executor: ThreadPoolExecutor


_LOCK = threading.Lock()
_pool: _Pool | None = None


def run_parts(work: Callable[[int, int], None], n: int, device: torch.device, large: bool = True) -> None:
    """Call ``work(low, high)`` for ranges that cover ``0 .. n``, on as many threads as torch uses on a CPU.

    On each of them torch uses one core. Gradients are off in ``work``, and inference mode is that of the caller. An
    error of ``work`` is raised here. What is not ``large``, or on another device, is one range on the caller's thread.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or not large or n < PARTS * threads:
        work(0, n)
        return
    step = -(-n // (PARTS * threads))
    _on_threads(threads, [partial(work, low, min(low + step, n)) for low in range(0, n, step)])


def run_items(work: Callable[[int], None], n: int, device: torch.device, at_once: bool = True) -> None:
    """Call ``work(i)`` for every ``i`` below ``n``, as many side by side as torch uses threads on a CPU.

    What would keep some of the threads idle, all items where they may not be in memory ``at_once`` and any remainder,
    is called on the caller's thread, where ``work`` may use the threads itself (:func:`run_parts`).
    """
    threads = torch.get_num_threads()
    alone = n % threads if at_once and threads > 1 and device.type == "cpu" else n
    if alone < n:
        _on_threads(threads, [partial(work, i) for i in range(n - alone)])
    for i in range(n - alone, n):
        work(i)


def _on_threads(threads: int, calls: Sequence[Callable[[], None]]) -> None:
    inference = torch.is_inference_mode_enabled()

    def run(call: Callable[[], None]) -> None:
        with torch.inference_mode(inference), torch.no_grad():
            call()

    executor = _threads(threads)
    for part in [executor.submit(run, call) for call in calls]:
        part.result()


def _threads(count: int) -> ThreadPoolExecutor:
    global _pool
    with _LOCK:
        if _pool is None or (_pool.process, _pool.threads) != (os.getpid(), count):
            if _pool is not None and _pool.process == os.getpid():
                _pool.executor.shutdown(wait=False)  # what it has been given is still done
            _pool = _Pool(os.getpid(), count, _started(count))
        return _pool.executor


def _started(count: int) -> ThreadPoolExecutor:
    """Start all threads. torch copies the last number of threads set anywhere to new threads, so it is set again."""
    executor = ThreadPoolExecutor(count, thread_name_prefix="dit_attn")
    ready = threading.Barrier(count)

    def begin() -> None:
        torch.set_num_threads(1)
        torch.get_num_threads()  # from here on the thread has its own number
        ready.wait()

    before = torch.get_num_threads()
    for begun in [executor.submit(begin) for _ in range(count)]:
        begun.result()
    torch.set_num_threads(before)
    return executor
