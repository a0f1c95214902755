"""Run one function on several gloo processes of this machine."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist


def run_ranks(work: Callable[..., None], count: int, folder: Path, *args: Any) -> None:
    """Call ``work(rank, folder, *args)`` in ``count`` processes of one group; the first error is raised here."""
    torch.multiprocessing.spawn(_enter, (work, count, folder, args), nprocs=count)


def _enter(rank: int, work: Callable[..., None], count: int, folder: Path, args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    place = (folder / "meeting").as_uri()
    dist.init_process_group("gloo", place, timedelta(seconds=300), world_size=count, rank=rank)
    work(rank, folder, *args)
    dist.barrier()
    # No rank tears the group down while another still talks to it, and none runs the destructors of what its work
    # imported: either aborts a process now and then, after all that is tested is done.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
