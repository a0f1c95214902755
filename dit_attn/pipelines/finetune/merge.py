"""Carry a fine-tuning over to a sibling model: ``W_target + (W_tuned - W_base)``, tensor by tensor.

Used to give a step-distilled model what its base model learned of sparse attention, without training it again.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch

from dit_attn import files
from dit_attn.errors import DitAttnError, cut

WEIGHTS = "diffusion_pytorch_model.safetensors"


def merge_weights(base: str | Path, tuned: str | Path, target: str | Path, output: str | Path) -> dict[str, int]:
    """Write ``target + (tuned - base)`` as a transformer folder that ``from_pretrained`` reads.

    Sums are fp32; the result has the types of ``target``.

    Args:
        base: transformer folder (or the pipeline it is in) that the fine-tuning began from.
        tuned: what it ended in.
        target: the sibling of ``base``.
        output: folder for the result.

    Returns:
        ``{"tensors": all, "changed": those that the fine-tuning changed}``.

    Raises:
        DitAttnError: a folder without weights, models that differ in a tensor's name or shape, or a result that is not
            finite; nothing is written then.
    """
    given = {"base": base, "tuned": tuned, "target": target}
    places = {name: _folder(Path(folder).expanduser()) for name, folder in given.items()}
    states = {name: _state(place) for name, place in places.items()}
    merged: dict[str, torch.Tensor] = {}
    changed = 0
    for key, value in states["target"].items():
        for name in ("base", "tuned"):
            other = states[name].get(key)
            if other is None or other.shape != value.shape:
                what = "is missing" if other is None else f"is {tuple(other.shape)} and in target {tuple(value.shape)}"
                raise DitAttnError(f"{cut(key, 100)} {what} in {name}; the three must be of one architecture")
        delta = states["tuned"][key].float() - states["base"][key].float()
        changed += bool(delta.any())
        merged[key] = (value.float() + delta).to(value.dtype).contiguous() if value.is_floating_point() else value
        if not bool(torch.isfinite(merged[key].float()).all()):
            raise DitAttnError(f"{cut(key, 100)} is not finite in the merged model; check the weights")
    extra = next((key for name in ("base", "tuned") for key in states[name] if key not in states["target"]), None)
    if extra is not None:
        raise DitAttnError(f"{cut(extra, 100)} is missing in target; the three must be of one architecture")
    _write(merged, places["target"], Path(output).expanduser())
    return {"tensors": len(merged), "changed": changed}


def _folder(given: Path) -> Path:
    """The folder of the weights: the given one, or the transformer in it."""
    for place in (given, given / "transformer"):
        if place.is_dir() and any(place.glob("*.safetensors")):
            return place
    raise DitAttnError(f"{given} has no transformer weights (*.safetensors); give a folder that diffusers has saved")


def _state(place: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, of one file or of shards."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(place.glob("*.safetensors")):
        state |= files.read_weights(file)
    return state


def _write(state: dict[str, torch.Tensor], like: Path, output: Path) -> None:
    from safetensors.torch import save_file

    reported = files.report_os_error(f"write {output}", "free disk space or choose another --output")
    with reported, files.atomic_folder(output) as staging:
        save_file(state, staging / WEIGHTS, metadata={"format": "pt"})
        if (like / "config.json").is_file():
            shutil.copyfile(like / "config.json", staging / "config.json")
