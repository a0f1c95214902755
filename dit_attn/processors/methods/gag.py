"""GAG, geometry-aware attention guidance (arXiv 2603.02531): guide from dense to sparse attention to the text.

Sparse attention to the text (alpha-entmax) drops the words that matter least to an image row. The difference between
the sparse and the dense result points to what the row retrieves; GAG goes on along it, inside every layer and without a
second pass. Of the difference only the part along the sparse result is taken, the rest is noise::

    d = S - D    d_par = <d, S> / <S, S> S    g = d_par + zeta (d - d_par)    g <- g min(1, eta / |g|)
    Z = S + scale g

for every row and head. In cross attention D is the result of the layer. In joint attention a row keeps the mass m that
it gives to the text, and D and S are over the text alone: the result O becomes ``O + m (Z - D)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from dit_attn.kernels import BlockLayout, LogitBias, sparse_attention
from dit_attn.kernels.dense import dense_with_lse
from dit_attn.processors.core import executor
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.guidance.perturbation import wide
from dit_attn.processors.guidance.sparse_text import ALPHAS, attend_to_text, extrapolated
from dit_attn.processors.methods.base import Method, in_steps, resolve_count, setting
from dit_attn.processors.methods.saas import CONDITIONED


@dataclass(frozen=True, kw_only=True)
class GAG(Method):
    """Extrapolate attention to the text from dense to sparse, for the image rows of conditional branches.

    Attributes:
        scale: length of the step from the sparse result, in differences; 0 takes the sparse result.
        strength: how far a row goes from the stock result to the guided one; 0 is bit-equal to the stock run.
        limit: eta, largest norm of the difference of a row and head.
        orthogonal: zeta, factor of the part of the difference that is orthogonal to the sparse result.
        alpha: of entmax: 1.5, or 2 for sparsemax.
        start, stop: first and last + 1 guided step, fractions of the run or counts.
        first_layer, last_layer: first and last + 1 guided layer, likewise.

    Raises:
        DitAttnError: a value out of range.
    """

    slug: ClassVar[str] = "gag"
    sites: ClassVar[tuple[str, ...]] = ("text",)

    scale: float = setting(5.0, "length of the step, in differences", low=0.0, high=100.0)
    strength: float = setting(1.0, "from the stock result (0) to the guided one (1)", low=0.0, high=1.0)
    limit: float = setting(15.0, "largest norm of the difference", low=1e-6)
    orthogonal: float = setting(0.0, "factor of the orthogonal part", low=0.0, high=1.0)
    alpha: float = setting(1.5, "of entmax", choices=ALPHAS)
    start: float | int = setting(0.0, "first guided step (fraction or count)", low=0)
    stop: float | int = setting(1.0, "last guided step + 1 (fraction or count)", low=0)
    first_layer: float | int = setting(0.0, "first layer (fraction or count)", low=0)
    last_layer: float | int = setting(1.0, "last layer + 1 (fraction or count)", low=0)

    def request(self, call: AttentionCall, request: Request) -> None:
        """Ask for the guided result of the conditional rows."""
        layers = range(
            resolve_count(self.first_layer, call.layer_count), resolve_count(self.last_layer, call.layer_count)
        )
        samples = [row for row, branch in enumerate(call.branches) if branch in CONDITIONED]
        if not (self.strength and samples and call.attends_to_text and call.layer.index in layers):
            return
        if not in_steps(call.clock, self.start, self.stop):
            return
        joint = call.kind == "self"
        if call.shard[1] > 1:
            request.decline("guidance of a sequence that is split over devices")
            return
        if joint and torch.is_grad_enabled() and call.q.requires_grad:
            request.decline("guidance of a joint attention that is differentiated")
            return
        keys = Request()
        reason = (executor.unsupported_reason_layout(call) if joint else None) or executor.read_mask(call, keys)
        if reason is not None:
            request.decline(reason)
            return
        rows = call.visual if joint else slice(0, call.q.shape[1])
        request.change_output(partial(self._guided, call, request, _added(call, keys), samples, rows))

    def _guided(
        self,
        call: AttentionCall,
        request: Request,
        added: torch.Tensor | None,
        samples: list[int],
        rows: slice,
        out: torch.Tensor,
    ) -> torch.Tensor:
        """(B, S, H, Dv): the result of the call, guided in some batch rows and rows."""
        text = _text_keys(call)
        q, k, v = call.q[samples, rows], call.k[samples], call.v[samples]
        added = None if added is None else added[samples if added.shape[0] > 1 else slice(None)]
        bias = request.bias(rows)
        if bias is not None:
            bias = LogitBias(*(x[samples] if x.shape[0] > 1 else x for x in (bias.q, bias.k)))
        found = attend_to_text(
            q, k[:, text], v[:, text], call.softmax_scale, None if added is None else added[..., text],
            None if bias is None else LogitBias(bias.q, bias.k[..., text, :]), self.alpha,
        )  # fmt: skip
        stock = wide(out[samples, rows])
        guided = extrapolated(found.sparse, found.dense, self.scale, self.limit, self.orthogonal)
        if call.kind == "self":
            mass = (found.lse - _lse(call, q, k, v, added, bias)).exp()[..., None]
            guided = stock + mass * (guided - found.dense)
        guided = torch.where((found.lse > -torch.inf)[..., None], guided, stock)
        changed = out.clone()
        changed[samples, rows] = torch.lerp(stock, guided, self.strength).to(out.dtype)
        return changed


def _text_keys(call: AttentionCall) -> torch.Tensor:
    """Indices of the keys that are text."""
    if call.kind == "cross":
        return torch.arange(call.k.shape[1], device=call.k.device)
    assert call.tokens is not None
    spans = [span for span in call.tokens.spans if span.kind == "text"]
    return torch.cat([torch.arange(span.start, span.stop, device=call.k.device) for span in spans])


def _added(call: AttentionCall, keys: Request) -> torch.Tensor | None:
    """(B|1, 1|H, Sk): the model's mask as it is added to the logits."""
    if keys.key_bias is not None or keys.key_mask is None:
        return keys.key_bias
    mask = keys.key_mask[:, None]
    return torch.zeros(mask.shape, device=call.q.device).masked_fill(~mask, -torch.inf)


def _lse(
    call: AttentionCall,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    added: torch.Tensor | None,
    bias: LogitBias | None,
) -> torch.Tensor:
    """(B, n, H): log-sum-exp of the rows over all keys."""
    if bias is None:
        return dense_with_lse(q, k, v, scale=call.softmax_scale, key_bias=added)[1].transpose(1, 2)
    layout = BlockLayout.dense(q.shape[1], k.shape[1], device=q.device)
    found = sparse_attention(
        q, k, v, layout, scale=call.softmax_scale, key_bias=added, bias=bias, return_lse=True
    )  # fmt: skip
    assert isinstance(found, tuple)
    return found[1].transpose(1, 2)
