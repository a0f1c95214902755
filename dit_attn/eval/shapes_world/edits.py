"""Edits of scenes of several objects: an instruction of one to four pieces, the scene before and the scene after.

    source = multi.parse("a large red circle at the left and a small blue cross at the right on white")
    pieces = parse("make the circle green, remove the cross")
    after = apply(source, pieces)        # a large green circle at the left on white

An object is named by its shape before the edit. Every piece has its own object, or adds one, or paints the background,
so that the order of the pieces does not matter. ``shapes_world.edit_samples`` draws random edits,
``shapes_world.edit_verify`` says which pieces an image follows.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from dit_attn.errors import DitAttnError
from dit_attn.eval.shapes_world import multi
from dit_attn.eval.shapes_world.multi import PLACES, SIZES, MultiScene, SceneObject
from dit_attn.eval.shapes_world.world import BACKGROUNDS, COLORS, SHAPES

MOST_PIECES = 4
KINDS = ("recolor", "resize", "reshape", "move", "remove", "add", "background")
OF_OBJECTS = KINDS[:5]  # kinds that change an object that is there
EXAMPLE = "make the circle green, remove the cross"


@dataclass(frozen=True)
class Piece:
    """One change.

    Args:
        kind: one of ``KINDS``.
        target: shape of the object to change, before the change; "" for ``add`` and ``background``.
        value: the new color, size, shape, place or background; "" for ``remove`` and ``add``.
        added: the new object of ``add``.
    """

    kind: str
    target: str = ""
    value: str = ""
    added: SceneObject | None = None


@dataclass(frozen=True)
class Edit:
    """A scene, the pieces of an instruction, and the scene that they make of it.

    Raises:
        DitAttnError: the pieces cannot be applied to the scene, or make no scene of it.
    """

    source: MultiScene
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        apply(self.source, self.pieces)

    @property
    def target(self) -> MultiScene:
        """Return the scene after the edit."""
        return apply(self.source, self.pieces)

    @property
    def untouched(self) -> tuple[SceneObject, ...]:
        """List the objects that no piece names."""
        named = {piece.target for piece in self.pieces}
        return tuple(one for one in self.source.objects if one.shape not in named)


def apply(source: MultiScene, pieces: Sequence[Piece]) -> MultiScene:
    """Return `source` after `pieces`: the objects that are left in their order, then the one that is added.

    Raises:
        DitAttnError: an object is missing or named twice, a piece changes nothing, or the result is no scene.
    """
    if not 1 <= len(pieces) <= MOST_PIECES:
        raise DitAttnError(f"an instruction has 1 to {MOST_PIECES} pieces, got {len(pieces)}")
    named = [piece.target or piece.kind for piece in pieces]
    twice = next((name for name in named if named.count(name) > 1), None)
    if twice:
        raise DitAttnError(f"two pieces change the {twice}; give each its own")
    objects = {one.shape: one for one in source.objects}
    background = source.background
    for piece in pieces:
        if piece.kind == "background":
            _changes(piece, background)
            background = piece.value
        elif piece.added is not None:
            objects["added"] = piece.added
        elif piece.target not in objects:
            raise DitAttnError(f"the scene has no {piece.target} to {piece.kind}; it has {', '.join(objects)}")
        elif piece.kind == "remove":
            del objects[piece.target]
        else:
            word = _WORD[piece.kind]
            _changes(piece, getattr(objects[piece.target], word))
            objects[piece.target] = replace(objects[piece.target], **{word: piece.value})
    return MultiScene(tuple(objects.values()), background)


_WORD = {"recolor": "color", "resize": "size", "reshape": "shape", "move": "place"}


def _changes(piece: Piece, old: str) -> None:
    if piece.value == old:
        raise DitAttnError(f"{write_piece(piece)!r} changes nothing: it is {old} already")


# ------------------------------------------------------------------------------------------- instructions


def instruction(pieces: Sequence[Piece]) -> str:
    """Write `pieces` as one instruction; :func:`parse` inverts it."""
    return ", ".join(write_piece(piece) for piece in pieces)


def write_piece(piece: Piece) -> str:
    """Write one piece: "make the circle red", "move the cross to the top left", "add a small red square at the top"."""
    if piece.added is not None:
        one = piece.added
        return f"add a {one.size} {one.color} {one.shape} at the {one.place}"
    return _SENTENCE[piece.kind].format(target=piece.target, value=piece.value)


_SENTENCE = {
    "recolor": "make the {target} {value}",
    "resize": "make the {target} {value}",
    "reshape": "turn the {target} into a {value}",
    "move": "move the {target} to the {value}",
    "remove": "remove the {target}",
    "background": "make the background {value}",
}


def _any(words: Sequence[str]) -> str:
    return f"({'|'.join(sorted(words, key=len, reverse=True))})"


_PATTERNS: dict[str, re.Pattern[str]] = {
    kind: re.compile(_SENTENCE[kind].format(target=_any(SHAPES), value=_any(list(values))))
    for kind, values in (
        ("recolor", COLORS),
        ("resize", SIZES),
        ("reshape", SHAPES),
        ("move", PLACES),
        ("remove", ()),
        ("background", BACKGROUNDS),
    )
}
_ADD = re.compile(rf"add a {_any(list(SIZES))} {_any(list(COLORS))} {_any(SHAPES)} at the {_any(list(PLACES))}")
_SEPARATOR = re.compile(r" ?[,.;] ?(?:and )?| and ")


def parse(text: str) -> tuple[Piece, ...]:
    """Return the pieces of an instruction; they are joined by commas or "and".

    Raises:
        DitAttnError: a piece is none of this world.
    """
    parts = [part for part in _SEPARATOR.split(" ".join(text.lower().split())) if part]
    found = [_read(part) for part in parts]
    wrong = next((part for part, piece in zip(parts, found, strict=True) if piece is None), None)
    if wrong is not None or not found:
        raise DitAttnError(f"{wrong or text!r} is no edit of this world; write it like {EXAMPLE!r}")
    return tuple(piece for piece in found if piece is not None)


def _read(part: str) -> Piece | None:
    if added := _ADD.fullmatch(part):
        size, color, shape, place = added.groups()
        return Piece("add", added=SceneObject(shape, color, size, place))
    for kind, pattern in _PATTERNS.items():
        if match := pattern.fullmatch(part):
            words = match.groups()
            if kind == "background":
                return Piece(kind, value=words[0])
            return Piece(kind, words[0], words[1] if kind != "remove" else "")
    return None


def vocabulary() -> list[str]:
    """List every word that an instruction can contain, sorted."""
    verbs = {"make", "turn", "into", "move", "to", "remove", "add", "background"}
    return sorted(verbs | set(multi.vocabulary()))
