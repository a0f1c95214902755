"""Regions of a picture in tokens: which visual tokens belong to which subject."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F

from dit_attn.errors import DitAttnError, shorten
from dit_attn.processors.core.subjects import Subject, box_at, boxes_of, check_mask_size, mask_of
from dit_attn.processors.core.tokens import Tokens

Grid = tuple[int, int, int]


def regions_of(subjects: Sequence[Subject], grid: Grid, overlap: str = "refuse") -> torch.Tensor:
    """Return the tokens of every subject's region on a grid, (n, T * H * W) bool.

    A token belongs to a region that covers more than half of it; a region that covers no token that far has the one it
    covers most.

    Args:
        subjects: subjects with regions.
        grid: (T, H, W) tokens.
        overlap: of :data:`~dit_attn.processors.core.subjects.OVERLAPS`. Without ``share``, regions are disjoint.

    Raises:
        DitAttnError: a mask of other proportions than the grid, or a region that others cover completely.
    """
    check_mask_size(subjects, (grid[2], grid[1]))
    covered = torch.stack([coverage(subject, grid).flatten() for subject in subjects])
    regions = covered > 0.5
    for row, amount in zip(regions, covered):
        if not row.any():
            row[int(amount.argmax())] = True
    return regions if overlap == "share" else disjoint(regions, covered, subjects, overlap == "smaller")


def disjoint(
    regions: torch.Tensor, weights: torch.Tensor, subjects: Sequence[Subject], smaller: bool = False
) -> torch.Tensor:
    """Return regions (n, N) without tokens in common.

    Args:
        regions: (n, N) bool.
        weights: (n, N); a token goes to the subject with the largest one, of equal ones to the smaller region.
        subjects: for messages.
        smaller: whether a token goes to the smaller region whatever the weights are.

    Raises:
        DitAttnError: a region is empty then, and was not before.
    """
    order = regions.sum(1).argsort(stable=True)  # small regions first: argmax takes the first of equal weights
    claims = torch.where(regions, torch.ones_like(weights) if smaller else weights, torch.zeros_like(weights))[order]
    owner = torch.full(regions.shape[1:], -1).where(~regions.any(0), order[claims.argmax(0)])
    out = torch.arange(len(regions))[:, None] == owner
    for subject, before, after in zip(subjects, regions, out):
        if before.any() and not after.any():
            raise DitAttnError(f"the region of {shorten(subject['piece'])} lies under others completely; move one")
    return out


def coverage(subject: Subject, grid: Grid) -> torch.Tensor:
    """Return how much of every token a subject's region covers, (T, H, W) fp32 in [0, 1].

    Boxes along a video stand at equal distances from its first frame to its last.
    """
    frames, height, width = grid
    mask = mask_of(subject)
    if mask is not None:
        pixels = torch.frombuffer(bytearray(mask.convert("L").tobytes()), dtype=torch.uint8).float() / 255
        pixels = pixels.reshape(1, 1, mask.height, mask.width)
        return F.interpolate(pixels, (height, width), mode="area")[0].expand(frames, -1, -1)
    boxes = boxes_of(subject)
    drawn = []
    for frame in range(frames):
        left, top, right, bottom = box_at(boxes, frame / max(1, frames - 1))
        drawn.append(_overlap(top, bottom, height)[:, None] * _overlap(left, right, width))
    return torch.stack(drawn)


def visual_masks(regions: torch.Tensor, tokens: Tokens) -> torch.Tensor:
    """Return regions of the generated image or video as tokens of the sequence, (n, S) bool.

    Args:
        regions: (n, N) bool, N tokens of the grid.
        tokens: the parts of the sequence.
    """
    span = next(span for span in tokens.visual if span.kind != "reference")
    out = torch.zeros(len(regions), tokens.seq_len, dtype=torch.bool)
    out[:, span.start : span.stop] = regions
    return out


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


def bounding_box(region: torch.Tensor, grid: Grid) -> tuple[float, float, float, float] | None:
    """Return (left, top, right, bottom) of a region (N,) bool as fractions, over all frames; ``None`` where empty."""
    shown = region.reshape(grid).any(0)
    rows, columns = shown.any(1).nonzero(), shown.any(0).nonzero()
    if not len(rows):
        return None
    _, height, width = grid
    return (
        int(columns[0]) / width, int(rows[0]) / height, (int(columns[-1]) + 1) / width, (int(rows[-1]) + 1) / height
    )  # fmt: skip


def _overlap(low: float, high: float, count: int) -> torch.Tensor:
    """Part of each of ``count`` equal cells of [0, 1] that lies between two bounds, (count,) fp32."""
    edges = torch.arange(count + 1, dtype=torch.float64) / count
    return ((edges[1:].clamp(max=high) - edges[:-1].clamp(min=low)) * count).clamp(0.0, 1.0).float()
