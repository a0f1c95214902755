"""Perturb attention: replace the attention matrix of some heads in the perturbed pass of a guidance method.

The replacement R is row-stochastic, and a blend of two attention matrices is the blend of their outputs, so that no
matrix is ever built: ``((1 - u) A + u R) V = (1 - u) A V + u R V``. With R = I the second part is V itself.

Targets and their source: ``identity`` (PAG, arXiv 2403.17377; blended per head: SoftPAG, arXiv 2506.10978, eq. 7),
``uniform`` (the mean of the values), ``mean-query`` and ``blurred-query`` (SEG, arXiv 2408.00760).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
import torch.nn.functional as F

from dit_attn.errors import DitAttnError
from dit_attn.kernels.dense import dense_with_lse
from dit_attn.processors.core import executor
from dit_attn.processors.core.call import AttentionCall, Request

TARGETS = ("identity", "uniform", "mean-query", "blurred-query")
JOINTS = ("joint", "image-rows", "ii-logit-mask", "ii-mass-to-diagonal")
INFINITE_SIGMA = 9999.0  # a blur wider than this is the mean over all visual tokens


@dataclass(frozen=True)
class Perturbation:
    """Perturbation of the layers in one perturbed pass.

    Attributes:
        strengths: strength by head of every perturbed layer, by the layer's name.
        target: one of ``TARGETS``.
        joint: meaning of the identity on a joint sequence, one of ``JOINTS``.
        sigma: standard deviation of the query blur in tokens, for ``blurred-query``.
        skipped: blocks that are skipped, by module path.
    """

    strengths: dict[str, dict[int, float]]
    target: str = "identity"
    joint: str = "joint"
    sigma: float = math.inf
    skipped: tuple[str, ...] = ()

    @property
    def empty(self) -> bool:
        """Whether the perturbed pass would equal the plain one."""
        return not self.strengths and not self.skipped

    @property
    def row_wise(self) -> bool:
        """Whether a row's result depends on nothing but that row."""
        return self.target == "identity" and self.joint == "joint"

    def apply(self, call: AttentionCall, out: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Return the perturbed result of an attention call.

        Args:
            call: the call; q, k, v (B, S, H, D).
            out: its plain result (B, S, H, Dv).
            first: batch rows before this one are unchanged.

        Returns:
            (B, S, H, Dv); ``out`` itself where nothing changes.
        """
        strengths = self.strengths.get(call.layer.name)
        if not strengths or call.q.shape[1] != call.k.shape[1] or first >= out.shape[0]:
            return out
        rows = _rows(call, self.joint)
        heads = torch.tensor(list(strengths), device=out.device)
        u = torch.tensor(list(strengths.values()), device=out.device, dtype=wide(out[:0]).dtype)[:, None]
        target = _TARGETS[self.target](self, _Heads(call, heads, first), rows)
        here = (slice(first, None), slice(*rows), heads)
        changed = out.clone()  # the stock path may have returned a view of something shared
        changed[here] = torch.lerp(wide(out[here]), wide(target), u).to(out.dtype)
        return changed


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in float32, or in float64 where it is."""
    return x if x.dtype == torch.float64 else x.float()


def _rows(call: AttentionCall, joint: str) -> tuple[int, int]:
    """First and last + 1 row that is perturbed."""
    if joint == "joint":
        return 0, call.q.shape[1]
    if call.tokens is None or call.tokens.visual_range is None:
        raise DitAttnError(
            f"joint={joint!r} needs the visual tokens of {call.layer.name}, which are unknown for this input; "
            "use joint='joint'"
        )
    return call.tokens.visual_range


class _Heads:
    """The perturbed heads of an attention call, from one batch row on; each tensor is sliced at first use."""

    def __init__(self, call: AttentionCall, heads: torch.Tensor, first: int) -> None:
        self.call, self.heads, self.batch = call, heads, slice(first, None)
        self.scale = call.scale if call.scale is not None else call.q.shape[-1] ** -0.5

    @cached_property
    def q(self) -> torch.Tensor:
        """(B, S, n, D)."""
        return self.call.q[self.batch][:, :, self.heads]

    @cached_property
    def k(self) -> torch.Tensor:
        """(B, S, n, D), repeated where several heads share keys."""
        return self.call.k[self.batch][:, :, self._groups]

    @cached_property
    def v(self) -> torch.Tensor:
        """(B, S, n, Dv)."""
        return self.call.v[self.batch][:, :, self._groups]

    @cached_property
    def mask(self) -> torch.Tensor | None:
        """The model's mask of these batch rows."""
        mask = self.call.mask
        return mask if mask is None or mask.shape[0] == 1 else mask[self.batch]

    @cached_property
    def keys(self) -> Request:
        """The mask as keys that exist and as a bias on their logits.

        Raises:
            DitAttnError: it is no mask of single keys.
        """
        request = Request()
        sliced = {name: getattr(self.call, name)[self.batch] for name in ("q", "k", "v")}
        call = replace(self.call, **sliced, mask=self.mask)
        reason = executor.read_mask(call, request)
        if reason is not None:
            raise DitAttnError(
                f"this perturbation weights single keys, and {call.layer.name} has a {reason}; use SoftPAG with "
                "target='identity' and joint='joint' or 'image-rows'"
            )
        return request

    @cached_property
    def bias(self) -> torch.Tensor | None:
        """(B, 1|n, S), added to the logits; ``None`` for nothing."""
        if self.keys.key_bias is not None:
            return self.keys.key_bias.expand(-1, self.call.q.shape[2], -1)[:, self.heads]
        if self.keys.key_mask is None:
            return None
        mask = self.keys.key_mask[:, None]
        return torch.zeros(mask.shape, device=mask.device).masked_fill(~mask, -math.inf)

    def logits(self, q: torch.Tensor, keys: slice) -> torch.Tensor:
        """Return the logits (B, n, rows, keys) of queries (B, rows, n, D) and some keys, with the model's mask."""
        scores = torch.einsum("bqhd,bkhd->bhqk", wide(q), wide(self.k[:, keys])) * self.scale
        return scores if self.bias is None else scores + self.bias[:, :, None, keys]

    @property
    def _groups(self) -> torch.Tensor:
        return self.heads // (self.call.q.shape[2] // self.call.k.shape[2])


def _identity(perturbation: Perturbation, part: _Heads, rows: tuple[int, int]) -> torch.Tensor:
    return _JOINTS[perturbation.joint](part, rows)


def _values(part: _Heads, rows: tuple[int, int]) -> torch.Tensor:
    """Every row attends to itself alone, image rows not to the text either."""
    return part.v[:, slice(*rows)]


def _logit_mask(part: _Heads, rows: tuple[int, int]) -> torch.Tensor:
    """A softmax over the row itself and all tokens that are not visual, as in diffusers' PAG pipeline for SD3."""
    own, others = _own_and_others(part, rows)
    logits = torch.cat([own, others], -1)
    nothing = logits.amax(-1, keepdim=True) == -math.inf
    logits[..., :1].masked_fill_(nothing, 0.0)  # padding without text attends to itself
    weights = torch.softmax(logits, -1)
    return _mixed(part, rows, weights[..., :1], weights[..., 1:])


def _mass_to_diagonal(part: _Heads, rows: tuple[int, int]) -> torch.Tensor:
    """The row's mass on the visual tokens moves to itself; its weights on the text stay."""
    _, others = _own_and_others(part, rows)
    q = part.q[:, slice(*rows)]
    bias = None if part.bias is None else part.bias.expand(-1, q.shape[2], -1)
    _, lse = dense_with_lse(q, part.k, part.v, scale=part.scale, key_bias=bias)
    weights = torch.exp(others - lse[..., None])
    return _mixed(part, rows, 1.0 - weights.sum(-1, keepdim=True), weights)


def _own_and_others(part: _Heads, rows: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (B, n, rows, 1) of every visual row with itself, and (B, n, rows, others) with all other tokens."""
    q, k = wide(part.q[:, slice(*rows)]), wide(part.k[:, slice(*rows)])
    own = (q * k).sum(-1).transpose(1, 2)[..., None] * part.scale
    if part.bias is not None:
        own = own + part.bias[:, :, slice(*rows), None]
    before, after = slice(0, rows[0]), slice(rows[1], None)
    return own, torch.cat([part.logits(part.q[:, slice(*rows)], keys) for keys in (before, after)], -1)


def _mixed(part: _Heads, rows: tuple[int, int], own: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """(B, rows, n, Dv): the row's own value and the values of the tokens that are not visual, weighted."""
    values = wide(torch.cat([part.v[:, : rows[0]], part.v[:, rows[1] :]], 1))
    mixed = torch.einsum("bhqk,bkhd->bqhd", others, values)
    return mixed + own.transpose(1, 2) * wide(part.v[:, slice(*rows)])


def _uniform(perturbation: Perturbation, part: _Heads, rows: tuple[int, int]) -> torch.Tensor:
    """The mean of the values of all keys that exist, for every row."""
    v = wide(part.v)
    if part.keys.key_mask is None:
        mean = v.mean(1, keepdim=True)
    else:
        there = part.keys.key_mask[:, :, None, None].to(v.dtype)
        mean = (v * there).sum(1, keepdim=True) / there.sum(1, keepdim=True).clamp(min=1.0)
    return mean.expand(-1, rows[1] - rows[0], -1, -1)


def _mean_query(perturbation: Perturbation, part: _Heads, rows: tuple[int, int]) -> torch.Tensor:
    """One attention row, that of the mean query: the limit of a blur of infinite width."""
    query = wide(part.q[:, slice(*rows)]).mean(1, keepdim=True)
    weights = torch.softmax(part.logits(query, slice(None)), -1)
    row = torch.einsum("bhqk,bkhd->bqhd", weights, wide(part.v))
    return row.expand(-1, rows[1] - rows[0], -1, -1)


def _blurred_query(perturbation: Perturbation, part: _Heads, rows: tuple[int, int]) -> torch.Tensor:
    """Attention of queries that a Gaussian has blurred within their frame; other rows are unchanged."""
    if perturbation.sigma > INFINITE_SIGMA:
        return _mean_query(perturbation, part, rows)
    tokens = part.call.tokens
    if tokens is None or not tokens.visual:
        name = part.call.layer.name
        raise DitAttnError(f"the blur needs the grid of {name}, which is unknown for this input; use SoftPAG")
    q = part.q.clone()
    for span in tokens.visual:
        assert span.grid is not None
        q[:, span.start : span.stop] = blur(q[:, span.start : span.stop], span.grid, perturbation.sigma)
    dense = executor.dense_rows(part.call)
    mask = part.mask
    if mask is not None and mask.ndim == 2:
        mask = mask[:, None, None, :]
    if mask is not None and mask.shape[1] != 1:
        mask = mask[:, part.heads]
    if mask is not None and mask.shape[2] != 1:
        mask = mask[:, :, slice(*rows)]
    return dense(q[:, slice(*rows)], part.k, part.v, mask)


def blur(q: torch.Tensor, grid: tuple[int, int, int], sigma: float) -> torch.Tensor:
    """Blur queries by a Gaussian over height and width, frame by frame, with reflected borders.

    Args:
        q: (B, T * H * W, n, D).
        grid: (T, H, W).
        sigma: standard deviation in tokens; 0 for no blur.

    Returns:
        (B, T * H * W, n, D) in q's type.
    """
    if sigma <= 0.0:
        return q
    t, h, w = grid
    batch, _, n, d = q.shape
    image = wide(q.reshape(batch, t, h, w, n * d).permute(0, 1, 4, 2, 3).reshape(batch * t, n * d, h, w))
    for axis, size in ((2, h), (3, w)):
        taps = _gaussian(sigma, size).to(image)
        reach = len(taps) // 2
        if not reach:
            continue
        shape = (1, 1, -1, 1) if axis == 2 else (1, 1, 1, -1)
        pad = (0, 0, reach, reach) if axis == 2 else (reach, reach, 0, 0)
        image = F.pad(image, pad, mode="reflect")
        image = F.conv2d(image, taps.reshape(shape).expand(n * d, -1, -1, -1), groups=n * d)
    out = image.reshape(batch, t, n * d, h, w).permute(0, 1, 3, 4, 2).reshape(q.shape)
    return out.to(q.dtype)


def _gaussian(sigma: float, size: int) -> torch.Tensor:
    """Normalised taps over six standard deviations, an odd number of them, no more than the axis is long (+ 1 where
    that is even; 1 of an axis of one)."""
    count = min(math.ceil(6 * sigma) | 1, size | 1)
    places = torch.arange(count, dtype=torch.float64) - count // 2
    taps = torch.exp(-0.5 * (places / sigma) ** 2)
    return taps / taps.sum()


_TARGETS: dict[str, Callable[[Perturbation, _Heads, tuple[int, int]], torch.Tensor]] = {
    "identity": _identity,
    "uniform": _uniform,
    "mean-query": _mean_query,
    "blurred-query": _blurred_query,
}
_JOINTS: dict[str, Callable[[_Heads, tuple[int, int]], torch.Tensor]] = {
    "joint": _values,
    "image-rows": _values,
    "ii-logit-mask": _logit_mask,
    "ii-mass-to-diagonal": _mass_to_diagonal,
}
