"""The arms of the benchmark of subjects: isolation, SaaS and their controls, each as methods and call arguments.

Subjects are the objects of a scene, or the pieces of an instruction.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import dit_attn
from dit_attn.eval.shapes_world import edits, multi
from dit_attn.eval.shapes_world.edits import Edit, Piece
from dit_attn.eval.shapes_world.multi import MultiScene, SceneObject
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.regions import regions_of, visual_masks
from dit_attn.processors.methods.base import Method

MARGIN = 0.06  # around an object, of the canvas, in its box
SCALES = (3.0, 4.0, 6.0, 8.0)  # guidance of the sweep; 2 is the models' own
EVERYWHERE = [0.0, 0.0, 1.0, 1.0]
Item = MultiScene | Edit
Arm = tuple[Callable[[Item], list[Method]], dict[str, Any]]


def subjects_of(item: Item) -> list[tuple[str, tuple[SceneObject, ...]]]:
    """The pieces of a prompt, each with the objects around which it acts; none: everywhere."""
    if isinstance(item, MultiScene):
        return [(f"{one.size} {one.color} {one.shape}", (one,)) for one in item.objects]
    return [(edits.write_piece(piece), _objects_of(piece, item)) for piece in item.pieces]


def _objects_of(piece: Piece, edit: Edit) -> tuple[SceneObject, ...]:
    """The object of a piece before the edit and, where it is another one or elsewhere, after it."""
    shape = piece.value if piece.kind == "reshape" else piece.added.shape if piece.added else piece.target
    before = [one for one in edit.source.objects if one.shape == piece.target]
    after = [one for one in edit.target.objects if one.shape == shape]
    return tuple(before + [one for one in after if piece.kind in ("add", "move")])


def box_of(one: SceneObject) -> list[float]:
    """A box around an object."""
    x, y = multi.PLACES[one.place]
    half = multi.SIZES[one.size] + MARGIN
    return [max(0.0, x - half), max(0.0, y - half), min(1.0, x + half), min(1.0, y + half)]


def boxes(item: Item) -> list[dict[str, Any]]:
    """The subjects with their boxes, one for each object; the full image where there is none."""
    return [
        {"piece": piece, "box": box}
        for piece, objects in subjects_of(item)
        for box in [box_of(one) for one in objects] or [EVERYWHERE]
    ]


def isolation(**settings: Any) -> Arm:
    """Isolation of all subjects."""
    return lambda item: [dit_attn.SubjectIsolation(subjects=tuple(boxes(item)), **settings)], {}


def with_sparse(arm: Arm) -> Arm:
    """The same with block-sparse attention at density 0.25."""
    sparse = dit_attn.BlockSparse(density=0.25, q_block=32, kv_block=32, dense_steps=0.1)
    return lambda item: [*arm[0](item), sparse], arm[1]


def with_isolation(arm: Arm) -> Arm:
    """The same with isolation of words and regions."""
    return lambda item: [*isolation(isolate_image=True)[0](item), *arm[0](item)], arm[1]


def guided(scale: float) -> Arm:
    """Plain guidance at another scale."""
    return lambda item: [], {"guidance_scale": scale}


@dataclass(frozen=True)
class Lift(Method):
    """Lift the words of some pieces by a fixed factor, each in a region.

    Attributes:
        lifts: objects with ``piece``, ``factor`` and ``box``.
    """

    sites: ClassVar[tuple[str, ...]] = ("text",)

    lifts: tuple[dict[str, Any], ...] = ()

    def request(self, call: AttentionCall, request: Request) -> None:
        """Add the biases."""
        if call.tokens is None or call.tokens.grid is None or not call.attends_to_text:
            return
        for lift in self.lifts:
            (rows,) = visual_masks(regions_of([lift], call.tokens.grid), call.tokens)
            request.add_span_bias(call, rows, call.prompt_tokens(lift["piece"]), math.log(lift["factor"]))


def lifted(factor: float, wrong: bool = False, everywhere: bool = False) -> Arm:
    """Each subject's words by a factor in its own box.

    Args:
        factor: of the attention before the softmax.
        wrong: lift the words of the next subject there.
        everywhere: lift in all of the image, as prompt weights do.
    """

    def methods(item: Item) -> list[Method]:
        pieces = [piece for piece, _ in subjects_of(item)]
        words = dict(zip(pieces, pieces[1:] + pieces[:1], strict=True)) if wrong else {}
        places = [{"piece": piece, "box": EVERYWHERE} for piece in pieces] if everywhere else boxes(item)
        return [
            Lift(
                lifts=tuple({**one, "piece": words.get(one["piece"], one["piece"]), "factor": factor} for one in places)
            )
        ]

    return methods, {}


def scaled(given: bool = False, **settings: Any) -> Arm:
    """SaaS on the subjects; ``given``: in their boxes, not in regions that are found."""
    if given:
        return lambda item: [dit_attn.SaaS(subjects=tuple(boxes(item)), **settings)], {}
    return lambda item: [dit_attn.SaaS(pieces=tuple(piece for piece, _ in subjects_of(item)), **settings)], {}


def found(**settings: Any) -> Arm:
    """Isolation whose regions are looked for."""

    def methods(item: Item) -> list[Method]:
        subjects = tuple({"piece": piece} for piece, _ in subjects_of(item))
        return [dit_attn.SubjectIsolation(subjects=subjects, **settings)]

    return methods, {}


STOCK: Arm = (lambda item: [], {})
STRONG: dict[str, Any] = {"strength": 16.0, "clamp": (1.0, 64.0), "stop": 1.0}
PAPER: dict[str, Any] = {"measure": "post", "clamp": None, "min_quality": 0.0}
ARMS: dict[str, dict[str, Arm]] = {
    "isolation": {
        "stock": STOCK,
        **{f"guidance {scale:g}": guided(scale) for scale in SCALES},
        "words": isolation(),
        "regions": isolation(isolate_text=False, isolate_image=True),
        "words and regions": isolation(isolate_image=True),
        "words, soft 2": isolation(strength=2.0),
        "words and regions, soft 2": isolation(isolate_image=True, strength=2.0),
        "words, first 40 %": isolation(stop=0.4),
        "words and regions, first 40 %": isolation(isolate_image=True, stop=0.4),
        "found words": found(),
        "found words and regions": found(isolate_image=True),
        "found, whatever the quality": found(isolate_image=True, min_quality=0.0),
        "block-sparse 0.25": with_sparse(STOCK),
        "words, block-sparse 0.25": with_sparse(isolation()),
        "words and regions, block-sparse 0.25": with_sparse(isolation(isolate_image=True)),
    },
    "saas": {
        "stock": STOCK,
        **{f"guidance {scale:g}": guided(scale) for scale in (2.2, *SCALES)},  # a lift changes little
        **{f"fixed {factor:g}": lifted(factor) for factor in (2.0, 4.0, 8.0, 16.0, 32.0)},
        "fixed 16, everywhere": lifted(16.0, everywhere=True),
        **{f"wrong words {factor:g}": lifted(factor, wrong=True) for factor in (4.0, 16.0)},
        "the paper's rule": scaled(**PAPER),
        "gated": scaled(),
        "strength 16": scaled(**STRONG),
        "strength 16, not gated": scaled(**STRONG, min_quality=0.0),
        "boxes given": scaled(given=True),
        "strength 16, boxes given": scaled(given=True, **STRONG),
        "not gated": scaled(min_quality=0.0),
        "closed loop 0.1": scaled(target=0.1, min_quality=0.0, stop=1.0),
        "closed loop 0.1, gated": scaled(target=0.1, stop=1.0),
        "isolation and gated": with_isolation(scaled()),
        "isolation and gated, block-sparse 0.25": with_sparse(with_isolation(scaled())),
    },
}


def arms_of(what: str, pieces: int, editing: bool) -> dict[str, Arm]:
    """The arms for prompts of some pieces.

    Isolation is for the objects of a scene, not for instructions; and there are no other words beside a single piece.
    """
    return {
        name: arm
        for name, arm in ARMS[what].items()
        if not (editing and "isolation" in name) and not (pieces == 1 and "wrong" in name)
    }
