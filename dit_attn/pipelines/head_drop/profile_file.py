"""The file of a head profile: its sums as safetensors, everything else as JSON in the file's header."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from dit_attn import files
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.head_drop.profile import HeadProfile, LayerProfile, Moments

_HEADER = "dit_attn_head_profile"
_SUMS = ("total", "square", "weight")


def save_profile(profile: HeadProfile, path: str | Path) -> Path:
    """Write a profile to a safetensors file, and return it.

    Args:
        profile: what :func:`~dit_attn.pipelines.head_drop.profile_heads` measured.
        path: ``NAME.safetensors``.

    Raises:
        DitAttnError: it cannot be written.
    """
    from safetensors.torch import save

    place = files.user_path(path, "the profile").with_suffix(".safetensors")
    tensors, layers = {}, []
    for layer in profile.layers:
        tensors[f"{layer.name}/ablation"] = layer.ablation
        for stream, moments in layer.streams.items():
            tensors |= {f"{layer.name}/{stream}/{name}": getattr(moments, name) for name in _SUMS}
        counts = {stream: moments.count for stream, moments in layer.streams.items()}
        layers.append({"name": layer.name, "heads": layer.heads, "streams": counts})
    about = {key: getattr(profile, key) for key in ("transformer", "count", "calls", "end", "runs", "call")}
    data = save({key: x.contiguous() for key, x in tensors.items()}, {_HEADER: json.dumps({**about, "layers": layers})})
    with files.report_os_error(f"write {place}", "choose another place"):
        place.parent.mkdir(parents=True, exist_ok=True)
        files.write_bytes(place, data)
    return place


def load_profile(path: str | Path) -> HeadProfile:
    """Read a profile that :func:`save_profile` wrote.

    Raises:
        DitAttnError: no such file, or one of something else.
    """
    from safetensors import safe_open

    place = files.user_path(path, "the profile")
    if not place.is_file():
        raise DitAttnError(f"{place}: there is no such file; check the path")
    tensors = files.read_weights(place)
    with safe_open(place, "pt") as opened:
        header = (opened.metadata() or {}).get(_HEADER)
    if header is None:
        raise DitAttnError(f"{place} is no head profile; give a file that save_profile wrote")
    about: dict[str, Any] = json.loads(header)
    try:
        layers = [_layer(entry, tensors) for entry in about.pop("layers")]
        return HeadProfile(layers=layers, **about)
    except (KeyError, TypeError, AttributeError) as error:
        raise DitAttnError(f"{place} is a head profile of another version; measure it again") from error


def _layer(entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> LayerProfile:
    name = entry["name"]
    streams = {
        stream: Moments(count, **{key: tensors[f"{name}/{stream}/{key}"] for key in _SUMS})
        for stream, count in entry["streams"].items()
    }
    return LayerProfile(name, entry["heads"], streams, tensors[f"{name}/ablation"])
