"""Caches of keys that a transformer takes as an argument: text and references are computed once and attended to later.

A pass beside the plain one gets caches of its own: what it writes must not reach later steps. The rows of a cache are
those of the call that wrote it, so that no call can have other rows.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

_NAMES = ("kv_cache", "kv_caches")


def is_used(arguments: Mapping[str, Any]) -> bool:
    """Return whether a transformer call writes keys to a cache or reads them from one, by its arguments."""
    return any(_in_use(value) for name, value in arguments.items() if name.startswith(_NAMES))


def with_copies(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a transformer call with copies of the caches; no tensor is copied."""
    return {name: _copied(value) if name in _NAMES else value for name, value in arguments.items()}


def _in_use(value: Any) -> bool:
    """Whether an argument says that keys are written or read; GLM-Image's caches are there where they are not used."""
    layers = getattr(value, "caches", None)
    return value is not None and (layers is None or any(layer.mode in ("write", "read") for layer in layers))


def _copied(value: Any) -> Any:
    if isinstance(value, list):
        return [_copied(item) for item in value]
    if isinstance(value, dict):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, torch.Tensor) or not hasattr(value, "__dict__"):
        return value
    clone = copy.copy(value)
    clone.__dict__.update(_copied(vars(value)))
    return clone
