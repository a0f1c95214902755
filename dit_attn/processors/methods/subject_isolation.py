"""Subject isolation (IR-Diffusion, arXiv 2411.19261): the region of a subject attends to no other subject.

A model that is asked for several subjects mixes them: one takes the color of the other. Each subject is a piece of the
prompt with a region of the picture. The rows of a region are barred from the words of the other subjects, and, as in
the paper, from their regions. Rows outside of all regions attend to everything.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.layer import PLAIN
from dit_attn.processors.core.logit_bias import RowBias, span_bias
from dit_attn.processors.core.observation import Observation
from dit_attn.processors.core.piece_maps import Spoken, generated_span, observe_pieces
from dit_attn.processors.core.regions import barriers, regions_of, visual_masks
from dit_attn.processors.core.subjects import (
    OVERLAPS,
    Subject,
    check_overlap,
    has_region,
    subjects_of,
)
from dit_attn.processors.methods.base import Method, in_steps, setting
from dit_attn.processors.methods.isolation_state import IsolationReport, IsolationState, RegionSearch


@dataclass(frozen=True, kw_only=True)
class SubjectIsolation(Method):
    """Bar the region of every subject from the words, or from the regions, of the others.

    Without subjects, with one, and with a strength of 0 a run is bit-equal to the stock one.

    Attributes:
        subjects: pieces of the prompt with their regions, see
            :func:`~dit_attn.processors.core.subjects.parse_subjects`; or a JSON file of them.
        isolate_text: whether rows of a subject's region are barred from the words of other subjects.
        isolate_image: whether they are barred from the regions of other subjects (the paper), in all branches of the
            guidance and for all prompts of a call.
        strength: ``hard`` bars; a number is subtracted from the logits.
        overlap: where regions overlap: ``refuse``; ``share``: tokens belong to both; ``smaller``: to the smaller one.
        start, stop: first and last + 1 step with isolation, as fractions of the run or counts.
        find_steps: steps at the start in which the regions of subjects without one are looked for, in the attention to
            their words; fraction or count. Nothing is isolated before its end.
        min_quality: quality of the regions that are found, in [0, 1]; below it the run goes on without isolation, and
            the summary says so.
        observe: report how much every region attends to the words and regions of every subject.

    Raises:
        DitAttnError: a value out of range, or subjects that are none.
    """

    slug: ClassVar[str] = "isolation"

    subjects: str | tuple[dict[str, Any], ...] = setting((), "pieces of the prompt with regions, or their file")
    isolate_text: bool = setting(True, "bar a subject's region from the words of the others")
    isolate_image: bool = setting(False, "bar a subject's region from the regions of the others")
    strength: Literal["hard"] | float = setting("hard", "hard, or a number that is subtracted from the logits")
    overlap: str = setting("refuse", "what happens where regions overlap", choices=OVERLAPS)
    start: float | int = setting(0.0, "first step with isolation (fraction or count)", low=0)
    stop: float | int = setting(1.0, "last step with isolation + 1 (fraction or count)", low=0)
    find_steps: float | int = setting(0.3, "steps that look for regions that are not given (fraction or count)", low=0)
    min_quality: float = setting(0.5, "of regions that are found", low=0.0, high=1.0)
    observe: bool = setting(False, "report how much subjects attend to each other")

    def __post_init__(self) -> None:
        subjects = subjects_of(self.subjects, f"{self.slug}.subjects")
        object.__setattr__(self, "subjects", subjects)
        super().__post_init__()
        if isinstance(self.strength, (int, float)) and not 0.0 <= self.strength < math.inf:
            raise DitAttnError(f"{self.slug}.strength must be hard, or at least 0 and finite, got {self.strength!r}")
        if self.overlap == "refuse":
            check_overlap(subjects)
        text = self.isolate_text or self.observe or self._searched
        sites = ("text",) * text + ("self",) * (self.isolate_image or self.observe)
        object.__setattr__(self, "sites", sites or ("text",))

    @property
    def _subjects(self) -> tuple[Subject, ...]:
        assert not isinstance(self.subjects, str)
        return self.subjects

    @property
    def _searched(self) -> bool:
        """Whether a subject's region is to be found."""
        return not all(map(has_region, self._subjects))

    @property
    def _names(self) -> tuple[str, ...]:
        """The pieces as they are shown."""
        return tuple(str(one["piece"]) for one in self._subjects)

    def request(self, call: AttentionCall, request: Request) -> None:
        """Add the biases of a call, or look for the regions first."""
        assert call.tokens is not None
        if len(self._subjects) < 2 or not (self.strength or self.observe):
            return
        if call.tokens.grid is None:
            request.decline("subjects need one image or video in the sequence")
            return
        plain = call.shared.current if call.pass_name == PLAIN else call.shared.of(PLAIN)
        state: IsolationState = plain.setdefault(id(self), IsolationState())
        if self._searched and not state.done:
            if in_steps(call.clock, 0, self.find_steps):
                self._search(call, request, state)
                return
            self._end_search(call, state)
        words = self._words(call)
        rows = self._rows(call, state)
        if self.strength and in_steps(call.clock, self.start, self.stop):
            request.biases += self._biases(call, rows, words if self.isolate_text else [])
        if self.observe and call.pass_name == PLAIN:
            self._measure(call, request, rows, words)

    # -- regions -----------------------------------------------------------------------------------------------------

    def _search(self, call: AttentionCall, request: Request, state: IsolationState) -> None:
        if not call.attends_to_text or call.pass_name != PLAIN or "cond" not in call.branches:
            return
        key = (call.kind, call.tokens, call.k.shape[:2], call.branches)
        if key not in state.spoken:
            words = self._words(call)
            rows = tuple(self._names for _ in call.branches)
            state.spoken[key] = Spoken(rows, dict(zip(self._names, words, strict=True)))
        grid = generated_span(call).grid
        assert grid is not None

        def maps_of(number: int, pieces: tuple[str, ...]) -> RegionSearch:
            search = state.searches.setdefault(number, RegionSearch(pieces, grid))
            search.begin_step(call.clock.step)
            return search

        observe_pieces(call, request, state.spoken[key], maps_of)

    def _end_search(self, call: AttentionCall, state: IsolationState) -> None:
        """Decide what the regions are; a sample without reliable ones has none."""
        state.done = True
        report = self._report(call)
        given = [at for at, one in enumerate(self._subjects) if has_region(one)]
        wanted = [at for at in range(len(self._subjects)) if at not in given]
        for number, search in state.searches.items():
            masks, quality, weights = search.result()
            report.add_found(number, [self._names[at] for at in wanted], masks[wanted], quality[wanted], search.grid)
            if bool((quality[wanted] < self.min_quality).any()):
                state.regions[number] = torch.zeros_like(masks)
                continue
            if given:
                known = regions_of([self._subjects[at] for at in given], search.grid, self.overlap)
                masks[given] = known
                masks[wanted] &= ~known.any(0)
            owner = weights.masked_fill(~masks, -1.0)
            owner[given] = torch.where(masks[given], torch.full_like(owner[given], 2.0), owner[given])
            state.regions[number] = masks & (owner == owner.amax(0))

    def _rows(self, call: AttentionCall, state: IsolationState) -> torch.Tensor:
        """The rows of every subject, (n, B|1, S) bool."""
        assert call.tokens is not None and call.tokens.grid is not None
        key = (id(self), "rows", call.tokens, call.samples)
        if key not in call.layer.state:
            if self._searched:
                nothing = torch.zeros(len(self._subjects), math.prod(call.tokens.grid), dtype=torch.bool)
                regions = [state.regions.get(number, nothing) for number in call.samples]
            else:
                regions = [regions_of(self._subjects, call.tokens.grid, self.overlap)]
            call.layer.state[key] = torch.stack([visual_masks(one, call.tokens) for one in regions], 1)
        return call.layer.state[key]

    def _words(self, call: AttentionCall) -> list[torch.Tensor]:
        """Which keys the piece of every subject is, n times (B, Sk) bool; none where no text is attended to."""
        if not call.attends_to_text or not (self.isolate_text or self.observe or self._searched):
            return []
        pieces = [one["piece"] for one in self._subjects]
        return [call.prompt_tokens(piece if isinstance(piece, str) else tuple(piece)) for piece in pieces]

    # -- what is requested -------------------------------------------------------------------------------------------

    def _biases(self, call: AttentionCall, rows: torch.Tensor, words: Sequence[torch.Tensor]) -> list[RowBias]:
        """The biases of a call, made once for a run and its shapes."""
        key = (id(self), call.kind, call.tokens, call.q.shape, call.k.shape[1], call.branches, call.samples)
        known, biases = call.layer.state.get(key, (None, []))
        if known is None or any(a is not b for a, b in zip(known, words, strict=True)):
            value = -math.inf if self.strength == "hard" else -float(self.strength)
            owned = [torch.stack(list(words)).cpu()] if words else []
            owned += [rows] if self.isolate_image and call.kind == "self" else []
            made = [
                span_bias(call.q, call.k, barred, keys, value, call.shard)
                for members in owned
                for barred, keys in barriers(rows, members)
            ]
            biases = [bias for bias in made if bias is not None]
            call.layer.state[key] = words, biases
        return biases

    def _measure(
        self, call: AttentionCall, request: Request, rows: torch.Tensor, words: Sequence[torch.Tensor]
    ) -> None:
        """Observe the attention of every region to the words and the regions of every subject."""
        n, report = len(self._subjects), self._report(call)
        batch = call.q.shape[0]
        masks = [row.expand(batch, -1) for row in rows]
        regions = masks if call.kind == "self" else []

        def add(found: Observation) -> None:
            chosen = [row for row, branch in enumerate(call.branches) if branch == "cond"]
            mass = found.mass[chosen].mean((0, 1)).cpu().float()  # (n regions, n words and n regions)
            if words and chosen:
                report.add(0, mass[:, :n])
            if regions and chosen:
                report.add(1, mass[:, -n:])

        if words or regions:
            request.observe(add, [*words, *regions], masks)

    def _report(self, call: AttentionCall) -> IsolationReport:
        report = call.reports.setdefault(self.slug, IsolationReport(list(self._names), limit=self.min_quality))
        assert isinstance(report, IsolationReport)
        return report
