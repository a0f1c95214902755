"""Checkpoints of a fine-tuning: written at once or not at all, of a split model as one process would write them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dit_attn import files
from dit_attn.errors import DitAttnError, RunStopped
from dit_attn.pipelines.finetune.sharding import load_state, split_like, whole, whole_state


def write_checkpoint(job: Any, path: Path) -> None:
    """Write the state of a fine-tuning; the main process does. All processes of a split model call it.

    Args:
        job: a :class:`.loop.Finetune`.
        path: of the file.

    Raises:
        RunStopped: it cannot be written; the previous one stays.
    """
    main = job.accelerator.is_main_process
    if not main and job.shell is None:
        return
    state = {
        "setup": _setup(job), "transformer": job.transformer, "step": job.step, "seconds": job.seconds,
        "log": job.log, "average": {name: whole(mean) for name, mean in job.average.items()},
        "trained": {name: whole(value.detach()) for name, value in job.trained.items()},
        "optimizer": whole_state(job.optimizer),
    }  # fmt: skip
    if main:
        files.write_checkpoint(path, state, RunStopped)
        job.saved = job.step


@torch.no_grad()
def read_checkpoint(job: Any, path: Path) -> None:
    """Give a fine-tuning, a :class:`.loop.Finetune`, the state of a file.

    Raises:
        DitAttnError: no file, an unreadable one, or one of another model or other settings.
    """
    if not path.is_file():
        raise DitAttnError(f"nothing to resume: {path} does not exist; leave out --resume to start a new run")
    state = files.read_weights(path)
    if state.get("setup") != _setup(job) or state.get("transformer") != job.transformer:
        raise DitAttnError(
            f"{path} belongs to another model, method, stage, loss, batch, rank or seed; give those of the run"
        )
    given = state["trained"]
    job.load(given, path)
    for name, mean in job.average.items():
        mean.copy_(split_like(state["average"].get(name, given[name]), mean))
    load_state(job.optimizer, state["optimizer"], list(job.trained.values()))
    job.step = job.saved = state["step"]
    job.seconds, job.log = state["seconds"], state["log"]


def _setup(job: Any) -> dict[str, Any]:
    """What a checkpoint shares with the run that continues it, on any number of processes with one batch together."""
    return {**job.config.setup(), "batch": job.config.batch * job.accelerator.num_processes}
