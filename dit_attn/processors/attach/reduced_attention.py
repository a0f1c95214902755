"""A copy of an attention module that computes some of its heads alone.

Where the processor is known to take its sizes from the projections, these are sliced, so that every product of the
layer gets smaller. Elsewhere all heads are projected, and the attention call is for those that stay
(:meth:`~dit_attn.processors.core.call.SDPAArgs.of_heads`). The stock module is not changed.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from dit_attn.processors.attach.layer_shape import STREAMS, output_projection
from dit_attn.processors.methods.head_drop import RefitProjections

SLICED = frozenset({
    "AttnProcessor", "AttnProcessor2_0", "CogVideoXAttnProcessor2_0", "FluxAttnProcessor", "HunyuanAttnProcessor2_0",
    "JointAttnProcessor2_0", "WanAttnProcessor",
})  # fmt: skip
"""Processors that work on modules with sliced projections."""
_NORMS = {
    "to_q": "norm_q", "to_k": "norm_k", "add_q_proj": "norm_added_q", "add_k_proj": "norm_added_k",
}  # fmt: skip


class KeptOutputs(torch.nn.Module):
    """Some output channels of a linear layer.

    Args:
        stock: the layer, or anything in its place (adapters, quantized weights), which is run in full then.
        channels: those that stay.
    """

    def __init__(self, stock: Any, channels: torch.Tensor) -> None:
        super().__init__()
        self.stock, self.channels = stock, channels
        self.cached = _sliced(stock, rows=channels) if is_plain(stock) else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., C) to (..., |S|)."""
        if self.cached is None:
            return self.stock(x)[..., self.channels]
        weight, bias = _sliced(self.stock, rows=self.channels) if _differentiated(self.stock) else self.cached
        return F.linear(x, weight, bias)


class KeptInputs(torch.nn.Module):
    """An output projection that is given the heads that stay, with its refit.

    Args:
        stock: the projection.
        channels: channels of the heads that stay.
        full: whether the input has all heads, 0 in the others.
        refit: of the layer, or ``None``.
        stream, part: of the refit.
    """

    def __init__(
        self, stock: Any, channels: torch.Tensor, full: bool, refit: RefitProjections | None, stream: str, part: int
    ) -> None:
        super().__init__()
        self.stock, self.channels, self.full = stock, channels, full
        self.refit, self.stream, self.part = refit, stream, part
        self.added = None if refit is None else refit.of(stream, part)
        self.cached = self._merged() if is_plain(stock) and not full and not self._is_elsewhere else None

    @property
    def _is_elsewhere(self) -> bool:
        """Whether the refit is on another device, from which a hook brings it for each call."""
        return self.added is not None and self.added[0].device != self.channels.device

    def _merged(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        weight, bias = _sliced(self.stock, columns=self.channels)
        if self.added is not None:
            more = [x if _tracked(x) else x.detach() for x in self.added]
            weight = (weight.float() + more[0].float()).to(weight.dtype)
            bias = more[1].to(weight.dtype) if bias is None else (bias.float() + more[1].float()).to(bias.dtype)
        return weight, bias

    def forward(self, z: torch.Tensor) -> torch.Tensor:
        """Map (..., |S|), or (..., all heads), to (..., C)."""
        if self.cached is not None:
            changing = _differentiated(self.stock) or any(_tracked(x) for x in self.added or ())
            return F.linear(z, *(self._merged() if changing else self.cached))
        if self.full:
            out, z = self.stock(z), z[..., self.channels]
        else:
            out = self.stock(z.new_zeros(*z.shape[:-1], self.stock.in_features).index_copy(-1, self.channels, z))
        return out if self.refit is None or self.added is None else out + self.refit(z, self.stream, self.part)


class NormOfAll(torch.nn.Module):
    """A normalization over the channels of all heads, and of its result those that stay."""

    def __init__(self, stock: Any, channels: torch.Tensor) -> None:
        super().__init__()
        self.stock, self.channels = stock, channels

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., all heads) to (..., |S|)."""
        return self.stock(x)[..., self.channels]


def reduced(attention: Any, kept: Sequence[int], refit: RefitProjections | None = None, part: int = 0) -> Any:
    """Return the attention module with some of its heads.

    Args:
        attention: the stock module, whose weights are shared where they are not sliced.
        kept: heads that stay.
        refit: what is added to its output projections.
        part: part of the run that the refit is for.
    """
    found = copy.copy(attention)
    found._modules = dict(attention._modules)
    whole = not can_slice(attention)
    size = 0 if whole else attention.to_q.out_features // attention.heads
    for stream in STREAMS:
        projection = output_projection(attention, stream)
        if projection is None or (whole and (refit is None or refit.of(stream, part) is None)):
            continue
        device = next(projection.parameters()).device
        channels = _channels(kept, size or projection.in_features // attention.heads, device)
        new = KeptInputs(projection, channels, whole, refit, stream, part)
        stock = getattr(attention, stream)
        listed = isinstance(stock, torch.nn.ModuleList)
        setattr(found, stream, torch.nn.ModuleList([new, *stock[1:]]) if listed else new)
    if whole:
        return found
    for name in itertools.chain.from_iterable(STREAMS.values()):
        linear = getattr(attention, name, None)
        if linear is None:
            continue
        channels = _channels(kept, size, next(linear.parameters()).device)
        if _spans_heads(attention, name):
            setattr(found, _NORMS[name], NormOfAll(getattr(attention, _NORMS[name]), channels))
        else:
            setattr(found, name, KeptOutputs(linear, channels))
    for key, value in (("heads", len(kept)), ("sliceable_head_dim", len(kept)), ("fused_projections", False)):
        if hasattr(found, key):
            setattr(found, key, value)
    for key in ("inner_dim", "inner_kv_dim"):
        if hasattr(found, key):
            setattr(found, key, len(kept) * size)
    return found


def can_slice(attention: Any) -> bool:
    """Return whether the projections of an attention module can be sliced to some of its heads."""
    processor = getattr(attention, "processor", None)
    if not {base.__name__ for base in type(processor).__mro__} & SLICED or not isinstance(
        getattr(attention, "heads", None), int
    ):
        return False
    linears = [getattr(attention, name, None) for name in STREAMS["to_out"]]
    sizes = {getattr(linear, "out_features", None) for linear in linears}
    return len(sizes) == 1 and None not in sizes and output_projection(attention, "to_out") is not None


def weights_key(attention: Any, refit: RefitProjections | None) -> tuple[Any, ...]:
    """Return what changes when weights that a reduced module was made from are moved, loaded or trained."""
    parts = [attention, refit] if refit is not None else [attention]
    return tuple(
        (x.data_ptr(), x.dtype, x.device, -1 if x.is_inference() else x._version)
        for part in parts
        for x in part.parameters()
        if not x.is_meta
    )


def is_plain(linear: Any) -> bool:
    """Return whether a linear layer is diffusers' own, with its weight at hand: no adapter, hook or other storage."""
    return (
        type(linear) is torch.nn.Linear
        and type(linear.weight) in (torch.nn.Parameter, torch.Tensor)
        and not linear.weight.is_meta
        and linear.weight.is_floating_point()
        and "forward" not in linear.__dict__  # accelerate's hooks
        and not linear._forward_hooks
        and not linear._forward_pre_hooks
    )


def _spans_heads(attention: Any, name: str) -> bool:
    """Whether the normalization behind a projection is over all heads at once."""
    weight = getattr(getattr(attention, _NORMS.get(name, ""), None), "weight", None)
    return weight is not None and weight.numel() == getattr(attention, name).out_features and attention.heads > 1


def _channels(kept: Sequence[int], size: int, device: torch.device) -> torch.Tensor:
    each = [torch.arange(head * size, (head + 1) * size) for head in kept]
    return torch.cat(each).to("cpu" if device.type == "meta" else device)


def _sliced(
    linear: torch.nn.Linear, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias of a linear layer with some of its outputs, or of its inputs."""
    tracked = _differentiated(linear)
    weight, bias = (x if x is None or tracked else x.detach() for x in (linear.weight, linear.bias))
    assert weight is not None
    if columns is not None:
        return weight[:, columns], bias
    return weight[rows], None if bias is None else bias[rows]


def _tracked(x: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and x.requires_grad


def _differentiated(linear: torch.nn.Linear) -> bool:
    return any(_tracked(x) for x in linear.parameters())
