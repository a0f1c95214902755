"""From a training run to a diffusers folder."""

from __future__ import annotations

import json
import os
import platform
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dit_attn.models import nets
from dit_attn.models.loop import Run


def pipeline_of(run: Run) -> Any:
    """The stock pipeline around the averaged weights of `run`."""
    model = run.averaged()
    return nets.build_pipeline(run.recipe.family, model.parts, run.tokenizer)


def provenance(run: Run, figures: dict[str, Any] | None = None) -> dict[str, Any]:
    """What `training.json` holds: recipe, seed, progress, versions, hardware and measured figures."""
    heads = run.model.parts["transformer"].config["num_attention_heads"]
    return {
        "name": run.recipe.name,
        "seed": run.seed,
        "steps_done": run.step,
        "training_seconds": round(run.seconds, 1),
        "recipe": asdict(run.recipe),
        "model": {"hidden": nets.HIDDEN, "layers": nets.LAYERS, "heads": heads, "text_width": nets.TEXT_WIDTH},
        "environment": environment(),
        "figures": figures or {},
        "log": run.log,
    }


def environment() -> dict[str, Any]:
    """Library versions and hardware, for result files."""
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
    }


def _hardware() -> str:
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{model}, {os.cpu_count()} cores"


def export(run: Run, folder: Path, figures: dict[str, Any] | None = None) -> None:
    """Write `run` as a diffusers folder: built beside `folder`, then moved in part by part."""
    folder.mkdir(parents=True, exist_ok=True)
    staging = folder / ".partial"
    shutil.rmtree(staging, ignore_errors=True)
    nets.save_folder(pipeline_of(run), staging)
    log = staging / "training.json"
    log.write_text(json.dumps(provenance(run, figures), indent=1) + "\n")
    log.chmod(0o644)
    for part in staging.iterdir():
        target = folder / part.name
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(part, target)
    shutil.rmtree(staging)
