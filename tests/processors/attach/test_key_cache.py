"""Caches of keys among the arguments of a call: whether they are used, and copies that share the tensors alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit_attn.processors.attach import key_cache


class LayerCache:
    """Keys of a layer."""

    def __init__(self, mode: str | None = None) -> None:
        self.k: torch.Tensor | None = torch.zeros(1)
        self.mode = mode


@pytest.mark.parametrize(
    ("arguments", "used"),
    [
        ({}, False),
        ({"hidden_states": torch.zeros(1), "kv_cache": None, "kv_cache_mode": None}, False),
        ({"kv_cache": None, "kv_cache_mode": "extract"}, True),
        ({"kv_cache": SimpleNamespace(layer_caches=[]), "kv_cache_mode": "cached"}, True),
        *[
            ({"kv_caches": SimpleNamespace(caches=[LayerCache(mode)])}, mode in ("write", "read"))
            for mode in (None, "write", "read", "skip")
        ],
    ],
)
def test_a_cache_is_used_where_keys_are_written_or_read(arguments: dict[str, Any], used: bool) -> None:
    assert key_cache.is_used(arguments) is used


def test_what_is_written_to_a_copy_does_not_reach_the_cache() -> None:
    cache = SimpleNamespace(layers=[LayerCache(), LayerCache()], by_name={"first": LayerCache()})
    keys = cache.layers[0].k
    states = torch.zeros(2)
    found = key_cache.with_copies({"hidden_states": states, "kv_cache": cache, "kv_cache_mode": "extract"})
    assert found["hidden_states"] is states and found["kv_cache_mode"] == "extract"
    copied = found["kv_cache"]
    assert copied.layers[0].k is keys
    copied.layers[0].k, copied.by_name["first"].k = torch.ones(1), None
    copied.layers.append(LayerCache())
    assert cache.layers[0].k is keys and cache.by_name["first"].k is not None and len(cache.layers) == 2
