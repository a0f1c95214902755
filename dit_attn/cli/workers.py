"""Several processes of one command, as ``torchrun`` and ``accelerate launch`` start them."""

from __future__ import annotations

import os
from typing import Any

from dit_attn.errors import DitAttnError, shorten
from dit_attn.pipelines.worker_share import WorkerShare


def process_rank() -> tuple[int, int]:
    """Return the number of this process, from 0, and the number of processes, by the launcher's environment.

    Raises:
        DitAttnError: the environment variables are no such numbers.
    """
    rank, size = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    if not (rank.isdecimal() and size.isdecimal() and int(rank) < max(1, int(size))):
        raise DitAttnError(
            f"RANK={shorten(rank)} and WORLD_SIZE={shorten(size)} in the environment are no number of a process and of "
            "how many; start the command with torchrun or accelerate launch, or unset them"
        )
    return int(rank), max(1, int(size))


def refuse_several(command: str) -> bool:
    """Return whether this process has nothing to do, since several were started and the first of them says so.

    Args:
        command: that runs in one process, e.g. ``"anomaly benchmark"``.

    Raises:
        DitAttnError: in the first of several processes.
    """
    rank, processes = process_rank()
    if processes > 1 and not rank:
        raise DitAttnError(
            f"dit-attn {command} runs in one process, and {processes} were started; start it without torchrun or "
            "accelerate launch"
        )
    return rank > 0


def join_workers(device: Any, device_given: bool) -> tuple[Any, WorkerShare]:
    """Return the device and the part of the work of this process; several under ``accelerate launch``, ``torchrun``.

    Args:
        device: of the flags.
        device_given: whether the user named it; else every process takes a GPU of its own.
    """
    if process_rank()[1] < 2:
        return device, WorkerShare()
    from accelerate import PartialState
    from accelerate.utils import gather_object

    state = PartialState(cpu=device.type == "cpu")
    if device.type != "cpu" and not device_given:
        device = state.device
    return device, WorkerShare(state.process_index, state.num_processes, gather_object)
