"""Translate one attention call of ComfyUI, and its result, to and from the layout of this package."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch

from dit_attn.processors.core.call import SDPAArgs

_KNOWN = {"scale", "enable_gqa", "transformer_options", "_inside_attn_wrapper", "low_precision_attention"}
"""Keywords whose meaning is known; any other that is set may change the result, so that the call stays stock."""


def _parameters(
    q: Any,
    k: Any,
    v: Any,
    heads: int,
    mask: Any = None,
    attn_precision: Any = None,
    skip_reshape: bool = False,
    skip_output_reshape: bool = False,
    **kw: Any,
) -> None:
    """The parameters of ComfyUI's attention functions, by name."""


_SIGNATURE = inspect.signature(_parameters)


@dataclass(frozen=True)
class HostCall:
    """One attention call as ComfyUI makes it.

    Attributes:
        args: the call; q, k and v are views (B, S, H, D).
        options: ``transformer_options`` of the model's call.
        flat: whether the result is (B, S, H * D), else (B, H, S, D).
        unsupported: reason why the call stays with stock attention, or ``None``.
    """

    args: SDPAArgs
    options: dict[str, Any]
    flat: bool
    unsupported: str | None = None

    def from_host(self, out: torch.Tensor) -> torch.Tensor:
        """Return a result of ComfyUI as (B, S, H, D), a view."""
        return out.unflatten(-1, (self.args.q.shape[2], -1)) if self.flat else out.transpose(1, 2)

    def to_host(self, out: torch.Tensor) -> torch.Tensor:
        """Return a result (B, S, H, D) in the layout that the model expects."""
        return out.flatten(2) if self.flat else out.transpose(1, 2)


def read_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> HostCall:
    """Return the call behind the arguments of an attention function.

    Args:
        args, kwargs: ``(q, k, v, heads, mask=None, attn_precision=None, skip_reshape=False,
            skip_output_reshape=False, **kw)``; q is (B, S, H * D), or (B, H, S, D) with ``skip_reshape``.

    Raises:
        TypeError: other arguments.
    """
    given = _SIGNATURE.bind(*args, **kwargs)
    given.apply_defaults()
    call, more = dict(given.arguments), given.arguments["kw"]
    tensors = call["q"], call["k"], call["v"]
    if call["skip_reshape"]:
        q, k, v = (x.transpose(1, 2) for x in tensors)
    else:
        width = tensors[0].shape[-1] // call["heads"]
        q, k, v = (x.unflatten(-1, (-1, width)) for x in tensors)
    strange = sorted(name for name, value in more.items() if name not in _KNOWN and value is not None)
    gqa = bool(more.get("enable_gqa", False))
    found = SDPAArgs(q, k, v, _mask(call["mask"]), more.get("scale"), gqa=gqa)
    reason = f"unknown argument {strange[0]} of the attention call" if strange else None
    return HostCall(found, more.get("transformer_options") or {}, not call["skip_output_reshape"], reason)


def _mask(mask: Any) -> Any:
    """(Sq, Sk) and (B, Sq, Sk) masks as (B|1, 1, Sq, Sk); anything else as it is."""
    if isinstance(mask, torch.Tensor) and mask.ndim in (2, 3):
        return mask[None, None] if mask.ndim == 2 else mask[:, None]
    return mask
