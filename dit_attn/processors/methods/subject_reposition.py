"""Reposition of subjects (IR-Diffusion, arXiv 2411.19261): a subject is drawn, or referred to, at another place.

The paper resamples the features of a reference image into the box of its subject. The place of a token is its
coordinates in a rotary embedding, or the row of a table that is added to it, so that features stay as they are here:
tokens of one box get the coordinates of another, or rows of the table that are resampled.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from dit_attn.errors import DitAttnError, shorten
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.positions import PositionMap, PositionSite
from dit_attn.processors.core.regions import Grid, barriers, regions_of, visual_masks
from dit_attn.processors.core.subjects import Subject, box_at, boxes_of, check_overlap, subjects_of
from dit_attn.processors.core.tokens import Span
from dit_attn.processors.methods.base import Method, in_steps, setting

Box = tuple[float, ...]
_WHOLE = [0.0, 0.0, 1.0, 1.0]


@dataclass(frozen=True, kw_only=True)
class SubjectReposition(Method):
    """Move subjects by the positions of their tokens, in the model's rotary embedding or its table of positions.

    Without subjects, and where every subject comes from its own box, a run is bit-equal to the stock one.

    Attributes:
        subjects: pieces of the prompt, each with the ``box`` where it belongs and ``from``, the box where the model
            draws it, or where it is in the reference image with the number ``reference``; see
            :func:`~dit_attn.processors.core.subjects.parse_subjects`; or a JSON file of them. Those without ``from``
            and ``reference`` stay.
        mutual: whether the rows of a subject's box are barred from the reference tokens of other subjects.
        density_correct: whether the weight of a moved reference is divided by how many of its tokens come to lie on
            one of the picture.
        start, stop: first and last + 1 step, as fractions of the run or counts.

    Raises:
        DitAttnError: a value out of range, subjects that are none, boxes that overlap, or ``from`` without a box.
    """

    slug: ClassVar[str] = "reposition"

    subjects: str | tuple[dict[str, Any], ...] = setting((), "pieces of the prompt with boxes, or their file")
    mutual: bool = setting(True, "bar a subject's box from the references of the others")
    density_correct: bool = setting(False, "divide the weight of a reference by its tokens per token of the picture")
    start: float | int = setting(0.0, "first step (fraction or count)", low=0)
    stop: float | int = setting(1.0, "last step + 1 (fraction or count)", low=0)

    def __post_init__(self) -> None:
        subjects = subjects_of(self.subjects, f"{self.slug}.subjects")
        object.__setattr__(self, "subjects", subjects)
        super().__post_init__()
        check_overlap(self._moved)

    @property
    def _moved(self) -> list[Subject]:
        """The subjects that come from somewhere."""
        assert not isinstance(self.subjects, str)
        return [one for one in self.subjects if "from" in one or "reference" in one]

    @property
    def moves_positions(self) -> bool:
        """Whether a subject is to be moved."""
        return any(box != source_of(one) for one in self._moved for box in boxes_of(one))

    @property
    def resamples_tables(self) -> bool:
        """Whether rows between those of an added table may be taken: always."""
        return True

    def positions(self, site: PositionSite) -> tuple[PositionMap, ...] | None:
        """Return the maps of all subjects, made once for a run and its shapes."""
        if site.grid is None or not self._moved or not in_steps(site.clock, self.start, self.stop):
            return None
        key = (id(self), "maps", site.visual)
        if key not in site.layer.state:
            site.layer.state[key] = self._maps(site.visual, site.grid)
        return site.layer.state[key]

    def request(self, call: AttentionCall, request: Request) -> None:
        """Add the biases of moved references; boxes within the picture need none."""
        assert call.tokens is not None
        named = [one for one in self._moved if "reference" in one]
        if not named or not in_steps(call.clock, self.start, self.stop):
            return
        grid = call.tokens.grid
        if grid is None:
            request.decline("subjects need one image or video in the sequence")
            return
        batch = call.q.shape[0]
        images = [call.tokens.references(call.layer.rows[0] + row) for row in range(batch)]
        shown = [row for row in range(batch) if images[row]]  # of a prompt with images among its words
        rows = visual_masks(regions_of(self._moved, grid), call.tokens)[:, None]
        keys = rows.new_zeros(len(rows), batch, rows.shape[-1])
        thinned = torch.zeros(len(rows), batch, 1, dtype=torch.float64)
        for at, one in enumerate(self._moved):
            if "reference" not in one:
                continue
            for row in shown or [0]:
                span = reference_of(one, images[row])
                keys[at, row, span.start : span.stop] = tokens_in(source_of(one), span)
                density = area(source_of(one), span.grid) / area(box_at(boxes_of(one), 0.0), grid)
                thinned[at, row] = -math.log(density)
        for barred, theirs in barriers(rows, keys) if self.mutual else ():
            request.add_span_bias(call, barred, theirs, -math.inf)
        picture = next(span for span in call.tokens.visual if span.kind != "reference")
        for mine, value in zip(keys, thinned) if self.density_correct else ():
            request.add_span_bias(call, slice(picture.start, picture.stop), mine, value)

    def _maps(self, visual: tuple[Span, ...], grid: Grid) -> tuple[PositionMap, ...]:
        """One map for every subject, and for every frame of one whose box moves."""
        picture = next(span for span in visual if span.kind != "reference")
        count = sum(span.length or 0 for span in visual)
        known = any(span.kind == "reference" for span in visual)
        regions = regions_of(self._moved, grid).unflatten(1, grid)
        maps = []
        for one, region in zip(self._moved, regions):
            tokens, source, boxes = torch.zeros(count, dtype=torch.bool), source_of(one), boxes_of(one)
            if "reference" in one:
                if not known:  # they are among the words, or missing: `request` knows
                    continue
                span = reference_of(one, visual)
                tokens[span.start : span.stop] = tokens_in(source, span)
                maps.append(box_map(source, boxes[0], grid, tokens, span))
                continue
            for frame in range(grid[0]) if len(boxes) > 1 else (slice(None),):
                part = torch.zeros_like(region)
                part[frame] = region[frame]
                tokens = torch.zeros(count, dtype=torch.bool)
                tokens[picture.start : picture.stop] = part.flatten()
                time = 0.0 if isinstance(frame, slice) else frame / max(1, grid[0] - 1)
                maps.append(box_map(box_at(boxes, time), source, grid, tokens))
        return tuple(maps)


def box_map(box: Any, other: Any, grid: Grid, region: torch.Tensor, reference: Span | None = None) -> PositionMap:
    """Return the map that gives the tokens of one box the coordinates of another.

    With tokens of size 1 whose centers are at p + 1/2, and the edges a, b of the boxes in tokens: p goes to
    ``(p + 1/2 - a) * |other| / |box| + b - 1/2``, per axis.

    Args:
        box, other: (left, top, right, bottom) as fractions of the picture.
        grid: (T, H, W) tokens.
        region: (Sv,) bool, the visual tokens in ``box``.
        reference: the reference image that ``box`` is in, of any size; default: the picture itself.
    """
    own = grid if reference is None or reference.grid is None else reference.grid
    scale, offset = [1.0], [0.0]
    for axis in (1, 0):  # h, w
        sides = [(one[axis] * n[2 - axis], one[axis + 2] * n[2 - axis]) for one, n in ((box, own), (other, grid))]
        (a, a_end), (b, b_end) = sides
        factor = round((b_end - b) / (a_end - a), 9)
        scale.append(factor)
        offset.append(round((0.5 - a) * factor + b - 0.5, 9))
    moves: dict[str, Any] = {"scale": tuple(scale), "offset": tuple(offset), "region": region}
    return PositionMap(**moves, anchor=None if reference is None else reference.start)


def source_of(subject: Subject) -> list[float]:
    """Return the box that a subject comes from; all of its reference image where none is given."""
    return subject.get("from", _WHOLE)


def reference_of(subject: Subject, visual: tuple[Span, ...]) -> Span:
    """Return the tokens of a subject's reference image.

    Raises:
        DitAttnError: the run has no such reference, or one of unknown size.
    """
    known, number = [span for span in visual if span.kind == "reference"], subject["reference"]
    if number > len(known):
        raise DitAttnError(
            f"{shorten(subject['piece'])} is in reference {number}, and this run has {len(known)} reference images; "
            "pass the image, or leave out the reference"
        )
    span = known[number - 1]
    if span.grid is None:
        raise DitAttnError(
            f"how many tokens wide the reference of {shorten(subject['piece'])} is, is not known for this model; leave "
            "out the reference"
        )
    return span


def tokens_in(box: list[float], image: Span) -> torch.Tensor:
    """Return the tokens of an image that a box covers by more than half, (H * W,) bool."""
    assert image.grid is not None
    return regions_of([{"piece": "", "box": box}], image.grid)[0]


def area(box: Any, grid: Grid | None) -> float:
    """Return the area of a box in tokens of an image."""
    assert grid is not None
    return float((box[2] - box[0]) * (box[3] - box[1])) * grid[1] * grid[2]
