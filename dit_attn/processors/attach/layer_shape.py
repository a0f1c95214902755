"""Read the sizes of a stock attention module: its heads, its channels, its type."""

from __future__ import annotations

import re
from typing import Any

import torch

from dit_attn.processors.core.layer import Layer
from dit_attn.processors.core.parameters import LayerShape

_QUERY = ("to_q", "to_query", "to_qkv_mlp_proj", "to_qkv", "img_attn_qkv", "img_qkv_proj")
_KEY = ("to_k", "to_key")
_QUERY_NORM = re.compile("(img_)?(attn_)?(norm_q(uery)?|q(uery)?_norm)")
STREAMS = {"to_out": ("to_q", "to_k", "to_v"), "to_add_out": ("add_q_proj", "add_k_proj", "add_v_proj")}
"""Output projections of an attention module, and the projections whose heads they take: visual tokens, and text."""


def head_count(module: Any) -> int | None:
    """Return the number of heads of an attention module, ``None`` where it does not say."""
    for name in ("heads", "num_heads", "n_heads", "num_attention_heads"):
        if isinstance(getattr(module, name, None), int):
            return getattr(module, name)
    return None


def head_size(module: Any) -> int:
    """Return the channels of one head of an attention module."""
    inner = getattr(module, "inner_dim", None)
    if inner is None and isinstance(getattr(module, "head_dim", None), int):
        return module.head_dim
    inner = inner or _first(module, _QUERY).out_features
    return inner // (head_count(module) or 1)


def layer_shape(layer: Layer, module: Any, count: int) -> LayerShape:
    """Return the sizes of a layer.

    Args:
        layer: the layer.
        module: its attention module.
        count: number of layers that the method applies to.
    """
    heads, size = head_count(module) or 1, head_size(module)
    key = _first(module, _KEY)
    kv_heads = heads if key is None else key.out_features // size
    hidden_size = _first(module, _QUERY).in_features
    dtype = compute_dtype(module)
    found = ((stream, output_projection(module, stream)) for stream in STREAMS)
    outputs = tuple((stream, linear.out_features) for stream, linear in found if linear is not None)
    return LayerShape(layer.name, layer.kind, layer.index, count, heads, kv_heads, size, hidden_size, dtype, outputs)


def output_projection(module: Any, stream: str) -> Any:
    """Return the linear layer behind the heads of an attention module, ``None`` where it has none.

    Args:
        module: the attention module.
        stream: of :data:`STREAMS`.
    """
    found = getattr(module, stream, None)
    found = found[0] if isinstance(found, torch.nn.ModuleList) else found
    inner = getattr(found, "base_layer", found)  # behind the adapters of peft
    return found if isinstance(inner, torch.nn.Linear) else None


def query_norm(module: Any) -> tuple[torch.nn.Module | None, bool]:
    """Return what normalizes the queries of an attention module, and whether anything does, known or not."""
    found = {
        name: child
        for name, child in module.named_children()
        if "norm" in name and "q" in name and not re.search("added|txt|text", name)
        and not isinstance(child, torch.nn.Identity)
    }  # fmt: skip
    return next((child for name, child in found.items() if _QUERY_NORM.fullmatch(name)), None), bool(found)


def compute_dtype(module: torch.nn.Module) -> torch.dtype:
    """Return the type that an attention module computes in; weights may be stored in 8 bits and fewer."""
    types = (x.dtype for x in module.parameters() if x.is_floating_point() and x.element_size() > 1)
    return next(types, torch.get_default_dtype())


def compute_device(module: torch.nn.Module) -> torch.device:
    """Return the device that an attention module computes on; the CPU where its weights have no place yet."""
    for part in module.modules():
        device = getattr(getattr(part, "_hf_hook", None), "execution_device", None)
        if device is not None:  # weights that accelerate brings there for each call
            return torch.device(device)
    device = next((x.device for x in module.parameters()), torch.device("cpu"))
    return torch.device("cpu") if device.type == "meta" else device


def _first(module: Any, names: tuple[str, ...]) -> Any:
    return next((found for name in names if (found := getattr(module, name, None)) is not None), None)
