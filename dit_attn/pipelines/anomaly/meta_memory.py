"""The memory that a computation would take, found by doing it on the meta device: shapes without numbers."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all tensors that are alive while operations run, by their storages.

    Attributes:
        now: bytes of the tensors that were made inside and are still alive.
        peak: largest value of ``now``.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def ignore(self, tensors: Iterable[torch.Tensor]) -> None:
        """Leave out tensors that were there before, such as weights."""
        for tensor in tensors:
            self._known.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self._note(tensor.untyped_storage())
        return out

    def _note(self, storage: Any) -> None:
        if storage in self._known:
            return
        self._known.add(storage)
        size = storage.nbytes()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._drop, size)

    def _drop(self, size: int) -> None:
        self.now -= size


class _Fused(torch.autograd.Function):
    """The tensors of a fused attention kernel, forward and backward; no matrix of logits."""

    @staticmethod
    def forward(ctx: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out, statistics = q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, statistics)
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(one) for one in ctx.saved_tensors[:3])


class AsOnDevice(TorchFunctionMode):
    """Have attention fused and linear layers in one type, as they are on a device under autocast.

    Args:
        dtype: of the weights.
    """

    def __init__(self, dtype: torch.dtype):
        super().__init__()
        self.dtype = dtype

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            named = dict(zip(("query", "key", "value"), args)) | kwargs
            return _Fused.apply(named["query"], named["key"], named["value"])
        if func is F.linear:
            args = tuple(one.to(self.dtype) if isinstance(one, torch.Tensor) else one for one in args)
        return func(*args, **kwargs)

    def checkpoint(self, block: torch.nn.Module, *args: Any) -> Any:
        """Run a block of a model with its activations computed twice: the second time is outside of the mode."""

        def run(*given: Any) -> Any:
            with AsOnDevice(self.dtype):
                return block(*given)

        return torch.utils.checkpoint.checkpoint(run, *args, use_reentrant=False)
