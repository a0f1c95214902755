"""What steps and pairs have taken on this machine, by model and settings, in one small file of the user's cache."""

from __future__ import annotations

import json
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from dit_attn import files
from dit_attn.cli.model_source import fingerprint, locate
from dit_attn.cli.options import Options

_FLAGS = ("dtype", "steps", "guidance_scale", "lora_rank", "tokens", "mask_tokens", "crop")


def key_of(job: str, options: Options, resolution: int, batch: int, checkpointing: bool) -> str:
    """Return the name of a time: everything that it depends on, the device and the number of processes among it.

    Args:
        job: ``"train"`` or ``"generate"``.
        options: the flags.
        resolution, batch, checkpointing: of the run.
    """
    import torch

    from dit_attn.cli.load_pipeline import pick_device
    from dit_attn.cli.workers import process_rank

    device = pick_device(options.get("device", "auto"))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type}, {torch.get_num_threads()}"
    kind, path, _ = locate(options["model"], options.get("revision"), options.get("variant"))
    model = path if kind == "hub" else fingerprint(Path(path))
    about = [job, model, name, process_rank()[1], resolution, batch, checkpointing]
    return json.dumps([*about, {flag: options[flag] for flag in _FLAGS if flag in options}])


class Watch:
    """Time the steps or pairs of a run, without the first of them.

    Args:
        options: the flags.
        job, resolution, batch: of the run.
    """

    def __init__(self, options: Options, job: str, resolution: int, batch: int):
        checkpointing = job == "train" and bool(options.get("gradient_checkpointing"))
        self._key = key_of(job, options, resolution, batch, checkpointing)
        self._marks: list[tuple[int, float]] = []

    def update(self, done: int) -> None:
        """Note that so many are done."""
        self._marks.append((done, time.monotonic()))

    def note(self) -> None:
        """Remember what one took, where there were several."""
        if self._marks and self._marks[-1][0] > self._marks[0][0]:
            (first, start), (last, end) = self._marks[0], self._marks[-1]
            note(self._key, (end - start) / (last - first))


def read(key: str) -> float | None:
    """Return the seconds of a step or a pair, ``None`` where nothing was timed."""
    found = _all().get(key)
    return float(found) if isinstance(found, (int, float)) else None


def note(key: str, seconds: float) -> None:
    """Remember the seconds of a step or a pair; a cache that cannot be written is left alone."""
    with suppress(OSError):
        path = _file()
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, {**_all(), key: round(seconds, 4)})


def _all() -> dict[str, Any]:
    try:
        found = files.parse_json(_file().read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _file() -> Path:
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "dit_attn", "anomaly_seconds.json")
