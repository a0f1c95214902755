"""SLA, sparse-linear attention (arXiv 2509.24006): attention that is fine-tuned.

The key blocks of every query block fall into three classes by their pooled scores: the critical ones are attended to
exactly, the marginal ones by linear attention, and the negligible ones not at all. A learned projection W, b per layer,
shared by its heads, adds the two::

    O = O_sparse + O_linear W^T + b

W and b are 0 at first: before fine-tuning this is block-sparse attention.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from dit_attn.errors import DitAttnError
from dit_attn.kernels import BlockLayout, linear_attention, plan_scores, sparse_attention
from dit_attn.kernels.layouts.block_layout import ceil_div
from dit_attn.kernels.linear.feature_maps import FEATURE_MAPS
from dit_attn.kernels.selection.budget import blocks_of_density
from dit_attn.kernels.selection.select import block_probabilities
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.parameters import LayerShape
from dit_attn.processors.core.token_permute import PermutedTokens
from dit_attn.processors.methods.base import Method, setting
from dit_attn.processors.methods.head_budget import budget_of_call, is_full, mean_budget
from dit_attn.processors.methods.learned import LearnedMethod
from dit_attn.processors.methods.pooled_scores import ordered_scores
from dit_attn.processors.methods.sparse import SparseMethod
from dit_attn.processors.methods.visual_order import ORDERS, check_tile, visual_order

DOMAINS = ("marginal", "noncritical", "all")
COMBINATIONS = ("projection", "mass")
RETUNED = ("density", "weights", "dense_steps", "dense_last_steps", "dense_layers", "max_error")
"""Settings that may change while the tensors stay."""


class LinearProjection(torch.nn.Module):
    """The learned map of the linear branch, 0 at first; fp32, whatever type the model is cast to.

    Attributes:
        weight: (D, D).
        bias: (D,).
    """

    def __init__(self, head_dim: int) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(head_dim, head_dim, dtype=torch.float32))
        self.bias = torch.nn.Parameter(torch.zeros(head_dim, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (..., D), in its dtype."""
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))

    def _apply(self, fn: Any, recurse: bool = True) -> LinearProjection:
        def moved(x: torch.Tensor) -> torch.Tensor:
            found = fn(x)
            return found if found.dtype == x.dtype else x.to(found.device)

        return super()._apply(moved, recurse)


@dataclass(frozen=True, kw_only=True)
class SLA(SparseMethod, LearnedMethod):
    """Attend to critical key blocks exactly and to marginal ones linearly, joined by a learned projection.

    Attributes:
        density: critical fraction k_h of the key blocks of each query block, in (0, 1]: a number, or one for each head.
            Blocks with text are critical and count inside it. 1 is bit-equal to stock attention.
        negligible: fraction k_l of the key blocks that nothing attends to, with the domain ``marginal``.
        linear_domain: blocks of the linear branch: ``marginal`` (neither critical nor negligible), ``noncritical``, or
            ``all``, the critical ones too, which needs no sums per query block. Tensors are tuned for one domain.
        feature_map: of the linear branch: ``softmax`` over the channels, ``elu`` + 1, or ``relu``.
        combine: ``projection`` (learned), or ``mass``, which learns nothing: each branch by its share of the pooled
            softmax mass.
        order: order of the visual tokens, as of :class:`~dit_attn.RectifiedSpaAttn`.
        tile: (t, h, w) tokens of a box of ``tiles``.

    Raises:
        DitAttnError: a value out of range, ``density`` and ``negligible`` above 1 together, ``densities``, or
            ``weights`` of a method that learns nothing.
    """

    slug: ClassVar[str] = "sla"

    density: float | tuple[float, ...] = setting(
        0.1, "fraction of critical key blocks, of all heads or of each", low=1e-6, high=1.0
    )
    negligible: float = setting(0.1, "fraction of key blocks that nothing attends to", low=0.0, high=1.0)
    linear_domain: str = setting("marginal", "key blocks of the linear branch", choices=DOMAINS)
    feature_map: str = setting("softmax", "features of the linear branch", choices=FEATURE_MAPS)
    combine: str = setting("projection", "learned projection, or share of the mass", choices=COMBINATIONS)
    order: str = setting("auto", "order of the visual tokens", choices=ORDERS)
    tile: tuple[int, ...] | None = setting(None, "tokens (t, h, w) of a box of the order `tiles`")
    kv_block: int = setting(64, "tokens per key block", low=8, high=1024)
    dense_steps: float | int = setting(0.0, "dense steps at the start (fraction or count)", low=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check_tile(self.slug, self.tile)
        largest = max(self.density if isinstance(self.density, tuple) else (self.density,))
        if self.linear_domain == "marginal" and largest < 1.0 and largest + self.negligible > 1.0:
            raise DitAttnError(
                f"{self.slug}.density {largest} and negligible {self.negligible} are more than all blocks; lower one"
            )
        if self.densities is not None:
            raise DitAttnError(f"{self.slug} takes no densities: its tensors are tuned for one density; leave them out")
        if self.combine == "mass" and self.weights is not None:
            raise DitAttnError(f"{self.slug} with combine='mass' learns nothing; leave out weights")

    @property
    def is_dense(self) -> bool:
        """Whether the settings are dense attention."""
        return is_full(self.density)

    @property
    def executed(self) -> float | None:
        """The critical density, mean over heads; the linear branch is linear in the sequence."""
        return mean_budget(self.density)

    def parameters_for(self, shape: LayerShape) -> torch.nn.Module | None:
        """Return the projection of a layer."""
        return LinearProjection(shape.head_dim) if self.combine == "projection" else None

    def continues(self, other: Method) -> bool:
        """Return whether the tensors of ``other`` stay when this method takes its place: at another density, say."""
        names = [spec.name for spec in fields(self) if spec.compare and spec.name not in RETUNED]
        alike = isinstance(other, SLA) and all(getattr(self, name) == getattr(other, name) for name in names)
        return alike and self.weights is None

    def plan(self, call: AttentionCall, request: Request) -> None:
        """Classify the blocks, and compute the visual rows by both branches."""
        assert call.tokens is not None
        bias = request.key_bias
        if bias is not None and bias.shape[1] > 1 and call.q.shape[2] != call.k.shape[2]:
            request.decline(f"attention mask of shape {tuple(bias.shape)}")
            return
        rows = request.permute(call, *visual_order(call.tokens, self.order, self.tile, self.kv_block))
        with torch.no_grad():
            scores = ordered_scores(rows, self.q_block, self.kv_block, call.softmax_scale)
            layout = self._critical(scores, rows, call)
            pairs = linear_blocks(scores, layout, self.linear_domain, self.negligible)
        request.visual_density = self._computed(rows)

        def visual() -> torch.Tensor:
            out = sparse_attention(
                rows.q, rows.k, rows.v, layout, scale=call.scale,
                key_mask=rows.key_mask if rows.key_bias is None else None, key_bias=rows.key_bias,
            )  # fmt: skip
            assert isinstance(out, torch.Tensor)
            linear = linear_attention(
                rows.q, rows.k, rows.v, pairs, q_block=self.q_block, kv_block=self.kv_block,
                feature_map=self.feature_map, key_weight=_key_weight(rows),
            )  # fmt: skip
            if self.combine == "mass":
                share = self._critical_mass(scores, layout, pairs, rows)
                return rows.unpermute(torch.lerp(linear, out, share.to(out.dtype)))
            return rows.unpermute(out + self.parameters(call)(linear))

        request.compute_visual = visual

    def _critical(self, scores: torch.Tensor, rows: PermutedTokens, call: AttentionCall) -> BlockLayout:
        """The critical blocks, from (B, H, nq, nk) scores."""
        return plan_scores(
            scores, density=budget_of_call(self.density, call),
            forced=rows.order.forced((), rows.k.shape[1], self.q_block, self.kv_block),
            q_len=rows.q.shape[1], kv_len=rows.k.shape[1], q_block=self.q_block, kv_block=self.kv_block,
        ).layout  # fmt: skip

    def _computed(self, rows: PermutedTokens) -> float:
        """Work of both branches as a fraction of dense attention's, from sizes alone."""
        q_len, kv_len, dim = rows.q.shape[1], rows.k.shape[1], rows.q.shape[-1]
        nk = ceil_div(kv_len, self.kv_block)
        text = nk - rows.order.visual // self.kv_block if rows.order.visual < kv_len else 0
        counts = blocks_of_density(self.density, nk)
        each = [max(count, text) / nk for count in (counts if isinstance(counts, tuple) else (counts,))]
        linear = dim * (q_len + kv_len) / (2 * q_len * kv_len)
        if self.linear_domain != "all":
            linear += dim / (2 * self.q_block * self.kv_block)
        return sum(each) / len(each) + linear

    def _critical_mass(
        self, scores: torch.Tensor, layout: BlockLayout, pairs: torch.Tensor | None, rows: PermutedTokens
    ) -> torch.Tensor:
        """(B, Sv, H, 1) share of the pooled softmax mass in the critical blocks; 1 in rows without linear ones."""
        share = (block_probabilities(scores) * layout.block_mask()).sum(-1)
        if pairs is not None:
            share = share.masked_fill(~pairs.any(-1), 1.0)
        return share.repeat_interleave(self.q_block, -1)[..., : rows.q.shape[1]].transpose(1, 2)[..., None]


def linear_blocks(scores: torch.Tensor, layout: BlockLayout, domain: str, negligible: float) -> torch.Tensor | None:
    """Return which blocks the linear branch of SLA covers, (B, H, nq, nk) bool; ``None`` for all.

    Args:
        scores: (B, H, nq, nk) pooled logits; ``-inf`` where no key exists.
        layout: the critical blocks.
        domain: of :data:`DOMAINS`.
        negligible: fraction of the key blocks, rounded down, that the domain ``marginal`` leaves out: those of the
            smallest scores, of equal ones the lower index.
    """
    if domain == "all":
        return None
    critical = layout.block_mask()
    chosen = ~critical & (scores > -math.inf)
    count = int(negligible * scores.shape[-1] + 1e-9)
    if domain == "noncritical" or not count:
        return chosen
    lowest = scores.masked_fill(critical, math.inf).sort(dim=-1, stable=True).indices[..., :count]
    return chosen.scatter(-1, lowest, False)


def _key_weight(rows: PermutedTokens) -> torch.Tensor | None:
    """(B|1, H|1, Sk) factor that the model's mask gives every key, ``None`` without one."""
    if rows.key_bias is not None:
        return rows.key_bias.detach().exp()
    return None if rows.key_mask is None else rows.key_mask[:, None].float()
