"""Subject isolation (IR-Diffusion, arXiv 2411.19261): the region of a subject attends to no other subject.

A model that is asked for several subjects mixes them: one takes the color of the other. Each subject is a piece of the
prompt with a region of the picture. The rows of a region are barred from the words of the other subjects, and, as in
the paper, from their regions. Rows outside of all regions attend to everything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.logit_bias import RowBias, span_bias
from dit_attn.processors.core.regions import regions_of, visual_masks
from dit_attn.processors.core.subjects import (
    OVERLAPS,
    Subject,
    check_overlap,
    has_region,
    parse_subjects,
    read_subjects,
)
from dit_attn.processors.methods.base import Method, in_steps, setting


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

    def __post_init__(self) -> None:
        given, where = self.subjects, f"{self.slug}.subjects"
        subjects = read_subjects(given) if isinstance(given, str) else parse_subjects(given, where=where)
        object.__setattr__(self, "subjects", subjects)
        super().__post_init__()
        if isinstance(self.strength, (int, float)) and not 0.0 <= self.strength < math.inf:
            raise DitAttnError(f"{self.slug}.strength must be hard, or at least 0 and finite, got {self.strength!r}")
        missing = next((one["piece"] for one in subjects if not has_region(one)), None)
        if missing is not None:
            raise DitAttnError(f"{self.slug}: the subject {missing!r} has no region; give it a box or a mask")
        if self.overlap == "refuse":
            check_overlap(subjects)
        sites = ("text",) * self.isolate_text + ("self",) * self.isolate_image
        object.__setattr__(self, "sites", sites or ("text",))

    @property
    def _subjects(self) -> tuple[Subject, ...]:
        assert not isinstance(self.subjects, str)
        return self.subjects

    def request(self, call: AttentionCall, request: Request) -> None:
        """Add the biases of a call."""
        assert call.tokens is not None
        if len(self.subjects) < 2 or not self.strength or not in_steps(call.clock, self.start, self.stop):
            return
        if call.tokens.grid is None:
            request.decline("subjects need one image or video in the sequence")
            return
        words = self._words(call)
        state = call.layer.state
        key = (id(self), call.kind, call.tokens, call.q.shape, call.k.shape[1], call.branches)
        known, biases = state.get(key, (None, []))
        if known is None or any(a is not b for a, b in zip(known, words, strict=True)):
            biases = self._biases(call, words)
            state[key] = words, biases
        request.biases += biases

    def _words(self, call: AttentionCall) -> list[torch.Tensor]:
        """Which keys the piece of every subject is, n times (B, Sk) bool; none where no text is attended to."""
        if not self.isolate_text or not call.attends_to_text:
            return []
        pieces = [one["piece"] for one in self._subjects]
        return [call.prompt_tokens(piece if isinstance(piece, str) else tuple(piece)) for piece in pieces]

    def _biases(self, call: AttentionCall, words: Sequence[torch.Tensor]) -> list[RowBias]:
        assert call.tokens is not None and call.tokens.grid is not None
        regions = regions_of(self._subjects, call.tokens.grid, self.overlap)
        rows = visual_masks(regions, call.tokens)[:, None]
        value = -math.inf if self.strength == "hard" else -float(self.strength)
        owned = []
        if words:
            owned.append(torch.stack(list(words)).cpu())
        if self.isolate_image and call.kind == "self":
            owned.append(rows)
        found = [
            span_bias(call.q, call.k, barred, keys, value, call.shard)
            for members in owned
            for barred, keys in barriers(rows, members)
        ]
        return [bias for bias in found if bias is not None]


def barriers(rows: torch.Tensor, keys: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield rows and the keys that they must not attend to: those of other subjects and of none of their own.

    Args:
        rows: (n, B|1, S) bool, rows of every subject.
        keys: (n, B|1, Sk) bool, keys of every subject.

    Yields:
        (B|1, S) and (B|1, Sk) bool, one pair for every set of subjects that has keys in common.
    """
    index = 2 ** torch.arange(len(keys), dtype=torch.int64)
    sets = (keys.long() * index[:, None, None]).sum(0)
    for number in sets.unique().tolist():
        owners = (number & index) > 0
        barred = rows.any(0) & ~rows[owners].any(0)
        if number and bool(barred.any()):
            yield barred, sets == number
