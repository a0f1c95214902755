"""Adaptive attention re-weighting (AnomalyDiffusion, arXiv 2312.05767): unpainted cells attend more to the concept.

A defect is painted into a mask, and parts of the mask may stay empty. At every step each cell of the mask is compared
with the normal image; where little has changed, its row attends more to the words of the defect. The weights come from
the code that paints, see :class:`~dit_attn.processors.core.row_weights.RowWeights`: this method applies them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.cfg import CONDITIONED
from dit_attn.processors.core.layer import PLAIN
from dit_attn.processors.core.observation import Observation
from dit_attn.processors.core.piece_maps import generated_span
from dit_attn.processors.core.row_weights import RowWeights, text_tokens
from dit_attn.processors.core.weight_map import NORMS, blurred, weight_map
from dit_attn.processors.methods.base import Method, in_steps, setting

MODES = ("bias", "gain", "logit")
COLUMNS = ("concept", "region", "both")
HIGHEST = {"cross": 1.5, "self": 4.0}
"""Largest weight by kind of attention; where the image is among the keys, the concept's share is small."""


@dataclass(frozen=True, kw_only=True)
class AdaptiveReweighting(Method):
    """Let rows of a mask attend to a concept by a weight w that is larger where nothing is painted yet.

    Without weights, with weights of 1, and for rows of the text, of the unconditional branch and outside the mask,
    nothing changes.

    Attributes:
        mode: ``bias``: ln w is added to the logits of the concept; its share rises with w. ``gain`` (the paper): what
            the row gets from the concept, after the softmax, times w. ``logit`` (the released code): the logits times
            w, which lowers the share where a logit is negative.
        columns: what is attended to more: the ``concept``'s words (in cross or joint attention), the ``region`` itself
            (in self or joint attention), or ``both``.
        norm: of :data:`~dit_attn.processors.core.weight_map.NORMS`, how changes become weights.
        offset, softness: of the weights, see :func:`~dit_attn.processors.core.weight_map.weight_map`.
        w_min: smallest weight.
        w_max: largest one; ``None``: 1.5 in cross attention, 4 where the image is among the keys.
        ema: weight of the step before.
        blur: take means over 3 x 3 cells of the mask.
        start, stop: first and last + 1 step that is re-weighted, fractions of the run or counts.
        observe: report how much the mask attends to the concept.

    Raises:
        DitAttnError: a value out of range.
    """

    slug: ClassVar[str] = "reweighting"

    mode: str = setting("bias", "what is weighted", choices=MODES)
    columns: str = setting("concept", "what is attended to more", choices=COLUMNS)
    norm: str = setting("scaled", "how changes become weights", choices=NORMS)
    offset: float = setting(0.1, "bounds the weight of a cell that has not changed", low=1e-6)
    softness: float = setting(1.0, "of the softmax", low=1e-3)
    w_min: float = setting(1.0, "smallest weight", low=1e-3, high=1.0)
    w_max: float | None = setting(None, "largest weight; none: 1.5 in cross attention, 4 otherwise", low=1.0, high=1e4)
    ema: float = setting(0.5, "weight of the step before", low=0.0, high=0.99)
    blur: bool = setting(True, "take means over 3 x 3 cells of the mask")
    start: float | int = setting(0.2, "first step that is re-weighted (fraction or count)", low=0)
    stop: float | int = setting(0.8, "last one + 1 (fraction or count)", low=0)
    observe: bool = setting(False, "report how much the mask attends to the concept")

    def __post_init__(self) -> None:
        super().__post_init__()
        sites = {"concept": ("text",), "region": ("self",), "both": ("text", "self")}
        object.__setattr__(self, "sites", sites[self.columns])

    @staticmethod
    def among(methods: Iterable[Method]) -> AdaptiveReweighting | None:
        """Return the re-weighting among some methods, ``None`` where there is none."""
        return next((method for method in methods if isinstance(method, AdaptiveReweighting)), None)

    def next_weights(
        self, change: torch.Tensor, region: torch.Tensor, last: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the weights of the next step, (N, H, W) fp32.

        Args:
            change: (N, H, W) mean squared difference of every cell's clean prediction to the normal image.
            region: (N, H, W) bool, the mask.
            last: weights of the step before, ``None`` at the first.
        """
        high = max(HIGHEST.values()) if self.w_max is None else self.w_max
        found = weight_map(
            change, region, norm=self.norm, offset=self.offset, softness=self.softness, low=self.w_min, high=high
        )
        found = blurred(found, region) if self.blur else found
        return found if last is None else self.ema * last + (1.0 - self.ema) * found

    def request(self, call: AttentionCall, request: Request) -> None:
        """Weight the rows of a call."""
        assert call.tokens is not None
        given = call.given.get(self.slug)
        if given is None:
            request.decline("no weights are given")
            return
        if not isinstance(given, RowWeights):
            raise DitAttnError(f"the weights of {self.slug} must be RowWeights, got {type(given).__name__}")
        if call.tokens.grid is None:
            request.decline("weights need one image or video in the sequence")
            return
        if not in_steps(call.clock, self.start, self.stop):
            return
        state: State = call.shared.current.setdefault(id(self), State())
        part = state.part(call, given, self)
        if part is None:
            return
        if self.observe and call.pass_name == PLAIN:
            self._measure(call, request, part)
        if part.rows is None:
            return
        if self.mode == "gain":
            request.multiply_keys(call, part.keys, part.rows, part.first)
        elif self.mode == "bias":
            rows, keys = part.rows.double().log()[:, None, :, None], part.keys.double()[:, None, :, None]
            request.add_bias(call, rows, keys, part.first)
        else:
            self._scale_logits(call, request, part)

    def _scale_logits(self, call: AttentionCall, request: Request, part: Part) -> None:
        """Add (w - 1) times the logits of the concept, which are the product of queries and keys."""
        assert part.rows is not None
        dtype = torch.promote_types(call.q.dtype, torch.float32)
        q = call.q[:, part.first : part.first + part.rows.shape[1]].transpose(1, 2).to(dtype)
        more = (part.rows - 1.0).to(q.device, dtype)[:, None, :, None] * call.softmax_scale
        keys = call.k.transpose(1, 2).to(dtype) * part.keys.to(q.device, dtype)[:, None, :, None]
        request.add_bias(call, more * q, keys, part.first)

    def highest(self, kind: str) -> float:
        """Return the largest weight in attention of a kind."""
        return HIGHEST["cross" if kind == "cross" else "self"] if self.w_max is None else self.w_max

    def _measure(self, call: AttentionCall, request: Request, part: Part) -> None:
        report = call.reports.setdefault(self.slug, ReweightingReport())
        assert isinstance(report, ReweightingReport)
        chosen = [row for row, branch in enumerate(call.branches) if branch == "cond"]
        weights = part.inside_weights

        def add(found: Observation) -> None:
            if chosen:
                report.add(call.clock.step, float(found.mass[chosen].mean()), weights)

        request.observe(add, [part.keys], [part.inside])


@dataclass
class Part:
    """What is weighted in calls of one shape.

    Attributes:
        keys: (B, Sk) bool.
        inside: (B, S) bool, the rows of the mask.
        inside_weights: weights of those rows, all of them.
        rows: (B, n) weights of the rows from ``first`` on; ``None`` where all are 1.
        first: the first row that has one.
    """

    keys: torch.Tensor
    inside: torch.Tensor
    inside_weights: torch.Tensor
    rows: torch.Tensor | None = None
    first: int = 0


@dataclass
class State:
    """What a run knows: the weights of this step in the form of its calls."""

    given: RowWeights | None = None
    parts: dict[Any, Part | None] = field(default_factory=dict)

    def part(self, call: AttentionCall, given: RowWeights, method: AdaptiveReweighting) -> Part | None:
        """Return what is weighted in a call, ``None`` for nothing."""
        if self.given is not given:
            self.given, self.parts = given, {}
        key = (call.kind, call.tokens, call.q.shape[:2], call.k.shape[1], call.branches, call.samples)
        if key not in self.parts:
            self.parts[key] = _part(call, given, method)
        return self.parts[key]


def _part(call: AttentionCall, given: RowWeights, method: AdaptiveReweighting) -> Part | None:
    assert call.tokens is not None and call.tokens.grid is not None
    at = [row for row, branch in enumerate(call.branches) if branch in CONDITIONED]
    if not at:
        return None
    samples, grid, picture = [call.samples[row] for row in at], call.tokens.grid, generated_span(call)
    cells = slice(picture.start, picture.stop)
    batch, seq_len = call.q.shape[:2]
    weights, inside = torch.ones(batch, seq_len), torch.zeros(batch, seq_len, dtype=torch.bool)
    keys = torch.zeros(batch, call.k.shape[1], dtype=torch.bool)
    weights[at, cells] = given.rows(samples, grid).clamp(method.w_min, method.highest(call.kind))
    inside[at, cells] = given.inside(samples, grid)
    if method.columns != "region" and call.attends_to_text:
        text = torch.arange(call.k.shape[1]) if call.kind == "cross" else text_tokens(call.tokens)
        for row, words in zip(at, given.words(samples, len(text))):
            keys[row, text[words]] = True
    if method.columns != "concept" and call.kind == "self":
        keys |= inside
    if not keys.any() or not inside.any():
        return None
    part = Part(keys, inside, weights[inside])
    touched = (weights != 1).any(0).nonzero()
    if len(touched):
        part.first = int(touched[0])
        part.rows = weights[:, part.first : int(touched[-1]) + 1]
    return part


@dataclass
class ReweightingReport:
    """What a run measured, by step: mean over the layers.

    Attributes:
        shares: share of the attention of the mask's rows that the concept gets; under ``gain``, before the gain.
        means, highest: mean and largest weight of the mask.
        layers: number of layers.
    """

    shares: dict[int, float] = field(default_factory=dict)
    means: dict[int, float] = field(default_factory=dict)
    highest: dict[int, float] = field(default_factory=dict)
    layers: dict[int, int] = field(default_factory=dict)

    def add(self, step: int, share: float, weights: torch.Tensor) -> None:
        """Add one layer."""
        count = self.layers.get(step, 0)
        self.shares[step] = (self.shares.get(step, 0.0) * count + share) / (count + 1)
        self.means[step], self.highest[step] = float(weights.mean()), float(weights.max())
        self.layers[step] = count + 1

    @property
    def warnings(self) -> list[str]:
        """What a user should know."""
        return []

    def __str__(self) -> str:
        lines = [
            f"step {step}: weights {self.means[step]:.2f} on average, {self.highest[step]:.2f} at most; "
            f"{share:.2%} of the mask's attention"
            for step, share in self.shares.items()
        ]
        return "\n".join(lines) or "nothing was re-weighted"
