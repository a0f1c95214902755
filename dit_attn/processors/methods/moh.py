"""MoH, Mixture-of-Head attention (arXiv 2410.11842): every token chooses and weighs the heads that it uses.

The output of attention is a sum over heads. A router per layer, a linear map of the layer's input, gives each token a
gate for every head: ``shared`` heads are always on, of the others the ``top_k`` best are. With ``h_s`` shared and
``h_r`` routed heads, K of them active, and the release's scaling::

    p = softmax(x W_r)    g_routed = K p_j / sum of the K largest, 0 for the others
                          g_shared = h_s softmax(x W_s)
    (a_1, a_2) = 2 softmax(x W_m)    g = [a_1 g_shared, a_2 g_routed]

A model can also be routed without training, by gates of 0 and 1: ``route="calibrated"`` predicts the energy of every
head from the layer's input, ``route="query"`` takes the norms of the queries before they are normalized. Heads that a
token leaves out count as 0, or as their mean (``fill``).

With zero routers and K = h_r every gate is 1: a pretrained model begins as it is. The balance loss of a layer is
``h_r sum_j mean(p_j) mean(j is chosen)``; it is K where all heads are used alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from dit_attn.errors import DitAttnError
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.parameters import LayerShape
from dit_attn.processors.methods.base import Method, resolve_count, setting
from dit_attn.processors.methods.head_choice import (
    FILLS,
    ROUTES,
    HeadChoice,
    TokenGroups,
    best_heads,
    precise_linear,
    query_norms,
)
from dit_attn.processors.methods.learned import LearnedMethod

NORMALIZATIONS = ("release", "paper")


class HeadRouter(torch.nn.Module):
    """The router of one layer, 0 at first, fp32 where it is not cast.

    Args:
        channels: of a token.
        shared: number of shared heads, the first ones.
        routed: number of routed heads.
        two_stage: balance the two groups by a third map, where there are both.

    Attributes:
        routed, shared, stage: (heads or 2, C) weights, ``None`` where there are no such heads.
        balance: balance loss of the last call in training mode, ``None`` otherwise.
    """

    def __init__(self, channels: int, shared: int, routed: int, two_stage: bool) -> None:
        super().__init__()
        self.counts = (shared, routed)

        def zeros(rows: int) -> torch.nn.Parameter | None:
            return torch.nn.Parameter(torch.zeros(rows, channels, dtype=torch.float32)) if rows else None

        self.shared, self.routed = zeros(shared), zeros(routed)
        self.stage = zeros(2 if two_stage and shared and routed else 0)
        self.balance: torch.Tensor | None = None

    def forward(
        self, x: torch.Tensor, top_k: int, normalize: str = "release", groups: TokenGroups | None = None
    ) -> torch.Tensor:
        """Return the gates (B, S, shared + routed), fp32 or fp64, of the tokens x (B, S, C)."""
        scaled = normalize == "release"
        parts, self.balance = [], None
        if self.shared is not None:
            share = torch.softmax(precise_linear(x, self.shared), -1)
            parts.append(share * self.counts[0] if scaled else share)
        if self.routed is not None:
            p = torch.softmax(precise_linear(x, self.routed), -1)
            chosen = best_heads(p if groups is None else groups.mean(p), top_k)
            gate = p * chosen
            if scaled:
                gate = top_k * gate / gate.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
            parts.append(gate)
            if self.training:
                used = chosen.flatten(0, -2).to(p.dtype).mean(0)
                self.balance = self.counts[1] * (p.flatten(0, -2).mean(0) * used).sum()
        if self.stage is not None:
            balance = torch.softmax(precise_linear(x, self.stage), -1) * (2.0 if scaled else 1.0)
            parts = [part * balance[..., i : i + 1] for i, part in enumerate(parts)]
        return torch.cat(parts, -1)


@dataclass(frozen=True, kw_only=True)
class MoH(LearnedMethod):
    """Gate the heads of every token by a learned router; of the routed heads the best stay on.

    Attributes:
        shared: heads that are always on, the first ones: a fraction of all or a count; not 1 beside routed ones.
        top_k: active heads of the routed ones: a fraction or a count. All of them with untrained routers change
            nothing.
        two_stage: weigh shared against routed heads by a map of its own.
        normalize: gates with a mean of 1 (``release``), or plain softmaxes without renormalization (``paper``).
        layers: (shared, active routed) heads of every layer, in place of ``shared`` and ``top_k``.
        balance: weight of the balance loss in a training.
        route: how tokens choose: by routers that are trained (``learned``), by energies that a calibration of the model
            predicts, or by the norms of the queries. The last two have gates of 0 and 1 and need no training;
            ``two_stage``, ``normalize`` and ``balance`` are about the first.
        fill: what stands for a head that a token leaves out, without training: ``zero``, or its mean over such tokens,
            which a calibration measured.
        block: consecutive tokens that choose together, by the mean of their scores. 1 lets every token choose; beside a
            sparse method, a multiple of its query block makes heads skip whole blocks.

    Raises:
        DitAttnError: a value out of range.
    """

    slug: ClassVar[str] = "moh"
    role: ClassVar[str] = "heads"

    shared: float | int = setting(0, "heads that are always on (fraction or count)", low=0)
    top_k: float | int = setting(1.0, "active heads of the others (fraction or count)", low=0)
    two_stage: bool = setting(True, "weigh shared against routed heads")
    normalize: str = setting("release", "scaling of the gates", choices=NORMALIZATIONS)
    layers: tuple[tuple[int, ...], ...] | None = setting(
        None, "shared and active heads of every layer, in place of shared and top_k"
    )
    balance: float = setting(0.01, "weight of the balance loss in a training", low=0.0)
    route: str = setting("learned", "how tokens choose their heads", choices=ROUTES)
    fill: str = setting("zero", "what stands for heads that are left out, where nothing is trained", choices=FILLS)

    block: int = setting(1, "consecutive tokens that choose together", low=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        if any(len(pair) != 2 or min(pair) < 0 for pair in self.layers or ()):
            raise DitAttnError(f"{self.slug}.layers are pairs of counts (shared, active), one for every layer")
        if self.route == "learned" and self.fill != "zero":
            raise DitAttnError(f"{self.slug}.fill={self.fill!r} is for routing without training; set route too")

    def counts(self, heads: int, index: int = 0) -> tuple[int, int, int]:
        """Return shared, routed and active routed heads of a layer.

        Args:
            heads: of the layer.
            index: of the layer.

        Raises:
            DitAttnError: they do not fit.
        """
        given, top_k = self.layers[index] if self.layers is not None else (self.shared, self.top_k)
        if isinstance(given, int) and given > heads:
            raise DitAttnError(f"{self.slug}.shared is {given}, and a layer has {heads} heads; lower it")
        shared = resolve_count(given, heads)
        routed = heads - shared
        if isinstance(top_k, int) and top_k > routed:
            raise DitAttnError(f"{self.slug}.top_k is {top_k}, and {routed} of {heads} heads are routed; lower it")
        active = resolve_count(top_k, routed)
        if shared == 1 and routed and self.route == "learned":
            raise DitAttnError(
                f"{self.slug} with one shared head of {heads} gives it no router; set shared to 0, 2 or more"
            )
        if routed and not active:
            raise DitAttnError(f"{self.slug}.top_k leaves none of {routed} routed heads; raise it")
        return shared, routed, active

    def check_heads(self, transformer: str, heads: Sequence[int | None]) -> None:
        """Refuse counts that do not fit the heads of a layer; arguments as in the base class.

        Raises:
            DitAttnError: so it is.
        """
        if self.layers is not None and len(self.layers) != len(heads):
            raise DitAttnError(
                f"{self.slug}.layers has {len(self.layers)} entries, and {transformer} has {len(heads)} layers; give "
                "one for each"
            )
        for index, count in enumerate(heads):
            if count is not None:
                self.counts(count, index)

    def parameters_for(self, shape: LayerShape) -> torch.nn.Module | None:
        """Return the router of a layer; of a calibration, ``None`` for layers that it cannot measure.

        Raises:
            DitAttnError: a calibration is asked for, and ``weights`` name none.
        """
        if self.route == "learned":
            shared, routed, _ = self.counts(shape.heads, shape.index)
            return HeadRouter(shape.hidden_size, shared, routed, self.two_stage)
        if self.weights is None and (self.route == "calibrated" or self.fill == "mean"):
            raise DitAttnError(f"{self.slug} without training needs a calibration; give the file that it saved")
        return self.choice_for(shape)

    def choice_for(self, shape: LayerShape) -> HeadChoice | None:
        """Return what a calibration measures of a layer, 0 yet; ``None`` for layers that it cannot measure."""
        calibrated = self.route == "calibrated"
        if shape.kind != "self" or (calibrated and not any(name == "to_out" for name, _ in shape.outputs)):
            return None
        _, routed, _ = self.counts(shape.heads, shape.index)
        fill = (shape.heads, shape.head_dim) if self.fill == "mean" else None
        return HeadChoice(shape.hidden_size if calibrated else 0, routed, fill)

    @property
    def reads_input(self) -> bool:
        """Always: routers look at it, and it says which rows are gated."""
        return True

    @property
    def reads_queries(self) -> bool:
        """Where their norms choose."""
        return self.route == "query"

    def continues(self, other: Method) -> bool:
        """Return whether the routers of ``other`` stay: with another number of active heads, say."""
        if not isinstance(other, MoH) or self.weights is not None or self.two_stage != other.two_stage:
            return False
        if (self.route, self.fill) != (other.route, other.fill):
            return False
        shared = [None if method.layers is None else [pair[0] for pair in method.layers] for method in (self, other)]
        return shared[0] == shared[1] and (self.layers is not None or self.shared == other.shared)

    def auxiliary_loss(self, modules: Iterable[torch.nn.Module]) -> torch.Tensor | None:
        """Return the weighted mean of the balance losses of the layers."""
        found = [m.balance for m in modules if isinstance(m, HeadRouter) and m.balance is not None]
        return self.balance * torch.stack(found).mean() if found and self.balance else None

    def request(self, call: AttentionCall, request: Request) -> None:
        """Gate the rows that the layer's input has: those of the picture in layers that keep the text apart."""
        x = call.layer.inputs
        if call.shard != (0, 1):
            request.decline("routers of a sequence that is split over devices")
            return
        if x is None:
            request.decline("the layer's input is hidden by torch.compile")
            return
        rows = input_rows(call)
        if rows is None:
            request.decline(f"the layer's input has other rows than its attention: {tuple(x.shape)}")
            return
        shared, routed, active = self.counts(call.q.shape[2], call.layer.index)
        groups = None if self.block == 1 else TokenGroups(self.block, picture_edges(call, rows))
        if self.route == "learned":
            gates = self.parameters(call)(x, active if routed else 0, self.normalize, groups)
            gates = _padded(gates, rows, call)
            request.multiply_heads(gates)
            if active < routed:
                request.skip_heads(gates != 0)
        elif active < routed and id(self) in call.layer.learned:
            signal = self.signal(call, x, rows)
            if signal is None:
                request.decline("only normalized queries are at hand, and their norms are all alike")
                return
            gates, mean = self.parameters(call)(signal, shared, active, groups)
            gates = _padded(gates, rows, call)
            request.multiply_heads(gates)
            request.skip_heads(gates != 0)
            if mean is not None:
                request.change_output(lambda out: out + ((1.0 - gates)[..., None] * mean).to(out.dtype))

    def signal(self, call: AttentionCall, x: torch.Tensor, rows: slice) -> torch.Tensor | None:
        """Return what the heads of some rows are chosen by, ``None`` where it is not at hand.

        Args:
            call: the attention call.
            x: (B, rows, C) input of the layer.
            rows: of the sequence.

        Returns:
            Of a calibration (B, rows, C), the input; of norms (B, rows, heads).
        """
        return x if self.route == "calibrated" else query_norms(call, rows)


def _padded(gates: torch.Tensor, rows: slice, call: AttentionCall) -> torch.Tensor:
    """Gates of all rows: 1 in the others."""
    missing = (rows.start, call.q.shape[1] - rows.stop)
    return F.pad(gates, (0, 0, *missing), value=1.0) if any(missing) else gates


def picture_edges(call: AttentionCall, rows: slice) -> tuple[int, ...]:
    """Return where the visual tokens begin and end among some rows, without the ends of the rows."""
    assert call.tokens is not None
    bounds = (place - rows.start for place in call.tokens.visual_range or ())
    return tuple(place for place in bounds if 0 < place < rows.stop - rows.start)


def input_rows(call: AttentionCall) -> slice | None:
    """Return the rows of a call that the layer's input has, ``None`` where it is hidden or they cannot be told."""
    x = call.layer.inputs
    if x is None or x.ndim != 3 or x.shape[0] != call.q.shape[0]:
        return None
    if x.shape[1] == call.q.shape[1]:
        return slice(0, x.shape[1])
    assert call.tokens is not None
    visual = call.tokens.visual_range
    return slice(*visual) if visual is not None and visual[1] - visual[0] == x.shape[1] else None
