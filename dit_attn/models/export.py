"""From a training run to a diffusers folder."""

from __future__ import annotations

import platform
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dit_attn import files
from dit_attn.machine import processor
from dit_attn.models import nets, registry
from dit_attn.models.loop import Run


def pipeline_of(run: Run) -> Any:
    """Build the stock pipeline around the averaged weights of `run`."""
    model = run.averaged()
    return nets.build_pipeline(run.recipe.family, model.parts, run.tokenizer)


def provenance(run: Run, figures: dict[str, Any] | None = None) -> dict[str, Any]:
    """Collect the content of `training.json`: recipe, seed, progress, versions, hardware and measured figures.

    A tail adds the same of the weights that it went on from.
    """
    return {
        "name": run.recipe.name,
        "seed": run.seed,
        "steps_done": run.step,
        "training_seconds": round(run.seconds, 1),
        "recipe": asdict(run.recipe),
        "model": {name: getattr(run.recipe.net, name) for name in ("hidden", "layers", "heads", "text_width")},
        "environment": environment(),
        "figures": figures or {},
        "log": run.log,
        **({"went_on_from": registry.info(run.recipe.name).training} if run.recipe.is_tail else {}),
    }


def environment() -> dict[str, Any]:
    """Collect library versions and hardware, for result files."""
    import diffusers
    import torch
    import transformers

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
        "hardware": _hardware(),
        "threads": torch.get_num_threads(),
        **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
    }


def _hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return processor()


def export(run: Run, folder: Path, figures: dict[str, Any] | None = None) -> None:
    """Write `run` as a diffusers folder, which replaces an earlier one part by part when all parts are written."""
    with files.atomic_folder(folder) as staging:
        nets.save_folder(pipeline_of(run), staging)
        log = staging / "training.json"
        files.write_json(log, provenance(run, figures))
        log.chmod(0o644)
