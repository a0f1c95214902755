"""Random edits of scenes, for training or held out from it, and the images before and after.

drawn = sample_edits(16, torch.Generator().manual_seed(0))
before, after = render_pairs(drawn, 64)  # two times (16, 3, 64, 64) in [0, 1]
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from typing import Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.eval.shapes_world import multi
from dit_attn.eval.shapes_world.edits import KINDS, MOST_PIECES, OF_OBJECTS, Edit, Piece, instruction, write_piece
from dit_attn.eval.shapes_world.multi import PLACES, SIZES, MultiScene, SceneObject
from dit_attn.eval.shapes_world.world import BACKGROUNDS, COLORS, JITTER, SHAPES

TRIES = 20  # scenes drawn for the kinds of an instruction


def never_seen(edit: Edit) -> bool:
    """Tell whether a (color, shape) pair of the scene before or after is absent from all training scenes."""
    return multi.never_seen(edit.source) or multi.never_seen(edit.target)


def held_out(edit: Edit) -> bool:
    """Tell whether `edit` is for evaluation only: 1 in 8 by a hash, in any order, and all with a pair never seen."""
    objects = sorted(multi.caption(MultiScene((one,), edit.source.background)) for one in edit.source.objects)
    pieces = sorted(write_piece(piece) for piece in edit.pieces)
    digest = hashlib.sha256("; ".join([*objects, *pieces]).encode()).digest()
    return digest[0] % 8 == 0 or never_seen(edit)


def sample_edits(
    count: int, generator: torch.Generator, objects: tuple[int, int] = (1, 4), pieces: tuple[int, int] = (1, 4)
) -> list[Edit]:
    """Draw `count` random training edits.

    Args:
        objects: least and most objects of the scene before.
        pieces: least and most pieces of an instruction, each number as often.
    """
    rng = _rng(generator)
    return [_wanted(rng, objects, rng.randint(*pieces), held=False) for _ in range(count)]


def held_out_sample(count: int, seed: int = 0, pieces: tuple[int, int] = (1, MOST_PIECES)) -> list[Edit]:
    """Draw `count` different held-out edits, with each number of pieces in turn."""
    rng = _rng(torch.Generator().manual_seed(seed))
    low, high = pieces
    found: dict[tuple[str, str], Edit] = {}
    while len(found) < count:
        edit = _wanted(rng, (1, multi.MOST), low + len(found) % (high - low + 1), held=True)
        found.setdefault((multi.caption(edit.source), instruction(edit.pieces)), edit)
    return list(found.values())


def _rng(generator: torch.Generator) -> random.Random:
    return random.Random(int(torch.randint(2**62, (1,), generator=generator)))


def _wanted(rng: random.Random, objects: tuple[int, int], pieces: int, held: bool) -> Edit:
    """A random edit, drawn again until it is held out, or in training, as `held` says."""
    while (edit := _draw(rng, objects, pieces)) is None or held_out(edit) != held:
        pass
    return edit


def _draw(rng: random.Random, objects: tuple[int, int], pieces: int) -> Edit | None:
    """A random edit; ``None`` where a scene for the kinds drawn was not found. Kinds are drawn first: equally often."""
    kinds = [rng.choice(KINDS) for _ in range(pieces)]
    changed = sum(kind in OF_OBJECTS for kind in kinds)
    if max(kinds.count("add"), kinds.count("background")) > 1 or changed > objects[1]:
        return None
    for _ in range(TRIES):
        source = _scene(rng, rng.randint(max(changed, objects[0]), objects[1]))
        targets = iter(rng.sample(source.objects, changed))
        drawn = [_piece(rng, kind, next(targets) if kind in OF_OBJECTS else None, source) for kind in kinds]
        found = tuple(piece for piece in drawn if piece is not None)
        try:
            if len(found) == pieces:
                return Edit(source, found)
        except DitAttnError:  # objects that would overlap, or none that would be left
            continue
    return None


def _scene(rng: random.Random, count: int) -> MultiScene:
    places = list(rng.choice(multi.place_sets()[count]))
    rng.shuffle(places)
    words = zip(rng.sample(SHAPES, count), rng.sample(list(COLORS), count), places, strict=True)
    objects = tuple(SceneObject(shape, color, rng.choice(list(SIZES)), place) for shape, color, place in words)
    return MultiScene(objects, rng.choice(list(BACKGROUNDS)))


def _piece(rng: random.Random, kind: str, target: SceneObject | None, source: MultiScene) -> Piece | None:
    """A random piece of `kind`; new colors and shapes are none of the scene before. ``None`` where none is left."""
    free = {
        "recolor": [color for color in COLORS if color not in {one.color for one in source.objects}],
        "reshape": [shape for shape in SHAPES if shape not in {one.shape for one in source.objects}],
        "resize": [size for size in SIZES if target and size != target.size],
        "move": [place for place in PLACES if target and place != target.place],
        "background": [name for name in BACKGROUNDS if name != source.background],
    }
    if kind == "add":
        if not free["reshape"]:
            return None
        shape, color = rng.choice(free["reshape"]), rng.choice(free["recolor"])
        return Piece(kind, added=SceneObject(shape, color, rng.choice(list(SIZES)), rng.choice(list(PLACES))))
    shape = target.shape if target else ""
    if kind == "remove":
        return Piece(kind, shape)
    return Piece(kind, shape, rng.choice(free[kind])) if free[kind] else None


# ---------------------------------------------------------------------------------------------- drawing


def render_pairs(
    edits: Sequence[Edit],
    height: int,
    width: int | None = None,
    *,
    generator: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw the scenes before and after: two times (B, 3, height, width) in [0, 1].

    What is not changed stays where it is, to the pixel; an object that is moved keeps its shift from the place.

    Args:
        generator: CPU generator of the shift of each object before; added ones have none. None draws the exact places.
    """
    before, after = [], []
    for edit in edits:
        shifts = torch.zeros(len(edit.source.objects), 2)
        if generator is not None:
            shifts = (torch.rand(len(edit.source.objects), 2, generator=generator) * 2 - 1) * JITTER
        removed = {piece.target for piece in edit.pieces if piece.kind == "remove"}
        kept = [i for i, one in enumerate(edit.source.objects) if one.shape not in removed]
        added = sum(piece.added is not None for piece in edit.pieces)
        before.append(shifts)
        after.append(torch.cat([shifts[kept], torch.zeros(added, 2)]))
    size: Any = {"height": height, "width": width, "device": device}
    source = multi.render_scenes([edit.source for edit in edits], shifts=torch.cat(before), **size)
    return source, multi.render_scenes([edit.target for edit in edits], shifts=torch.cat(after), **size)
