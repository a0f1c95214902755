"""Optional terms of an attention call: a low-rank logit bias, compensation of skipped blocks, an epilogue.

For query n of query block i and key m::

    x_nm  = scale * q_n . k_m + key_bias_m + bias.q_n . bias.k_m                m read by n
    x~_nj = scale * q_n . kbar_j + log_weight_j (+ variance term)               virtual key j of a block that i skips
    lse_n = logsumexp over both;  Y_n = sum_m exp(x_nm - lse_n) v_m + sum_j exp(x~_nj - lse_n) vbar_j
    o_n   = (1 - blend_h) * (row_scale_i * Y_n * exp(min(lse_n - lse_ref_n, cap)) + add_i) + blend_h * v_n

A kernel may fuse all of it; :func:`with_terms` gives the same, gradients included, on top of one that knows none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels.layout import BlockLayout, ceil_div
from dit_attn.kernels.selection import block_counts, pool_blocks
from dit_attn.kernels.tiling import NONE, Problem

AT_ONCE = 24 << 20  # bytes of q, k, v and o in fp32 that are worked on together where no gradients are needed
CHUNK = 2 << 20  # bytes of logits against virtual keys that are held at a time, per batch row and head

Attend = Callable[[Problem], tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True)
class LogitBias:
    """A low-rank addition to the logits, exact in any fused kernel.

    Attributes:
        q: (B|1, H|1, Sq, R), R <= 16.
        k: (B|1, H|1, Sk, R). Natural logarithm; use a large negative number rather than ``-inf``, which 0 turns to NaN.
    """

    q: torch.Tensor
    k: torch.Tensor


@dataclass(frozen=True)
class Compensation:
    """Virtual keys that stand for the skipped blocks inside the same softmax.

    Attributes:
        k: (B, Hk, nv, D), key means of every ``tokens`` keys.
        v: (B, Hk, nv, D), their value means.
        log_weight: (B|1, H|1, nv) fp32, natural logarithm of how many keys each stands for; ``-inf`` for none.
        tokens: keys per virtual key; divides the layout's ``kv_block``.
        variance: (B, Hk, nv, D) per-channel variance of the keys, for the second-order term
            ``0.5 scale^2 sum_c q_c^2 variance_c``; ``None`` leaves it out.
        cap: largest value of that term.
    """

    k: torch.Tensor
    v: torch.Tensor
    log_weight: torch.Tensor
    tokens: int
    variance: torch.Tensor | None = None
    cap: float = 2.0


@dataclass(frozen=True)
class Epilogue:
    """What is done to the rows of the output before they are written, in this order.

    Attributes:
        row_scale: (B|1, H|1, nq) fp32, factor per query block.
        lse_ref: (B, H, Sq) fp32, natural log of a denominator to divide by instead of the row's own.
        cap: largest exponent of ``lse - lse_ref``.
        add: (B|1, H|1, nq, D), added per query block.
        blend: (B|1, H) fp32 in [0, 1], share of the query's own value; 1 returns it; no key is read then
            and the head's log-sum is ``-inf``.
        value_shift: query n's own value is row ``n + value_shift`` of v.
    """

    row_scale: torch.Tensor | None = None
    lse_ref: torch.Tensor | None = None
    cap: float = 20.0
    add: torch.Tensor | None = None
    blend: torch.Tensor | None = None
    value_shift: int = 0


@dataclass(frozen=True)
class Terms:
    """All optional terms of a call.

    Attributes:
        key_lengths: (B,) int32, keys of each sample that exist, counted from the first.
        bias, compensation, epilogue: see the classes.
    """

    key_lengths: torch.Tensor | None = None
    bias: LogitBias | None = None
    compensation: Compensation | None = None
    epilogue: Epilogue | None = None

    def __bool__(self) -> bool:
        return self != NO_TERMS

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Terms):
            return NotImplemented
        names = ("key_lengths", "bias", "compensation", "epilogue")
        return all(getattr(self, name) is getattr(other, name) for name in names)

    __hash__ = None  # type: ignore[assignment]


NO_TERMS = Terms()


def pooled_compensation(
    k: torch.Tensor,
    v: torch.Tensor,
    tokens: int,
    *,
    key_mask: torch.Tensor | None = None,
    variance: bool = False,
) -> Compensation:
    """Virtual keys from the means of every ``tokens`` keys and values.

    Args:
        k, v: (B, Sk, Hk, D).
        tokens: keys per virtual key; smaller than the selection block is better: errors fall faster than cost rises.
        key_mask: (B, Sk) bool, keys that exist; only they are averaged and counted.
        variance: also take the per-channel variance of the keys.
    """
    log_weight = torch.log(block_counts(k, tokens, key_mask))
    mean = pool_blocks(k, tokens, key_mask)
    spread = None
    if variance:
        square = pool_blocks(k.float().square(), tokens, key_mask)
        spread = (square - mean.square()).clamp(min=0.0).to(k.dtype)
    return Compensation(mean.to(k.dtype), pool_blocks(v, tokens, key_mask).to(v.dtype), log_weight, tokens, spread)


def with_terms(problem: Problem, terms: Terms, attend: Attend) -> tuple[torch.Tensor, torch.Tensor]:
    """(o, lse) of a call with terms, from an ``attend`` that knows none but returns the log-sum."""
    plain = problem
    if terms.key_lengths is not None:
        plain = replace(plain, key_mask=_mask_of(terms.key_lengths, plain))
    if terms.bias is not None:
        plain = _widened(plain, terms.bias)
    out, lse = attend(plain)
    assert lse is not None
    if terms.compensation is not None:
        out, lse = _merged(problem, terms.compensation, out, lse)
    if terms.epilogue is not None:
        out = _finished(problem, terms.epilogue, out, lse)
        if terms.epilogue.blend is not None:
            lse = lse.masked_fill((terms.epilogue.blend == 1.0)[..., None], NONE)
    return out.to(problem.q.dtype), lse


def with_terms_by_heads(problem: Problem, terms: Terms, attend: Attend) -> tuple[torch.Tensor, torch.Tensor]:
    """The same a few heads at a time, so that what the terms need besides stays small. Has no gradients."""
    q, k, v = problem.q, problem.k, problem.v
    size = max(1, AT_ONCE // (8 * (k.shape[1] + q.shape[1]) * q.shape[0] * (q.shape[3] + v.shape[3])))
    if size >= k.shape[2]:
        return with_terms(problem, terms, attend)
    out = q.new_empty(*q.shape[:3], v.shape[3])
    wide = torch.promote_types(q.dtype, torch.float32)
    lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], device=q.device, dtype=wide)
    for low in range(0, k.shape[2], size):
        keys = slice(low, min(low + size, k.shape[2]))
        heads = slice(keys.start * problem.ratio, keys.stop * problem.ratio)
        part = replace(
            problem, q=q[:, :, heads], k=k[:, :, keys], v=v[:, :, keys], layout=problem.layout.of_heads(heads),
            key_bias=_of(problem.key_bias, heads),
        )  # fmt: skip
        out[:, :, heads], lse[:, heads] = with_terms(part, _terms_of(terms, heads, keys), attend)
    return out, lse


def _terms_of(terms: Terms, heads: slice, keys: slice) -> Terms:
    """The terms of some query heads and of the key heads they read."""
    bias, comp, end = terms.bias, terms.compensation, terms.epilogue
    if bias is not None:
        bias = LogitBias(_of(bias.q, heads), _of(bias.k, heads))
    if comp is not None:
        comp = replace(
            comp, k=comp.k[:, keys], v=comp.v[:, keys], log_weight=_of(comp.log_weight, heads),
            variance=None if comp.variance is None else comp.variance[:, keys],
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
    """(B, Sk) bool."""
    exists = torch.arange(problem.k.shape[1], device=lengths.device) < lengths[:, None]
    return exists if problem.key_mask is None else exists & problem.key_mask


def _widened(problem: Problem, bias: LogitBias) -> Problem:
    """The same logits with the bias as extra channels of q and k, in fp32: a bias of 8 bits would not be exact."""
    q, k, scale = problem.q, problem.k, problem.scale
    if problem.ratio > 1:  # the bias is per query head
        k = k.repeat_interleave(problem.ratio, 2)
    v = problem.v.repeat_interleave(problem.ratio, 2) if problem.ratio > 1 else problem.v
    dtype = q.dtype if q.dtype == torch.float64 else torch.float32

    def columns(x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).to(dtype).expand(like.shape[0], -1, like.shape[2], -1)

    q = torch.cat([q.to(dtype), columns(bias.q, q) / scale], -1)
    k = torch.cat([k.to(dtype), columns(bias.k, k)], -1)
    return replace(problem, q=q, k=k, v=v.to(dtype))


def _merged(
    problem: Problem, comp: Compensation, out: torch.Tensor, lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Selected keys (out, lse) and virtual keys in one softmax, a few query rows at a time."""
    q, wide = problem.q, lse.dtype
    kc, vc = (x.to(wide).repeat_interleave(problem.ratio, 1) for x in (comp.k, comp.v))
    spread = None if comp.variance is None else comp.variance.to(wide).repeat_interleave(problem.ratio, 1)
    read = virtual_mask(problem.layout, comp)
    added = comp.log_weight[:, :, None].to(wide).masked_fill(read, NONE)  # (B|1, H|1, nq, nv)
    q_block = problem.layout.q_block
    step = max(1, CHUNK // (4 * comp.k.shape[2] * q.shape[0] * q.shape[2]) // q_block) * q_block
    inputs = (q, out, comp.k, comp.v, comp.log_weight, comp.variance)
    tracked = torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)
    parts, sums = [], []
    merged, total_of = (None, None) if tracked else (torch.empty_like(out, dtype=wide), torch.empty_like(lse))
    for low in range(0, q.shape[1], step):
        rows = q[:, low : low + step].transpose(1, 2).to(wide) * problem.scale
        s = rows @ kc.transpose(-1, -2)
        if spread is not None:
            s = s + (0.5 * rows.square() @ spread.transpose(-1, -2)).clamp(max=comp.cap)
        s = _plus(s, added[:, :, low // q_block : ceil_div(low + rows.shape[2], q_block)], q_block, tracked)
        own = lse[:, :, low : low + step, None]
        if merged is not None and total_of is not None:  # in place: small pieces would leave the heap in holes
            here = slice(low, low + step)
            _merge_rows(s, vc, own, out[:, here], merged[:, here], total_of[:, :, here])
            continue
        total = torch.logsumexp(torch.cat([s, own], -1), -1, keepdim=True)
        safe = total.masked_fill(total == NONE, 0.0)
        share = torch.exp(own - safe).transpose(1, 2)
        parts.append(out[:, low : low + step] * share + (torch.exp(s - safe) @ vc).transpose(1, 2))
        sums.append(total[..., 0])
    if merged is None or total_of is None:
        return torch.cat(parts, 1), torch.cat(sums, 2)
    return merged, total_of


def _plus(s: torch.Tensor, added: torch.Tensor, q_block: int, tracked: bool) -> torch.Tensor:
    """Logits (B, H, rows, nv) plus (B|1, H|1, blocks, nv) of each block of rows; written to ``s`` if untracked."""
    if not tracked and s.shape[2] % q_block == 0:
        s.unflatten(2, (-1, q_block)).add_(added[:, :, :, None])
        return s
    added = added.repeat_interleave(q_block, 2)[:, :, : s.shape[2]]
    return s + added if tracked else s.add_(added)


def _merge_rows(
    s: torch.Tensor, values: torch.Tensor, own: torch.Tensor, out: torch.Tensor, merged: torch.Tensor, lse: torch.Tensor
) -> None:
    """Merge rows ``out`` (B, rows, H, D) of log-sum ``own`` (B, H, rows, 1) with virtual keys; overwrites ``s``.

    Args:
        s: (B, H, rows, nv) logits of the virtual keys.
        values: (B, H, nv, D).
        own, out: what the read keys gave.
        merged, lse: where the result and its log-sum (B, H, rows) are written.
    """
    top = torch.maximum(s.amax(-1, keepdim=True), own)
    top.masked_fill_(top == NONE, 0.0)
    share = torch.exp(own - top)
    total = s.sub_(top).exp_().sum(-1, keepdim=True).add_(share)
    lse.copy_((top + total.log())[..., 0])
    inverse = total.masked_fill(total == 0.0, 1.0).reciprocal_()
    rest = torch.matmul(s, values).mul_(inverse)
    torch.addcmul(rest.transpose(1, 2), out, share.mul_(inverse).transpose(1, 2), out=merged)


def virtual_mask(layout: BlockLayout, comp: Compensation) -> torch.Tensor:
    """(B|1, H|1, nq, nv) bool, True where the virtual key's block is read, so that it must not count twice."""
    per_block = layout.kv_block // comp.tokens
    return layout.block_mask().repeat_interleave(per_block, -1)[..., : comp.k.shape[2]]


def _finished(problem: Problem, end: Epilogue, out: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """The epilogue on o (B, Sq, H, D) in the precision of the log-sum."""
    block = problem.layout.q_block
    out = out.to(lse.dtype)

    def per_token(x: torch.Tensor, dim: int) -> torch.Tensor:
        return x.repeat_interleave(block, dim).narrow(dim, 0, problem.q.shape[1])

    if end.row_scale is not None:
        out = out * per_token(end.row_scale, 2).transpose(1, 2)[..., None]
    if end.lse_ref is not None:
        change = torch.exp((lse - end.lse_ref).clamp(max=end.cap)).masked_fill(lse == NONE, 0.0)
        out = out * change.transpose(1, 2)[..., None]
    if end.add is not None:
        out = out + per_token(end.add, 2).transpose(1, 2)
    if end.blend is not None:
        tau = end.blend[:, None, :, None].to(out.dtype)
        own = problem.v.narrow(1, end.value_shift, problem.q.shape[1]).to(out.dtype)
        own = own.repeat_interleave(problem.ratio, 2) if problem.ratio > 1 else own
        out = torch.where(tau == 1.0, own, (1.0 - tau) * out + tau * own)
    return out


def check_terms(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout, terms: Terms) -> None:
    """Raise for the first term that does not fit the call.

    Raises:
        DitAttnError: a shape, a size or a combination; the message names the argument and the fix.
    """
    sizes = {
        "B": q.shape[0], "H": q.shape[2], "Hk": k.shape[2], "Sq": q.shape[1], "Sk": k.shape[1],
        "D": v.shape[-1], "nq": layout.nq,
    }  # fmt: skip
    lengths, bias, comp, end = terms.key_lengths, terms.bias, terms.compensation, terms.epilogue
    for name, x in _tensors(terms):
        if x.device != q.device:
            raise DitAttnError(f"{name} is on {x.device} and q on {q.device}; move it")
        if x.is_floating_point() != (name != "key_lengths") or x.dtype == torch.bool:
            kind = "ints" if name == "key_lengths" else "floating-point numbers"
            raise DitAttnError(f"{name} must hold {kind}, got {str(x.dtype).removeprefix('torch.')}; cast it")
    if lengths is not None:
        _fits("key_lengths", lengths, ("B",), sizes)
    if bias is not None:
        if bias.q.shape[-1:] != bias.k.shape[-1:] or not 1 <= bias.q.shape[-1] <= 16:
            raise DitAttnError(
                f"bias.q {tuple(bias.q.shape)} and bias.k {tuple(bias.k.shape)} must share their last size, 1 to 16; "
                "merge columns"
            )
        sizes["R"] = bias.q.shape[-1]
        _fits("bias.q", bias.q, ("B|1", "H|1", "Sq", "R"), sizes)
        _fits("bias.k", bias.k, ("B|1", "H|1", "Sk", "R"), sizes)
    if comp is not None:
        if comp.tokens < 1 or layout.kv_block % comp.tokens:
            raise DitAttnError(
                f"compensation.tokens must divide the layout's kv_block {layout.kv_block}, got {comp.tokens}; "
                "pool again with a divisor"
            )
        if v.shape[-1] != q.shape[-1]:
            raise DitAttnError(f"compensation needs v's head size {v.shape[-1]} to equal q's {q.shape[-1]}")
        sizes["nv"] = ceil_div(k.shape[1], comp.tokens)
        for name in ("k", "v", "variance"):
            x = getattr(comp, name)
            if x is not None:
                _fits(f"compensation.{name}", x, ("B", "Hk", "nv", "D"), sizes)
        _fits("compensation.log_weight", comp.log_weight, ("B|1", "H|1", "nv"), sizes)
    if end is not None:
        shapes = {
            "row_scale": ("B|1", "H|1", "nq"), "lse_ref": ("B", "H", "Sq"), "add": ("B|1", "H|1", "nq", "D"),
            "blend": ("B|1", "H"),
        }  # fmt: skip
        for name, shape in shapes.items():
            x = getattr(end, name)
            if x is not None:
                _fits(f"epilogue.{name}", x, shape, sizes)
        if end.blend is not None and not 0 <= end.value_shift <= k.shape[1] - q.shape[1]:
            raise DitAttnError(
                f"epilogue.value_shift {end.value_shift} leaves no own value for some of {q.shape[1]} queries among "
                f"{k.shape[1]} keys; it is for self attention, give the first query's place among the keys"
            )


def _tensors(terms: Terms) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the terms, under the name it is passed by."""
    if terms.key_lengths is not None:
        yield "key_lengths", terms.key_lengths
    for name in ("bias", "compensation", "epilogue"):
        term = getattr(terms, name)
        for field in () if term is None else fields(term):
            x = getattr(term, field.name)
            if isinstance(x, torch.Tensor):
                yield f"{name}.{field.name}", x


def _fits(name: str, x: torch.Tensor, shape: tuple[str, ...], sizes: dict[str, int]) -> None:
    wanted = [{1, sizes[axis[:-2]]} if axis.endswith("|1") else {sizes[axis]} for axis in shape]
    if x.ndim != len(shape) or any(size not in allowed for size, allowed in zip(x.shape, wanted)):
        known = ", ".join(f"{axis.removesuffix('|1')}={sizes[axis.removesuffix('|1')]}" for axis in shape)
        raise DitAttnError(f"{name} must be ({', '.join(shape)}) with {known}, got {tuple(x.shape)}")
