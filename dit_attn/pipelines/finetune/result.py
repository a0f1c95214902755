"""The result of a fine-tuning: a split model put together again, and what was tuned written."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch

from dit_attn.api import disable
from dit_attn.pipelines.finetune.sharding import put_together, whole
from dit_attn.processors.attach.attach import session_of


@torch.no_grad()
def gather(job: Any) -> None:
    """Put the split model of a job together in its main process; see :meth:`.loop.Finetune.gather`."""
    if job.shell is None:
        return
    main = job.accelerator.is_main_process
    put_together(job.model, job.shell, main)
    job.average = {name: whole(mean).cpu() for name, mean in job.average.items()}
    if not main:
        return
    job.model = job.call = job.pipe.transformer = job.shell
    job.trained = {name: value for name, value in job.model.named_parameters() if name in job.trained}
    session = session_of(job.model)
    assert session is not None
    job.session = session


def export(job: Any, folder: Path, weights: bool) -> list[Path]:
    """Write what a job has tuned; see :meth:`.loop.Finetune.export`."""
    with torch.no_grad():
        for name, mean in job.average.items():
            job.trained[name].copy_(mean)
    job.use(job.config.method_at(job.config.steps))
    written: list[Path] = [folder / "method"]
    model: Any = job.model
    if job.session.learned.methods:
        job.session.save_pretrained(written[0])
    else:
        job.method.save_pretrained(written[0])
    if weights and job.config.stage == "lora":
        written.append(folder / "lora")
        model.save_lora_adapter(written[-1])
    elif weights and job.config.stage == "full":
        written.append(folder / "transformer")
        stock = copy.deepcopy(model)
        disable(stock)
        stock.save_pretrained(written[-1])
    return written
