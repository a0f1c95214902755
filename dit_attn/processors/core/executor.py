"""Carry out the request of an intercepted attention call: methods describe it, the executor computes it.

The visual rows of the sequence go through ``kernels.sparse_attention`` over all keys; every other row (text, time,
audio) is computed densely, so joint models keep their text exact. Without a layout all rows are dense. Logit biases
apply to every row they are requested for. Nothing here builds an S x S matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F

from dit_attn.kernels import BlockLayout, Compensation, LogitBias, sparse_attention
from dit_attn.kernels.dense import biased_attention
from dit_attn.kernels.selection.pooling import block_means
from dit_attn.kernels.terms import BARRED, pooled_bias
from dit_attn.kernels.two_level import two_level_attention
from dit_attn.processors.core.call import AttentionCall, KeyGain, Request
from dit_attn.processors.core.observation import Observation, Probe
from dit_attn.processors.core.token_permute import PermutedTokens

ROWS_AT_ONCE = 64  # whose logits are built where a mask has no form that kernels take
MIN_TOKENS = 256  # below this a dense call is faster on every backend measured so far


def unsupported_reason(call: AttentionCall) -> str | None:
    """Return the reason no sparse method that is for speed may compute this call, or ``None``."""
    return unsupported_reason_call(call) or unsupported_reason_layout(call) or too_short(call, MIN_TOKENS)


def unsupported_reason_call(call: AttentionCall) -> str | None:
    """Return the reason this call must use stock attention whatever is requested, or ``None``."""
    if call.kind == "self" and call.q.shape[1] != call.k.shape[1]:
        return "cross attention"
    if call.tokens is None:
        return f"unknown token layout for {call.q.shape[1]} tokens"
    if call.mask is not None and call.mask.ndim not in (2, 4):
        return f"attention mask of shape {tuple(call.mask.shape)}"
    return "causal attention" if call.causal else None


def unsupported_reason_layout(call: AttentionCall) -> str | None:
    """Return the reason a supported call can have no block layout, or ``None``."""
    assert call.tokens is not None
    return "visual tokens are not consecutive" if call.tokens.visual_range is None else None


def too_short(call: AttentionCall, tokens: int) -> str | None:
    """Return the reason a call is too short for a method that needs ``tokens`` tokens, or ``None``."""
    return f"sequence under {tokens} tokens" if call.q.shape[1] < tokens else None


def read_mask(call: AttentionCall, request: Request) -> str | None:
    """Turn the model's mask into the key mask and key bias of the request.

    Of a square mask whose visual rows are all alike (``call.mask_rule``) one visual row is taken.

    Args:
        call: the attention call.
        request: gets ``key_mask`` and ``key_bias``.

    Returns:
        The reason when the mask has no such form, else ``None``.
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
        if call.mask_rule != "visual-row" or call.tokens is None or call.tokens.visual_range is None:
            return "square attention mask"
        row = call.visual.start
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
        dense: exact attention for the remaining rows, ``dense(q_rows, k, v, mask_rows) -> (B, rows, H, Dv)``, with
            their bias as a fifth argument where there is one.

    Returns:
        (B, S, H, Dv).
    """
    seq_len = call.q.shape[1]
    if not request.sparse:
        return _dense_parts(call, request, dense)
    rows = call.visual
    visual = request.compute_visual() if request.compute_visual is not None else visual_rows(call, request)[0]
    if (rows.start, rows.stop) == (0, seq_len):
        return visual
    assert call.tokens is not None
    make = call.q.new_zeros if call.tokens.keys_alone else call.q.new_empty
    out = make(*call.q.shape[:-1], call.v.shape[-1])
    out[:, rows] = visual
    for low, high in call.tokens.other_queries:
        out[:, low:high] = _dense_part(call, request, dense, low, high)
    return out


def run_active(call: AttentionCall, request: Request) -> tuple[torch.Tensor, float] | None:
    """Compute the rows that each head needs, without a layout; ``None`` where all are to be computed.

    Args:
        call: the attention call.
        request: with ``active``.

    Returns:
        (B, S, H, Dv), and the rows that were computed as a fraction of all.
    """
    active, (batch, seq_len, heads, _) = request.active, call.q.shape
    square = call.mask is not None and call.mask.ndim == 4 and call.mask.shape[2] != 1
    alone = call.tokens is None or call.tokens.keys_alone
    if active is None or request.biases or square or alone or too_short(call, MIN_TOKENS):
        return None
    count = int(active.sum(1).max())
    if count == seq_len:
        return None
    rows = active.to(torch.uint8).argsort(dim=1, descending=True, stable=True)[:, :count, :, None]
    q = call.q.gather(1, rows.expand(-1, -1, -1, call.q.shape[-1]))
    found = dense_rows(call)(q, call.k, call.v, _mask_rows(call.mask, 0, count))
    out = found.new_zeros(batch, seq_len, heads, found.shape[-1])
    return out.scatter(1, rows.expand_as(found), found), count / seq_len


def without_rows(layout: BlockLayout, active: torch.Tensor) -> BlockLayout:
    """Return a layout whose query blocks without an active row have no key block.

    Args:
        layout: the layout.
        active: (B, q_len, H) bool.
    """
    padded = F.pad(active, (0, 0, 0, layout.nq * layout.q_block - layout.q_len))
    needed = padded.unflatten(1, (layout.nq, layout.q_block)).any(2).transpose(1, 2)  # (B, H, nq)
    counts, full = layout.kv_num_blocks * needed, layout.full_kv_num_blocks
    indices = layout.kv_indices.expand(*counts.shape, -1).contiguous()
    return replace(
        layout, kv_indices=indices, kv_num_blocks=counts, uniform=None,
        full_kv_num_blocks=None if full is None else full * needed,
    )  # fmt: skip


def _dense_parts(call: AttentionCall, request: Request, dense: Callable[..., torch.Tensor]) -> torch.Tensor:
    """(B, S, H, Dv), all rows dense; those that no bias reaches are computed without one."""
    seq_len = call.q.shape[1]
    edges = sorted({0, seq_len, *(edge for bias in request.biases for edge in (bias.first, bias.last))})
    parts = [_dense_part(call, request, dense, low, high) for low, high in pairwise(edges)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _dense_part(
    call: AttentionCall, request: Request, dense: Callable[..., torch.Tensor], low: int, high: int
) -> torch.Tensor:
    """(B, high - low, H, Dv), some rows dense, with their bias."""
    bias = request.bias(slice(low, high))
    given = (call.q[:, low:high], call.k, call.v, _mask_rows(call.mask, low, high))
    return dense(*given) if bias is None else dense(*given, bias)


def visual_rows(
    call: AttentionCall, request: Request, values: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return the rows (B, Sv, H, Dv) by the layout; of other ``values``, the LSE (B, H, Sv) too, and no epilogue."""
    assert request.layout is not None
    permuted = request.permuted
    q, k, v = (call.q[:, call.visual], call.k, call.v) if permuted is None else (permuted.q, permuted.k, permuted.v)
    source = request if permuted is None else permuted
    mask, key_bias = source.key_mask, source.key_bias
    bias, pooled, epilogue = request.bias(call.visual), request.compensation, request.epilogue
    fine = request.fine
    if values is not None:
        v, epilogue = values if permuted is None else permuted.order.permute_keys(values), None
        pooled = None if pooled is None else replace(_of_values(pooled, v, mask), first_order=None)
        fine = None if fine is None else replace(fine, pooled=_of_values(fine.pooled, v, mask))
    if bias is not None:
        bias = bias if permuted is None else permuted.order.permute_bias(bias)
        pooled = None if pooled is None else _biased(pooled, bias, mask)
        fine = None if fine is None else replace(fine, pooled=_biased(fine.pooled, bias, mask))
    options: dict[str, Any] = {"key_mask": mask if key_bias is None else None, "key_bias": key_bias, "bias": bias}
    found: torch.Tensor | tuple[torch.Tensor, torch.Tensor]
    if fine is not None:
        assert pooled is not None
        found = two_level_attention(q, k, v, request.layout, fine, pooled, scale=call.scale, **options)
    else:
        found = sparse_attention(
            q, k, v, request.layout, scale=call.scale, compensation=pooled, epilogue=epilogue,
            return_lse=values is not None, **options,
        )  # fmt: skip
    out, lse = found if isinstance(found, tuple) else (found, None)
    if permuted is None:
        return out, lse
    return permuted.unpermute(out), None if lse is None else permuted.unpermute(lse.transpose(1, 2)).transpose(1, 2)


def visual_lse(call: AttentionCall, request: Request) -> torch.Tensor | None:
    """Return the log-sum-exp (B, H, Sv) of the visual rows as the request has them computed, before any epilogue.

    ``None`` where the method computes them itself, or scales them by a denominator of its own.
    """
    if request.layout is None or request.compute_visual is not None or request.epilogue is not None:
        return None
    return visual_rows(call, request, call.v)[1]


def _of_values(pooled: Compensation, v: torch.Tensor, mask: torch.Tensor | None) -> Compensation:
    """Pooled keys with the means of other values."""
    return replace(pooled, v=block_means(v, pooled.tokens, mask).to(v.dtype))


def _biased(pooled: Compensation, bias: LogitBias, mask: torch.Tensor | None) -> Compensation:
    """Pooled keys with their factor of a bias."""
    return replace(pooled, bias=pooled_bias(bias.k, pooled.tokens, mask))


def gained(call: AttentionCall, request: Request, gain: KeyGain) -> torch.Tensor:
    """Return what a gain adds to the output of a call, (B, S, H, Dv): the part of its keys, times the factor less 1.

    Args:
        call: the attention call.
        request: its request.
        gain: keys, rows and factors.
    """
    first, last = gain.first, gain.first + gain.factors.shape[1]
    values = call.v * gain.keys.to(call.v.device)[..., None, None]
    if request.layout is None:
        bias, mask = request.bias(slice(first, last)), _mask_rows(call.mask, first, last)
        part = dense_rows(call)(call.q[:, first:last], call.k, values, mask, bias)
    else:
        part = _observed_rows(call, request, values)[0][:, first:last]
    more = gain.factors.to(part.device, torch.promote_types(part.dtype, torch.float32)) - 1.0
    added = (part * more[..., None, None]).to(part.dtype)
    return F.pad(added, (0, 0, 0, 0, first, call.q.shape[1] - last))


@torch.no_grad()
def observe(call: AttentionCall, request: Request, probe: Probe) -> Observation:
    """Measure the attention of a call as its request has it computed.

    The values of a second pass are indicators of the spans, so that its output is the attention to each of them.

    Args:
        call: the attention call.
        request: its request.
        probe: what is to be measured.
    """
    width, masses = call.v.shape[-1], []
    for columns in probe.indicators(call.k).split(width, -1):
        values = F.pad(columns, (0, width - columns.shape[-1]))[:, :, None]
        out, lse = _observed_rows(call, request, values.expand(-1, -1, call.v.shape[2], -1).contiguous())
        masses.append(out[..., : columns.shape[-1]].transpose(1, 2).to(lse.dtype))
    return probe.observation(lse, torch.cat(masses, -1))


def _observed_rows(call: AttentionCall, request: Request, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, S, H, Dv) and log-sum-exp (B, H, S) of all rows, with other values."""
    assert call.tokens is not None
    keys, visual = Request(), call.tokens.visual_range or (0, call.q.shape[1])
    has_keys = read_mask(call, keys) is None
    square = call.mask is not None and call.mask.ndim == 4 and call.mask.shape[2] != 1
    parts: list[Any] = []
    for low, high in pairwise(sorted({0, *visual, call.q.shape[1]})):
        if (low, high) == visual and request.layout is not None:
            parts.append(visual_rows(call, request, values))
        elif has_keys and (not square or (low, high) == visual):
            layout = BlockLayout.dense(high - low, call.k.shape[1], device=call.q.device)
            part = sparse_attention(
                call.q[:, low:high], call.k, values, layout, scale=call.scale, bias=request.bias(slice(low, high)),
                key_mask=keys.key_mask if keys.key_bias is None else None, key_bias=keys.key_bias, return_lse=True,
            )  # fmt: skip
            parts.append(part)
        else:
            chunks = range(low, high, ROWS_AT_ONCE)
            parts += [_plain_rows(call, request, values, row, min(high, row + ROWS_AT_ONCE)) for row in chunks]
    outs, lses = zip(*parts)
    return torch.cat(outs, 1), torch.cat(lses, 2)


def _plain_rows(
    call: AttentionCall, request: Request, values: torch.Tensor, low: int, high: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same of a few rows by their logits, whatever the mask."""
    dtype = torch.float64 if call.q.dtype == torch.float64 else torch.float32
    group = call.q.shape[2] // call.k.shape[2]
    k, v = (x.to(dtype).repeat_interleave(group, 2) for x in (call.k, values))
    logits = torch.einsum("bqhd,bkhd->bhqk", call.q[:, low:high].to(dtype), k) * call.softmax_scale
    bias, mask = request.bias(slice(low, high)), _mask_rows(call.mask, low, high)
    if bias is not None:
        product = bias.q @ bias.k.mT
        logits = logits + product.masked_fill(product <= BARRED, -math.inf)
    if mask is not None:
        logits = logits.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else logits + mask
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp().masked_fill(lse[..., None] == -math.inf, 0.0)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v), lse


def sampled_error(call: AttentionCall, request: Request, out: torch.Tensor, count: int = 64) -> float:
    """Return the relative L2 error of a result's visual rows against exact attention, on a sample of them.

    Args:
        call: the attention call.
        request: its request.
        out: (B, S, H, Dv).
        count: about how many rows are compared.
    """
    rows = call.visual
    sample = slice(rows.start, rows.stop, max(1, (rows.stop - rows.start) // count))
    mask = mask_of_keys(request, call.q.dtype)
    bias = request.bias(rows)
    if bias is not None:
        bias = LogitBias(bias.q[:, :, :: sample.step], bias.k)
    exact = dense_rows(call)(call.q[:, sample], call.k, call.v, mask, bias).float()
    return float((out[:, sample].float() - exact).norm() / exact.norm().clamp(min=1e-30))


def mask_of_keys(keys: Request | PermutedTokens, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the mask of the keys for torch's attention, (B|1, H|1, 1, S), or ``None``."""
    if keys.key_bias is not None:
        return keys.key_bias[:, :, None].to(dtype)
    return None if keys.key_mask is None else keys.key_mask[:, None, None]


def dense_rows(call: AttentionCall) -> Callable[..., torch.Tensor]:
    """Return exact attention for a few rows of ``call`` by torch's fused kernel; (B, S, H, D) in and out."""

    def dense(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, bias: LogitBias | None = None
    ) -> torch.Tensor:
        if bias is not None:
            return biased_attention(q, k, v, bias, scale=call.scale, mask=mask)
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
