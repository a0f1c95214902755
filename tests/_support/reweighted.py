"""Re-weighted attention in float64, by its equations and the attention matrix."""

from __future__ import annotations

from typing import Any

import torch

from tests._support.recorded_calls import reference, weights


def reweighted(call: Any, request: Any, mode: str, rows: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
    """Attention whose rows have weights for some keys; (B, S, H, Dv).

    Args:
        call, request: the call, and its request for the layout.
        mode: ``bias`` (ln w on the logits), ``gain`` (w on the attention after the softmax) or ``logit`` (w on the
            logits).
        rows: (B, S) weights.
        keys: (Sk,) or (B, Sk) bool.
    """
    keys = keys.expand(len(rows), -1).double()
    if mode == "bias":
        return reference(call, request, rows.double().log()[:, None, :, None] * keys[:, None, None])
    factor = 1 + (rows.double() - 1)[:, None, :, None] * keys[:, None, None]
    if mode == "logit":
        q, k = (x.transpose(1, 2).double() for x in (call.q, call.k))
        logits = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * call.softmax_scale
        return reference(call, request, logits * (factor - 1))
    v = call.v.transpose(1, 2).double().repeat_interleave(call.q.shape[2] // call.v.shape[2], 1)
    return ((weights(call, request)[0] * factor) @ v).transpose(1, 2)
