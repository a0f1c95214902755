"""Self-adaptive attention scaling (SaaS, arXiv 2507.16240): neglected pieces of the prompt get more attention.

A prompt says several things, and some of them lose: in the region where a piece acts, other tokens are attended to far
more than its words. At every step the region of each piece and its share of the attention are measured, and at the next
step its words get the factor by which their rival is ahead.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from dit_attn.errors import DitAttnError, shorten
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.cfg import CONDITIONED
from dit_attn.processors.core.layer import PLAIN
from dit_attn.processors.core.logit_bias import RowBias, span_bias
from dit_attn.processors.core.piece_maps import (
    PieceMaps,
    Spoken,
    find_pieces,
    generated_span,
    observe_pieces,
    reference_keys,
)
from dit_attn.processors.core.prompt_pieces import SPLITS, split_prompt
from dit_attn.processors.core.region_maps import mask_quality, masked_mean, region_masks
from dit_attn.processors.core.regions import regions_of
from dit_attn.processors.core.subjects import has_region, subjects_of
from dit_attn.processors.methods.base import Method, in_steps, resolve_count, setting
from dit_attn.processors.methods.saas_report import Measured, SaaSReport

_EPS = 1e-6


@dataclass(frozen=True, kw_only=True)
class SaaS(Method):
    """Lift pieces of the prompt that are attended to less than their rival in their region.

    Attributes:
        pieces: pieces of the prompt; empty: the prompt is split.
        subjects: pieces with the regions where they act, in place of ``pieces``, see
            :func:`~dit_attn.processors.core.subjects.parse_subjects`; or a JSON file of them. The regions of pieces
            without one are found.
        split: how it is split: ``clauses`` (commas, semicolons, sentences, "and") or ``release`` (as the paper's code).
        rival: what a piece is compared with: the tokens of the ``reference`` image (the paper), the other ``pieces``,
            or ``auto``: the reference where the sequence has one.
        reference: number of the reference image that is the rival, from 1 (the paper); 0 for all together.
        strength: s, factor of the measured ratio.
        clamp: smallest and largest factor; ``None`` for none, as in the paper's code.
        target: share of the attention of its region that every piece is held at instead, by a closed loop.
        gain: of that loop, 1 to correct the full deviation in one step.
        measure: whether attention is measured before (``pre``) or after (``post``, the paper's code) the lift.
        start, stop: first and last + 1 step that is measured, fractions of the run or counts; a step later it acts.
        first_layer, last_layer: first and last + 1 layer, likewise.
        sigma: of the blur of the maps, in tokens.
        threshold: of the normalized map for a region; ``otsu`` finds it.
        ema: weight of the factor of the step before, in its logarithm.
        min_quality: regions of a lower quality are not lifted; 0 lifts all, as the paper does.
        observe: only measure and report.

    Raises:
        DitAttnError: a value out of range, pieces and subjects, or subjects that are none.
    """

    slug: ClassVar[str] = "saas"
    sites: ClassVar[tuple[str, ...]] = ("text",)

    pieces: tuple[str, ...] = setting((), "pieces of the prompt; empty to split it")
    subjects: str | tuple[dict[str, Any], ...] = setting((), "pieces with the regions where they act, or their file")
    split: str = setting("clauses", "how the prompt is split", choices=SPLITS)
    rival: str = setting("auto", "what a piece is compared with", choices=("auto", "reference", "pieces"))
    reference: int = setting(1, "number of the image that is the rival; 0 for all", low=0)
    strength: float = setting(1.0, "factor of the measured ratio", low=0.0)
    clamp: tuple[float, ...] | None = setting((1.0, 10.0), "smallest and largest factor; none for none")
    target: float | None = setting(None, "share of attention to hold every piece at", low=1e-6, high=0.999)
    gain: float = setting(0.5, "of the closed loop", low=0.0, high=1.0)
    measure: str = setting("pre", "before or after the lift", choices=("pre", "post"))
    start: float | int = setting(0.0, "first measured step (fraction or count)", low=0)
    stop: float | int = setting(0.4, "last measured step + 1 (fraction or count)", low=0)
    first_layer: float | int = setting(0.25, "first layer (fraction or count)", low=0)
    last_layer: float | int = setting(1.0, "last layer + 1 (fraction or count)", low=0)
    sigma: float = setting(1.0, "of the blur, in tokens", low=0.0, high=16.0)
    threshold: Literal["otsu"] | float = setting("otsu", "of a region in its map, or otsu")
    ema: float = setting(0.0, "weight of the factor of the step before", low=0.0, high=0.99)
    min_quality: float = setting(0.5, "of a region that is lifted", low=0.0, high=1.0)
    observe: bool = setting(False, "only measure and report")

    def __post_init__(self) -> None:
        where = f"{self.slug}.subjects"
        subjects = subjects_of(self.subjects, where)
        object.__setattr__(self, "subjects", subjects)
        super().__post_init__()
        if subjects and self.pieces:
            raise DitAttnError(f"{self.slug} has pieces and subjects; give one of them")
        if ranges := [one["piece"] for one in subjects if not isinstance(one["piece"], str)]:
            raise DitAttnError(f"{where}: a piece must be words of the prompt here, got {shorten(ranges[0])}")
        bounds = self.clamp
        if bounds is not None and (len(bounds) != 2 or not 0.0 < bounds[0] <= bounds[1] < math.inf):
            raise DitAttnError(f"{self.slug}.clamp must be two factors above 0, the smaller first, got {bounds!r}")
        if isinstance(self.threshold, (int, float)) and not 0.0 <= self.threshold <= 1.0:
            raise DitAttnError(f"{self.slug}.threshold must be otsu, or between 0 and 1, got {self.threshold!r}")
        if any(not piece.strip() for piece in self.pieces):
            raise DitAttnError(f"{self.slug}.pieces must be words of the prompt, got {shorten(self.pieces)}")

    def request(self, call: AttentionCall, request: Request) -> None:
        """Lift what the last step found, and measure this one."""
        layers = range(
            resolve_count(self.first_layer, call.layer_count), resolve_count(self.last_layer, call.layer_count)
        )
        if not call.attends_to_text or call.layer.index not in layers or self.strength == 0.0:
            return
        if call.layer.stateless is not None:
            request.decline(call.layer.stateless)
            return
        plain = call.shared.current if call.pass_name == PLAIN else call.shared.of(PLAIN)
        state: State = plain.setdefault(id(self), State())
        if state.step != call.clock.step:
            self._finish_step(state, call)
        measured = in_steps(call.clock, self.start, self.stop) and call.pass_name == PLAIN and "cond" in call.branches
        if not measured and not any(sample.logs is not None for sample in state.samples.values()):
            return
        if call.tokens is None or call.tokens.grid is None:
            request.decline("subjects need one image or video in the sequence")
            return
        spoken = self._spoken(call, state)
        request.biases += state.lifts(call, spoken)
        if measured:
            self._observe(call, request, state, spoken)

    @property
    def _pieces(self) -> tuple[str, ...]:
        """The pieces that are given, by themselves or as subjects."""
        assert not isinstance(self.subjects, str)
        return self.pieces or tuple(dict.fromkeys(str(one["piece"]) for one in self.subjects))

    # -- words -------------------------------------------------------------------------------------------------------

    def _spoken(self, call: AttentionCall, state: State) -> Spoken:
        """The pieces of the prompts of a call; found once per run and kind of call."""
        prompts = call.prompts()
        key = (prompts, call.kind, call.tokens, call.k.shape[:2], call.branches)
        if key not in state.spoken:
            rows = [self._pieces_of(prompt) if prompt else () for prompt in prompts]
            lost = None if self._pieces else self._report(call).note_lost
            state.spoken[key] = find_pieces(call, rows, lost)
        return state.spoken[key]

    def _pieces_of(self, prompt: str) -> tuple[str, ...]:
        return self._pieces or tuple(dict.fromkeys(prompt[a:b] for a, b in split_prompt(prompt, self.split)))

    # -- measuring ---------------------------------------------------------------------------------------------------

    def _observe(self, call: AttentionCall, request: Request, state: State, spoken: Spoken) -> None:
        against = None if self.rival == "pieces" else reference_keys(call, self.reference)
        if self.rival == "reference" and against is None:
            raise DitAttnError(
                f"{self.slug}.rival is the reference, and this run has none in its sequence; take pieces"
            )
        grid = generated_span(call).grid
        assert grid is not None

        def maps_of(number: int, pieces: tuple[str, ...]) -> Sample:
            if number not in state.samples:
                state.samples[number] = Sample(pieces, grid, known=self._known(pieces, grid))
            return state.samples[number]

        observe_pieces(call, request, spoken, maps_of, self.measure == "pre" and self.target is None, against)

    def _known(self, pieces: tuple[str, ...], grid: tuple[int, int, int]) -> dict[int, torch.Tensor]:
        """The regions (N,) bool that are given, by the place of their piece; several of a piece are one."""
        assert not isinstance(self.subjects, str)
        found: dict[int, torch.Tensor] = {}
        for subject in self.subjects:
            if has_region(subject) and subject["piece"] in pieces:
                at, (region,) = pieces.index(subject["piece"]), regions_of([subject], grid, "share")
                found[at] = region | found[at] if at in found else region
        return found

    def _report(self, call: AttentionCall) -> SaaSReport:
        report = call.reports.setdefault(self.slug, SaaSReport(acts=not self.observe))
        assert isinstance(report, SaaSReport)
        return report

    def _finish_step(self, state: State, call: AttentionCall) -> None:
        """Turn what was measured at the last step into factors for this one."""
        for number, sample in state.samples.items():
            if not sample.layers:
                sample.logs = None
                continue
            threshold = None if isinstance(self.threshold, str) else float(self.threshold)
            masks = region_masks(sample.mass, sample.grid, self.sigma, threshold)
            for at, region in sample.known.items():
                masks[at] = region
            quality = mask_quality(masks, sample.masks)
            quality[list(sample.known)] = 1.0
            shares = masked_mean(sample.mass, masks) / sample.layers
            rivals = self._rivals(sample, masks)
            logs = self._logs(sample, shares, rivals, masks.sum(-1)).clamp(*self._bounds())
            logs = torch.where(masks.any(-1) & logs.isfinite(), logs, torch.zeros_like(logs))
            trusted = quality >= self.min_quality
            lifts = torch.where(trusted, logs, torch.zeros_like(logs))
            lifts = lifts if not self.observe else torch.zeros_like(lifts)
            measured = Measured(shares, rivals / sample.layers, lifts, logs, quality, masks)
            self._report(call).add(number, state.step, sample.pieces, sample.grid, measured)
            sample.loop, sample.masks, sample.logs = logs, masks, lifts if bool(lifts.any()) else None
            sample.clear()
        state.step = call.clock.step
        state.biases.clear()

    def _rivals(self, sample: Sample, masks: torch.Tensor) -> torch.Tensor:
        """What every piece is compared with, in its region: sum over the layers, (n,)."""
        if sample.rival is not None:
            return masked_mean(sample.rival.expand_as(masks), masks)
        means = masked_mean(sample.mass, masks) / sample.counts
        return means.mean() * sample.counts

    def _logs(self, sample: Sample, shares: torch.Tensor, rivals: torch.Tensor, sizes: torch.Tensor) -> torch.Tensor:
        """Logarithms of the factors that follow from a step."""
        if self.target is not None:
            return sample.loop_of(shares) + self.gain * (math.log(self.target) - shares.clamp(min=1e-12).log())
        own = shares * sample.layers * sizes
        logs = (self.strength * rivals * sizes / (own + _EPS)).clamp(min=1e-12).log()
        return self.ema * sample.loop_of(shares) + (1.0 - self.ema) * logs

    def _bounds(self) -> tuple[float, float]:
        low, high = self.clamp or (1e-12, 1e12)
        return math.log(low), math.log(high)


@dataclass
class Sample(PieceMaps):
    """What is known of one sample.

    Attributes:
        loop: (n,) the last logarithms of factors, before the gate.
        known: (N,) bool regions that are given, by the place of their piece.
    """

    loop: torch.Tensor | None = None
    known: dict[int, torch.Tensor] = field(default_factory=dict)

    def loop_of(self, like: torch.Tensor) -> torch.Tensor:
        """The last logarithms, zeros at the first step."""
        return torch.zeros_like(like) if self.loop is None else self.loop


@dataclass
class State:
    """What a run knows.

    Attributes:
        step: the step that is being measured.
        samples: by number.
        spoken: pieces found in calls, by prompts and shapes.
        biases: biases of this step, by shapes.
    """

    step: int = -1
    samples: dict[int, Sample] = field(default_factory=dict)
    spoken: dict[Any, Spoken] = field(default_factory=dict)
    biases: dict[Any, list[RowBias]] = field(default_factory=dict)

    def lifts(self, call: AttentionCall, spoken: Spoken) -> list[RowBias]:
        """Biases of a call: ``ln c`` between the rows of a piece's region and its words."""
        key = (call.kind, call.tokens, call.q.shape, call.k.shape[1], call.branches, call.samples)
        if key not in self.biases:
            self.biases[key] = [bias for piece in spoken.words if (bias := self._lift(call, spoken, piece)) is not None]
        return self.biases[key]

    def _lift(self, call: AttentionCall, spoken: Spoken, piece: str) -> RowBias | None:
        assert call.tokens is not None
        picture = generated_span(call)
        batch = call.q.shape[0]
        rows = torch.zeros(batch, call.tokens.seq_len, dtype=torch.bool)
        value = torch.zeros(batch, 1, dtype=torch.float64)
        for row, (branch, number) in enumerate(zip(call.branches, call.samples)):
            sample = self.samples.get(number)
            if branch in CONDITIONED and sample is not None and sample.logs is not None and piece in spoken.rows[row]:
                assert sample.masks is not None
                at = sample.pieces.index(piece)
                rows[row, picture.start : picture.stop] = sample.masks[at]
                value[row] = sample.logs[at].double()
        if not value.any():
            return None
        return span_bias(call.q, call.k, rows, spoken.words[piece], value, call.shard)
