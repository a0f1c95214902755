"""Verifier of edited scenes: which pieces of the instruction an image follows, and which objects it leaves alone.

The objects of the image are assigned to those of the scene after the edit as in ``shapes_world.multi_verify``. A piece
is followed where the words that it changes are right; a move needs the object's color and shape at the new place, too,
and what is removed or moved away must be gone from the old one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from dit_attn.eval.shapes_world.edits import Edit, Piece
from dit_attn.eval.shapes_world.multi import PLACES, SceneObject
from dit_attn.eval.shapes_world.multi_verify import ObjectVerdict, assign, judge_object
from dit_attn.eval.shapes_world.verify import DetectedObject, as_array, background_of, segment

NEAR = 0.15  # of the canvas: closer to its old place, an object has not left it; the nearest other place is .25 away
_WORDS = {
    "recolor": ("color",),
    "resize": ("size",),
    "reshape": ("shape",),
    "move": ("place", "color", "shape"),
    "add": ("size", "color", "shape", "place"),
}


@dataclass(frozen=True)
class EditVerdict:
    """What is right about an edited image.

    Attributes:
        followed: of each piece, in the order of the instruction.
        kept: of each object that no piece names, whether all its words are as before.
        background: it is that of the scene after the edit.
        count: there are as many objects as in that scene.
    """

    followed: tuple[bool, ...]
    kept: tuple[bool, ...]
    background: bool
    count: bool

    def attributes(self) -> dict[str, bool]:
        """Return what is right of the full image: all pieces followed, all other objects kept, background, count."""
        return {
            "followed": all(self.followed),
            "kept": all(self.kept),
            "background": self.background,
            "count": self.count,
        }


def judge_edit(image: Any, edit: Edit) -> EditVerdict:
    """Check every piece of `edit`, every object that it leaves alone, the background and the number of objects.

    Args:
        image: PIL image, (H, W, 3) array or (3, H, W) tensor in [0, 1].
        edit: the scene before and the instruction.

    Raises:
        DitAttnError: no image.
    """
    pixels, after = as_array(image), edit.target
    found = segment(pixels)
    owners = assign([one for one, _ in found], after)
    left = [one for i, (one, _) in enumerate(found) if i not in owners]
    verdicts = [
        ObjectVerdict() if at is None else judge_object(pixels, *found[at], one, after)
        for one, at in zip(after.objects, owners, strict=True)
    ]
    by_shape = dict(zip((one.shape for one in after.objects), verdicts, strict=True))
    ground = background_of(pixels) == after.background
    everything = [one for one, _ in found]
    followed = tuple(_followed(piece, edit, by_shape, everything, left, ground) for piece in edit.pieces)
    kept = tuple(_all_words(by_shape[one.shape]) for one in edit.untouched)
    return EditVerdict(followed, kept, ground, len(found) == len(after.objects))


def _followed(
    piece: Piece,
    edit: Edit,
    verdicts: dict[str, ObjectVerdict],
    found: list[DetectedObject],
    left: list[DetectedObject],
    ground: bool,
) -> bool:
    if piece.kind == "background":
        return ground
    if piece.kind in ("remove", "move"):
        (old,) = (one for one in edit.source.objects if one.shape == piece.target)
        if not _is_gone(old, found, left):
            return False
    if piece.kind == "remove":
        return True
    shape = piece.added.shape if piece.added is not None else piece.value if piece.kind == "reshape" else piece.target
    return all(getattr(verdicts[shape], word) for word in _WORDS[piece.kind])


def _is_gone(old: SceneObject, found: list[DetectedObject], left: list[DetectedObject]) -> bool:
    """Tell whether nothing like `old` is at its place, and nothing left over when the scene after has been found."""
    alike = [one for one in found if (one.shape, one.color) == (old.shape, old.color)]
    x, y = PLACES[old.place]
    return all(float(np.hypot(one.x - x, one.y - y)) > NEAR for one in [*alike, *left])


def _all_words(verdict: ObjectVerdict) -> bool:
    return verdict.color and verdict.shape and verdict.size and verdict.place
