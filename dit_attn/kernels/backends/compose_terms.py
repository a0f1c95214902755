"""The optional terms of a call, composed around an attention function that has none.

:func:`with_terms` has gradients; :func:`with_terms_in_place` completes the result in its own memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from dit_attn.kernels.backends.gather.workspace import Workspace, borrow_workspace
from dit_attn.kernels.device import chunk_sizes
from dit_attn.kernels.layouts.block_layout import BlockLayout
from dit_attn.kernels.problem import NEG_INF, Problem
from dit_attn.kernels.terms import BARRED, Compensation, Epilogue, LogitBias, Terms

Attend = Callable[[Problem], tuple[torch.Tensor, torch.Tensor | None]]


def with_terms(problem: Problem, terms: Terms, attend: Attend) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute (o, lse) of a call with terms from an attention function that has none but returns the LSE.

    Args:
        problem, terms: the call.
        attend: computes (o, lse) of a problem.
    """
    plain = _existing(problem, terms)
    if terms.bias is not None:
        plain = _widened(plain, terms.bias)
    out, lse = attend(plain)
    assert lse is not None
    if terms.bias is not None:
        barred = lse <= BARRED
        out, lse = out.masked_fill(_by_row(barred), 0.0), lse.masked_fill(barred, NEG_INF)
    out, lse = _completed(problem, terms, out, lse)
    return out.to(problem.q.dtype), lse


def with_terms_in_place(problem: Problem, terms: Terms, attend: Attend) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the same in place, where ``attend`` supports ``Problem.low_rank``. Has no gradients.

    The result is completed a few rows and heads at a time, so that no other tensor of the size of q, k or v is needed.
    """
    plain = _existing(problem, terms)
    if terms.bias is not None:
        plain = replace(plain, low_rank=(terms.bias.q, terms.bias.k))
    out, lse = attend(plain)
    assert lse is not None
    if terms.bias is not None:
        barred = lse <= BARRED
        out.masked_fill_(_by_row(barred), 0.0)
        lse.masked_fill_(barred, NEG_INF)
    comp, end, layout = terms.compensation, terms.epilogue, problem.layout
    if comp is None and end is None:
        return out, lse
    number, pooled = 4 * problem.q.shape[0] * problem.ratio, 0 if comp is None else comp.k.shape[2]  # bytes; keys
    limit, dim = chunk_sizes(out.device).pooled, out.shape[-1]
    at_once = max(1, limit // max(number * layout.q_block * max(pooled, 4 * dim), 1))  # query blocks x key heads
    size = min(problem.k.shape[2], at_once, max(1, limit // max(3 * number * dim * pooled, 1)))
    step = at_once // size
    for low in range(0, problem.k.shape[2], size):
        some, few, heads = _heads_of(problem, terms, slice(low, min(low + size, problem.k.shape[2])))
        if few.compensation is not None:
            _merge_in_place(some, few, out[:, :, heads], lse[:, heads], step)
        for first in range(0, layout.nq, step) if end is not None else ():
            chunk, ends = rows_of(some, few, first, first + step)
            rows = slice(first * layout.q_block, first * layout.q_block + chunk.q.shape[1])
            assert ends.epilogue is not None
            out[:, rows, heads] = _finished(chunk, ends.epilogue, out[:, rows, heads], lse[:, heads, rows])
    return out, lse if end is None else _masked_lse(lse, end)


def _existing(problem: Problem, terms: Terms) -> Problem:
    """The call with ``key_lengths`` as a key mask."""
    return problem if terms.key_lengths is None else replace(problem, key_mask=_mask_of(terms.key_lengths, problem))


def _completed(
    problem: Problem, terms: Terms, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Add pooled keys and the epilogue to the result of the selected keys."""
    if terms.compensation is not None:
        out, lse = _merged(problem, terms, out, lse)
    if terms.epilogue is not None:
        out, lse = _finished(problem, terms.epilogue, out, lse), _masked_lse(lse, terms.epilogue)
    return out, lse


def _masked_lse(lse: torch.Tensor, end: Epilogue) -> torch.Tensor:
    """The LSE (B, H, Sq), ``-inf`` for heads that return their own value."""
    return lse if end.blend is None else lse.masked_fill((end.blend == 1.0)[..., None], NEG_INF)


def _heads_of(problem: Problem, terms: Terms, keys: slice) -> tuple[Problem, Terms, slice]:
    """The call of some key heads and of the query heads that attend to them; and the range of the latter."""
    heads = slice(keys.start * problem.ratio, keys.stop * problem.ratio)
    some = replace(
        problem, q=problem.q[:, :, heads], k=problem.k[:, :, keys], v=problem.v[:, :, keys],
        layout=problem.layout.of_heads(heads), key_bias=_of(problem.key_bias, heads),
    )  # fmt: skip
    return some, _terms_of(terms, heads, keys), heads


def rows_of(problem: Problem, terms: Terms, first: int, last: int) -> tuple[Problem, Terms]:
    """Restrict a call to the queries of blocks ``first:last``."""
    layout = problem.layout
    rows = slice(first * layout.q_block, min(last * layout.q_block, layout.q_len))
    blocks = slice(first, last)
    lists = BlockLayout(
        layout.q_block, layout.kv_block, rows.stop - rows.start, layout.kv_len,
        layout.kv_indices[:, :, blocks], layout.kv_num_blocks[:, :, blocks],
        full_kv_num_blocks=None if layout.full_kv_num_blocks is None else layout.full_kv_num_blocks[:, :, blocks],
        elements=None if layout.elements is None else layout.elements.from_block(first, layout.q_block),
    )  # fmt: skip
    bias, comp, end = terms.bias, terms.compensation, terms.epilogue
    if bias is not None:
        bias = replace(bias, q=bias.q[:, :, rows])
    if comp is not None and comp.left_out is not None:
        comp = replace(comp, left_out=comp.left_out[:, :, blocks])
    if end is not None:
        end = replace(
            end,
            row_scale=None if end.row_scale is None else end.row_scale[:, :, blocks],
            lse_ref=None if end.lse_ref is None else end.lse_ref[:, :, rows],
            add=None if end.add is None else end.add[:, :, blocks],
            value_shift=end.value_shift + rows.start,
        )
    found = replace(terms, bias=bias, compensation=comp, epilogue=end)
    return replace(problem, q=problem.q[:, rows], layout=lists), found


def _terms_of(terms: Terms, heads: slice, keys: slice) -> Terms:
    """The terms of some query heads and of the key heads they attend to."""
    bias, comp, end = terms.bias, terms.compensation, terms.epilogue
    if bias is not None:
        bias = LogitBias(_of(bias.q, heads), _of(bias.k, heads))
    if comp is not None:
        comp = replace(
            comp, k=comp.k[:, keys], v=comp.v[:, keys], log_weight=_of(comp.log_weight, heads),
            variance=None if comp.variance is None else comp.variance[:, keys], bias=_of(comp.bias, heads),
            left_out=_of(comp.left_out, heads),
            first_order=None if comp.first_order is None else comp.first_order[:, keys],
        )  # fmt: skip
    if end is not None:
        end = replace(
            end, row_scale=_of(end.row_scale, heads), lse_ref=_of(end.lse_ref, heads), add=_of(end.add, heads),
            blend=_of(end.blend, heads),
        )  # fmt: skip
    return Terms(terms.key_lengths, bias, comp, end)


def _of(x: torch.Tensor | None, heads: slice) -> Any:
    """Some heads of a (B|1, H|1, ...) tensor."""
    return x if x is None or x.shape[1] == 1 else x[:, heads]


def _mask_of(lengths: torch.Tensor, problem: Problem) -> torch.Tensor:
    """The keys that exist, (B, Sk) bool."""
    exists = torch.arange(problem.k.shape[1], device=lengths.device) < lengths[:, None]
    return exists if problem.key_mask is None else exists & problem.key_mask


def _widened(problem: Problem, bias: LogitBias) -> Problem:
    """The same logits with the bias as extra channels of q and k, in fp32 because bf16 would round the bias."""
    q, k = problem.q, problem.k
    if problem.ratio > 1:  # the bias is per query head
        k = k.repeat_interleave(problem.ratio, 2)
    v = problem.v.repeat_interleave(problem.ratio, 2) if problem.ratio > 1 else problem.v
    dtype = q.dtype if q.dtype == torch.float64 else torch.float32

    def columns(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).to(dtype).expand(like.shape[0], -1, like.shape[2], -1)

    q = torch.cat([q.to(dtype) * problem.scale, columns(bias.q, q)], -1)
    k = torch.cat([k.to(dtype), columns(bias.k, k)], -1)
    return replace(problem, q=q, k=k, v=v.to(dtype), scale=1.0)


def _by_row(rows: torch.Tensor) -> torch.Tensor:
    """(B, H, Sq) as (B, Sq, H, 1)."""
    return rows.transpose(1, 2)[..., None]


@dataclass(frozen=True)
class _PooledKeys:
    """The pooled keys of a call, prepared for its queries.

    Attributes:
        problem, comp: the call and its compensation.
        keys, values, variance: (B, H, nv, D) keys, values and variances in the dtype of the LSE.
        attended: (B|1, H|1, nq, nk) bool, key blocks that are attended to or left out, whose pooled keys are masked.
        weight: (B|1, H|1, 1, nv).
        bias: factors (B|1, H|1, Sq, R) and (B|1, H|1, nv, R) of a low-rank bias, or ``None``.
        slope: (B, H, D, D) first-order term, or ``None``.
    """

    problem: Problem
    comp: Compensation
    keys: torch.Tensor
    values: torch.Tensor
    variance: torch.Tensor | None
    attended: torch.Tensor
    weight: torch.Tensor
    bias: tuple[torch.Tensor, torch.Tensor] | None
    slope: torch.Tensor | None

    @classmethod
    def of(cls, problem: Problem, terms: Terms, wide: torch.dtype) -> _PooledKeys:
        comp, bias = terms.compensation, None
        assert comp is not None
        if terms.bias is not None and comp.bias is not None:
            bias = (terms.bias.q.to(wide), comp.bias.to(wide))
        keys, values = (_repeated(x.to(wide), problem.ratio) for x in (comp.k, comp.v))
        variance = None if comp.variance is None else _repeated(comp.variance.to(wide), problem.ratio)
        weight = comp.log_weight[:, :, None].to(wide)
        masked = problem.layout.block_mask()
        if comp.left_out is not None:
            masked = masked | comp.left_out
        slope = None if comp.first_order is None else _repeated(comp.first_order.to(wide), problem.ratio)
        return cls(problem, comp, keys, values, variance, masked, weight, bias, slope)

    def tail(self, q: torch.Tensor) -> torch.Tensor | None:
        """First-order term (B, H, rows, D) of queries (B, rows, H, D) for a weight of 1, or ``None``."""
        if self.slope is None:
            return None
        return q.transpose(1, 2).to(self.slope.dtype) * self.problem.scale @ self.slope

    def logits(self, q: torch.Tensor, blocks: slice, workspace: Workspace | None = None) -> torch.Tensor:
        """Compute logits (B, H, rows, nv) for queries (B, rows, H, D) of some blocks, ``-inf`` for masked keys.

        With ``workspace`` the result lies in its buffers and is overwritten by the next call.
        """
        layout, cap = self.problem.layout, self.comp.cap
        scaled = q.transpose(1, 2).to(self.keys.dtype) * self.problem.scale
        s = _product(scaled, self.keys, "s", workspace)
        if self.variance is not None:
            term = _product(0.5 * scaled.square(), self.variance, "k", workspace)
            s = _plus(s, term.clamp(max=cap) if term.requires_grad else term.clamp_(max=cap))
        if self.bias is not None:
            first = blocks.start * layout.q_block
            term = self.bias[0][:, :, first : first + q.shape[1]] @ self.bias[1].mT
            s = _plus(s, term.masked_fill(term <= BARRED, NEG_INF))
        added = self.weight.masked_fill(_of_pooled(self.attended[:, :, blocks], layout, self.comp), NEG_INF)
        if s.shape[2] % layout.q_block == 0:
            return _plus(s.unflatten(2, (-1, layout.q_block)), added[:, :, :, None]).flatten(2, 3)
        return _plus(s, added.repeat_interleave(layout.q_block, 2)[:, :, : s.shape[2]])


def _merged(problem: Problem, terms: Terms, out: torch.Tensor, lse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Merge selected keys (out, lse) and pooled keys into one softmax, some query blocks at a time.

    Where gradients may be requested, the logits of each chunk are recomputed for them instead of stored.
    """
    pooled, layout = _PooledKeys.of(problem, terms, lse.dtype), problem.layout
    each = 4 * pooled.comp.k.shape[2] * lse.shape[0] * lse.shape[1] * layout.q_block
    step = max(1, chunk_sizes(out.device).pooled // max(each, 1))
    rows = step * layout.q_block
    recompute = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    outs, sums = [], []
    for i, chunk in enumerate(zip(problem.q.split(rows, 1), out.split(rows, 1), lse.split(rows, 2))):
        chunk_args = (pooled, slice(i * step, (i + 1) * step), *chunk)
        if recompute:
            merged, total = checkpoint(_merged_rows, *chunk_args, use_reentrant=False, preserve_rng_state=False)
        else:
            merged, total = _merged_rows(*chunk_args)
        outs.append(merged)
        sums.append(total)
    return torch.cat(outs, 1), torch.cat(sums, 2)


def _merged_rows(
    pooled: _PooledKeys, blocks: slice, q: torch.Tensor, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    s, own = pooled.logits(q, blocks), lse[..., None]
    both = torch.cat([s, own], -1)
    empty = both.amax(-1, keepdim=True) == NEG_INF  # the gradient of their log-sum-exp would be NaN
    safe = torch.logsumexp(both.masked_fill(empty, 0.0), -1, keepdim=True).masked_fill(empty, 0.0)
    fraction = torch.exp(own - safe).transpose(1, 2)
    total = safe.masked_fill(empty, NEG_INF)
    weights = torch.exp(s - safe)
    rest, tail = weights @ pooled.values, pooled.tail(q)
    if tail is not None:
        rest = rest + tail * weights.sum(-1, keepdim=True)
    return out * fraction + rest.transpose(1, 2), total[..., 0]


def _merge_in_place(problem: Problem, terms: Terms, out: torch.Tensor, lse: torch.Tensor, step: int) -> None:
    """Merge them in place into out (B, Sq, H, D) and lse (B, H, Sq), ``step`` query blocks at a time."""
    pooled, layout = _PooledKeys.of(problem, terms, lse.dtype), problem.layout
    with borrow_workspace() as workspace:
        for first in range(0, layout.nq, step):
            rows = slice(first * layout.q_block, min((first + step) * layout.q_block, layout.q_len))
            s, own = pooled.logits(problem.q[:, rows], slice(first, first + step), workspace), lse[:, :, rows, None]
            top = torch.maximum(s.amax(-1, keepdim=True), own)
            top.masked_fill_(top == NEG_INF, 0.0)
            fraction = torch.exp(own - top)
            skipped = s.sub_(top).exp_().sum(-1, keepdim=True)
            total = skipped + fraction
            lse[:, :, rows] = (top + total.log())[..., 0]
            inverse = total.masked_fill(total == 0.0, 1.0).reciprocal_()
            rest, tail = torch.matmul(s, pooled.values), pooled.tail(problem.q[:, rows])
            if tail is not None:
                rest += tail * skipped
            rest = rest.mul_(inverse).transpose(1, 2)
            out[:, rows] = rest.addcmul_(out[:, rows].to(rest.dtype), fraction.mul_(inverse).transpose(1, 2))


def _product(a: torch.Tensor, b: torch.Tensor, name: str, workspace: Workspace | None) -> torch.Tensor:
    """a b^T, in a buffer of the workspace if there is one."""
    shape = (*a.shape[:-1], b.shape[-2])
    return torch.matmul(a, b.mT, out=None if workspace is None else workspace.get(name, a.dtype, a.device, *shape))


def _plus(s: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
    """The sum, in place where no gradient is needed."""
    return s + term if s.requires_grad or term.requires_grad else s.add_(term)


def _repeated(x: torch.Tensor, ratio: int) -> torch.Tensor:
    """(B, Hk, ...) repeated for every query head; no copy if they are equally many."""
    return x.repeat_interleave(ratio, 1) if ratio > 1 else x


def _of_pooled(attended: torch.Tensor, layout: BlockLayout, comp: Compensation) -> torch.Tensor:
    """(B|1, H|1, n, nv) bool, True where the block of the pooled key is attended to, so it must not count twice.

    Args:
        attended: (B|1, H|1, n, nk) bool, the key blocks of some query blocks.
        layout: their layout.
        comp: the pooled keys.
    """
    return attended.repeat_interleave(layout.kv_block // comp.tokens, -1)[..., : comp.k.shape[2]]


def _finished(problem: Problem, end: Epilogue, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Apply the epilogue to o (B, Sq, H, D), in the dtype of the LSE."""
    block = problem.layout.q_block
    out = out.to(lse.dtype)

    def per_token(x: torch.Tensor, dim: int) -> torch.Tensor:
        return x.repeat_interleave(block, dim).narrow(dim, 0, problem.q.shape[1])

    if end.row_scale is not None:
        out = out * per_token(end.row_scale, 2).transpose(1, 2)[..., None]
    if end.lse_ref is not None:
        change = torch.exp((lse - end.lse_ref).clamp(max=end.cap)).masked_fill(lse == NEG_INF, 0.0)
        out = out * change.transpose(1, 2)[..., None]
    if end.add is not None:
        out = out + per_token(end.add, 2).transpose(1, 2)
    if end.blend is not None:
        tau = end.blend[:, None, :, None].to(out.dtype)
        own = problem.v.narrow(1, end.value_shift, problem.q.shape[1]).to(out.dtype)
        own = own.repeat_interleave(problem.ratio, 2) if problem.ratio > 1 else own
        out = torch.where(tau == 1.0, own, (1.0 - tau) * out + tau * own)
    return out
