"""Tiny random pipelines of the kinds that anomalies are learned on, and a small data set of the inspection world."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dit_attn.eval.inspection_world.folders import write_folders
from dit_attn.models import nets
from dit_attn.models.recipe import NetSize

SIZE = NetSize(hidden=32, layers=2, heads=2, text_width=32, text_layers=1)


def tiny_pipeline(family: str = "image", seed: int = 0) -> Any:
    """A random pipeline of family "image" (PixArt) or "joint" (SD3) that knows the words of the inspection world."""
    torch.manual_seed(seed)
    tokenizer = nets.build_tokenizer("inspect", SIZE.text_length)
    parts = nets.build_parts(family, len(tokenizer), SIZE)
    torch.nn.init.normal_(parts["transformer"].proj_out.weight, std=0.3)
    pipe = nets.build_pipeline(family, {name: part.eval() for name, part in parts.items()}, tokenizer)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def data(folder: Path, size: int = 32, shots: int = 2) -> tuple[Path, Path, Path]:
    """Folders of normal images, defect images and masks."""
    return write_folders(folder, "metal", "hole", normals=3, shots=shots, size=size)
