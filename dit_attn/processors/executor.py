"""One place that runs an intercepted attention call: methods describe a request, the executor carries it out.

The visual rows of the sequence go through ``kernels.sparse_attention`` over all keys; every other row (text, time,
audio) is computed densely, so joint models keep their text exact. Nothing here builds a map of S x S.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F

from dit_attn.kernels import BlockLayout, Compensation, Epilogue, sparse_attention
from dit_attn.processors.tokens import Tokens

if TYPE_CHECKING:
    from dit_attn.processors.clock import Clock
    from dit_attn.processors.read_order import Rows
    from dit_attn.processors.session import Site

MIN_TOKENS = 256  # below this a dense call is faster on every backend measured so far


@dataclass
class AttentionCall:
    """One attention call of a socketed layer, after normalisation and rotary embedding.

    Attributes:
        q: (B, S, H, D).
        k: (B, S, Hk, D); ``H % Hk == 0``.
        v: (B, S, Hk, Dv).
        mask: what the model passed: ``None``, (B, S) or broadcastable to (B, H, S, S); boolean (True = attend) or
            additive.
        scale: softmax scale, ``None`` for ``D ** -0.5``.
        causal: whether the model asked for a causal map.
        site: the layer.
        tokens: the sequence's parts, ``None`` when they are unknown.
        clock: position in the run.
        branches: guidance branch of every batch row.
    """

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    mask: torch.Tensor | None
    scale: float | None
    causal: bool
    site: Site
    tokens: Tokens | None
    clock: Clock
    branches: tuple[str, ...] = ()


@dataclass
class Request:
    """What the enabled methods ask of one call; empty means the stock path.

    Attributes:
        layout: key blocks that the visual rows read (queries: visual rows, keys: the whole sequence).
        declined: reasons of the methods that let this call pass.
        key_mask: (B, S) bool, keys that exist; filled by the executor from the model's mask.
        key_bias: (B|1, H|1, S) fp32 added to the logits, for models whose mask is additive; ``key_mask`` is then
            the part of it that selection needs to know.
        rows: visual queries, keys and values in the order the layout speaks of; ``None`` for that of the sequence.
        compensation: virtual keys that stand for the skipped blocks.
        epilogue: what the kernel does to the rows before it writes them.
        visual: computes the visual rows instead of the kernel call, (B, Sv, H, Dv) in the sequence's order; called
            once.
        share: with ``visual``, what it costs, as a share of the visual rows' map.
        max_error: see :class:`~dit_attn.processors.reader.Reader`.
        density: what ``max_error`` is measured for, once a run; ``None`` where it is the same all along.
    """

    layout: BlockLayout | None = None
    declined: list[str] = field(default_factory=list)
    key_mask: torch.Tensor | None = None
    key_bias: torch.Tensor | None = None
    rows: Rows | None = None
    compensation: Compensation | None = None
    epilogue: Epilogue | None = None
    visual: Callable[[], torch.Tensor] | None = None
    share: float = 1.0
    max_error: float | None = None
    density: float | None = None

    @property
    def empty(self) -> bool:
        """Whether nothing is asked."""
        return self.layout is None and self.visual is None

    def decline(self, reason: str) -> None:
        """Let the call pass to the stock path, for a counted reason."""
        self.declined.append(reason)


def unfit(call: AttentionCall) -> str | None:
    """Why no method may touch this call, or ``None``. Checked before any method is asked."""
    if call.q.shape[1] != call.k.shape[1]:
        return "cross attention"
    if call.tokens is None:
        return f"unknown token layout for {call.q.shape[1]} tokens"
    if call.causal:
        return "causal attention"
    if call.tokens.visual_range is None:
        return "visual tokens are not consecutive"
    if call.q.shape[1] < MIN_TOKENS:
        return f"sequence under {MIN_TOKENS} tokens"
    return None


def read_mask(call: AttentionCall, request: Request, rule: str) -> str | None:
    """Turn the model's mask into the key mask and key bias of the request; the reason when it has no such form.

    Args:
        call: the attention call.
        request: gets ``key_mask`` and ``key_bias``.
        rule: the family's rule for square masks: ``"key"`` (there are none) or ``"visual-row"`` (all visual rows of a
            square mask are alike; one of them is taken).
    """
    mask = call.mask
    if mask is None:
        return None
    if mask.ndim == 2:
        mask = mask[:, None, None, :]
    if mask.ndim != 4 or mask.shape[1] not in (1, call.q.shape[2]) or mask.shape[-1] != call.k.shape[1]:
        return f"attention mask of shape {tuple(mask.shape)}"
    row = 0
    if mask.shape[2] != 1:
        if rule != "visual-row" or call.tokens is None or call.tokens.visual_range is None:
            return "square attention mask"
        row = call.tokens.visual_range[0]
    keys = mask[:, :, row, :]
    if keys.is_floating_point():
        request.key_bias = keys.float()
        keys = keys > torch.finfo(keys.dtype).min / 2
    elif keys.shape[1] != 1:
        request.key_bias = torch.zeros(keys.shape, device=keys.device).masked_fill(~keys.bool(), float("-inf"))
    request.key_mask = keys.bool().any(1).expand(call.q.shape[0], -1)
    return None


def run(call: AttentionCall, request: Request, dense: Callable[..., torch.Tensor]) -> torch.Tensor:
    """Carry out a request.

    Args:
        call: the attention call.
        request: the merged request; ``layout.q_len`` is the number of visual rows, ``layout.kv_len`` is S.
        dense: exact attention for the remaining rows, ``dense(q_rows, k, v, mask_rows) -> (B, rows, H, Dv)``.

    Returns:
        (B, S, H, Dv).
    """
    assert call.tokens is not None and call.tokens.visual_range is not None
    start, stop = call.tokens.visual_range
    seq_len = call.q.shape[1]
    visual = request.visual() if request.visual is not None else _visual_rows(call, request)
    if (start, stop) == (0, seq_len):
        return visual
    out = call.q.new_empty(*call.q.shape[:-1], call.v.shape[-1])
    out[:, start:stop] = visual
    for low, high in ((0, start), (stop, seq_len)):
        if low < high:
            out[:, low:high] = dense(call.q[:, low:high], call.k, call.v, _mask_rows(call.mask, low, high))
    return out


def _visual_rows(call: AttentionCall, request: Request) -> torch.Tensor:
    """(B, Sv, H, Dv) by the layout."""
    assert request.layout is not None and call.tokens is not None and call.tokens.visual_range is not None
    start, stop = call.tokens.visual_range
    rows = request.rows
    q, k, v = (call.q[:, start:stop], call.k, call.v) if rows is None else (rows.q, rows.k, rows.v)
    mask, bias = (request.key_mask, request.key_bias) if rows is None else (rows.key_mask, rows.key_bias)
    out = sparse_attention(
        q, k, v, request.layout, scale=call.scale, key_mask=mask if bias is None else None, key_bias=bias,
        compensation=request.compensation, epilogue=request.epilogue,
    )  # fmt: skip
    assert isinstance(out, torch.Tensor)  # no log-sum is asked for
    return out if rows is None else rows.put_back(out)


def sampled_error(call: AttentionCall, request: Request, out: torch.Tensor, count: int = 64) -> float:
    """Relative L2 error of the visual rows of ``out`` (B, S, H, Dv) against exact attention, on ``count`` of them."""
    assert call.tokens is not None and call.tokens.visual_range is not None
    start, stop = call.tokens.visual_range
    step = max(1, (stop - start) // count)
    mask = None
    if request.key_bias is not None:
        mask = request.key_bias[:, :, None].to(call.q.dtype)
    elif request.key_mask is not None:
        mask = request.key_mask[:, None, None]
    exact = dense_rows(call)(call.q[:, start:stop:step], call.k, call.v, mask).float()
    return float((out[:, start:stop:step].float() - exact).norm() / exact.norm().clamp(min=1e-30))


def dense_rows(call: AttentionCall) -> Callable[..., torch.Tensor]:
    """Exact attention over torch's fused kernel for a few rows of ``call``; (B, S, H, D) in and out."""

    def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        gqa = {"enable_gqa": True} if q.shape[1] != k.shape[1] else {}
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=call.scale, **gqa).transpose(1, 2)

    return dense


def _mask_rows(mask: torch.Tensor | None, low: int, high: int) -> torch.Tensor | None:
    if mask is None:
        return None
    if mask.ndim == 2:
        return mask[:, None, None, :]
    return mask if mask.shape[2] == 1 else mask[:, :, low:high]
