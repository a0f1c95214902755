"""Examples of a fine-tuning: calls of a transformer, one per safetensors file.

An example has the arguments of one call by name. A *clean* one has clean latents and no time step: noise is added when
it is used. A *noisy* one is a call in the middle of a run, with what the dense transformer predicted.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_attn import files
from dit_attn.errors import DitAttnError, cut, reason

LATENTS, TIME, TARGET = "hidden_states", "timestep", "target"
_TENSOR = "tensor"  # key that stands for a tensor in the JSON of an example


@dataclass(frozen=True)
class Example:
    """One example.

    Attributes:
        arguments: of the transformer's call, by name: tensors, plain values, and lists and dicts of them.
        target: what the dense transformer predicted; ``None`` for clean latents.
    """

    arguments: dict[str, Any]
    target: torch.Tensor | None = None

    @property
    def clean(self) -> bool:
        """Whether noise has yet to be added."""
        return TIME not in self.arguments

    def to(self, device: torch.device) -> Example:
        """Return it on a device."""
        moved = _mapped(self.arguments, lambda x: x.to(device))
        return Example(moved, None if self.target is None else self.target.to(device))


def _mapped(value: Any, change: Any) -> Any:
    """A nested value with every tensor changed."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _mapped(item, change) for key, item in value.items()}
    return [_mapped(item, change) for item in value] if isinstance(value, (list, tuple)) else value


def write_example(example: Example, path: Path) -> None:
    """Write an example, atomically.

    Raises:
        DitAttnError: an argument that is no tensor and no JSON value, or a file that cannot be written.
    """
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}

    def named(x: torch.Tensor) -> dict[str, str]:
        name = f"argument_{len(tensors)}"
        tensors[name] = x.detach().cpu().contiguous().clone()
        return {_TENSOR: name}

    plain = _mapped(example.arguments, named)
    if example.target is not None:
        tensors[TARGET] = example.target.detach().cpu().contiguous().clone()
    try:
        data = save(tensors, metadata={"format": "pt", "arguments": json.dumps(plain)})
    except TypeError as error:
        raise DitAttnError(f"an argument of the transformer cannot be saved ({reason(error)})") from error
    with files.report_os_error(f"write {path}", "free disk space or choose another --output"):
        files.write_bytes(path, data)


def read_example(path: Path) -> Example:
    """Read an example as data.

    Raises:
        DitAttnError: it is none.
    """
    from safetensors import safe_open

    tensors = files.read_weights(path)
    with safe_open(path, "pt") as opened:
        about = (opened.metadata() or {}).get("arguments", "")
    try:
        arguments = _restored(files.parse_json(about), tensors)
    except (ValueError, KeyError, TypeError) as error:
        raise DitAttnError(
            f"{path} is no training example ({cut(reason(error), 80)}); write examples with "
            "dit_attn.pipelines.finetune.write_example"
        ) from error
    if not isinstance(arguments, dict) or not isinstance(arguments.get(LATENTS), torch.Tensor):
        raise DitAttnError(f"{path} has no latents: an example names the transformer's argument {LATENTS!r}")
    example = Example(arguments, tensors.get(TARGET))
    if not example.clean and example.target is None:
        raise DitAttnError(f"{path} has a time step and no target; give clean latents, or the teacher's prediction")
    return example


def _restored(value: Any, tensors: dict[str, torch.Tensor]) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TENSOR}:
            return tensors[value[_TENSOR]]
        return {key: _restored(item, tensors) for key, item in value.items()}
    return [_restored(item, tensors) for item in value] if isinstance(value, list) else value


def read_examples(folder: Path) -> list[Path]:
    """Return the files of the examples in a folder, in the order of their names; each is read once for a check.

    Raises:
        DitAttnError: there are none, or one cannot be read.
    """
    found = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    if not found:
        raise DitAttnError(f"{folder} has no examples (*.safetensors); leave out --data to draw them with the teacher")
    kinds = {read_example(path).clean for path in found}
    if len(kinds) > 1:
        raise DitAttnError(f"{folder} has clean and noisy examples; give a folder of one kind")
    return found


def split(paths: Sequence[Path], held_out: float) -> tuple[list[Path], list[Path]]:
    """Return the examples to train on and those held out, the last ones."""
    count = min(len(paths) - 1, max(1, round(held_out * len(paths)))) if held_out else 0
    return list(paths[: len(paths) - count]), list(paths[len(paths) - count :])
