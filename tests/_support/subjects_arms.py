"""The arms of the benchmark of subjects: isolation, SaaS and their controls, each as methods and call arguments."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import dit_attn
from dit_attn.eval.shapes_world import multi
from dit_attn.eval.shapes_world.multi import MultiScene, SceneObject
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.regions import regions_of, visual_masks
from dit_attn.processors.methods.base import Method

MARGIN = 0.06  # around an object, of the canvas, in its box
SCALES = (3.0, 4.0, 6.0, 8.0)  # guidance of the sweep; 2 is the models' own
Arm = tuple[Callable[[MultiScene], list[Method]], dict[str, Any]]


def subject(one: SceneObject, box: bool = True) -> dict[str, Any]:
    """A subject of an object: its size, color and shape, with a box around it."""
    x, y = multi.PLACES[one.place]
    half = multi.SIZES[one.size] + MARGIN
    region = {"box": [max(0.0, x - half), max(0.0, y - half), min(1.0, x + half), min(1.0, y + half)]} if box else {}
    return {"piece": f"{one.size} {one.color} {one.shape}", **region}


def isolation(**settings: Any) -> Arm:
    """Isolation of all objects."""
    return lambda scene: [dit_attn.SubjectIsolation(subjects=tuple(map(subject, scene.objects)), **settings)], {}


def with_sparse(arm: Arm) -> Arm:
    """The same with block-sparse attention at density 0.25."""
    sparse = dit_attn.BlockSparse(density=0.25, q_block=32, kv_block=32, dense_steps=0.1)
    return lambda scene: [*arm[0](scene), sparse], arm[1]


def with_isolation(arm: Arm) -> Arm:
    """The same with isolation of words and regions."""
    return lambda scene: [*isolation(isolate_image=True)[0](scene), *arm[0](scene)], arm[1]


def guided(scale: float) -> Arm:
    """Plain guidance at another scale."""
    return lambda scene: [], {"guidance_scale": scale}


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


def lifted(factor: float, wrong: bool = False) -> Arm:
    """Each object's words by a factor in its own box; ``wrong``: the words of the next object there."""

    def methods(scene: MultiScene) -> list[Method]:
        known = [subject(one) for one in scene.objects]
        words = known[1:] + known[:1] if wrong else known
        lifts = [{**a, "piece": b["piece"], "factor": factor} for a, b in zip(known, words, strict=True)]
        return [Lift(lifts=tuple(lifts))]

    return methods, {}


def scaled(**settings: Any) -> Arm:
    """SaaS on the objects."""

    def methods(scene: MultiScene) -> list[Method]:
        return [dit_attn.SaaS(pieces=tuple(subject(one)["piece"] for one in scene.objects), **settings)]

    return methods, {}


def found(**settings: Any) -> Arm:
    """Isolation whose regions are looked for."""

    def methods(scene: MultiScene) -> list[Method]:
        return [dit_attn.SubjectIsolation(subjects=tuple(subject(one, False) for one in scene.objects), **settings)]

    return methods, {}


STOCK: Arm = (lambda scene: [], {})
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
        **{f"guidance {scale:g}": guided(scale) for scale in SCALES},
        "fixed 2": lifted(2.0),
        "fixed 4": lifted(4.0),
        "wrong words 4": lifted(4.0, wrong=True),
        "the paper's rule": scaled(**PAPER),
        "gated": scaled(),
        "not gated": scaled(min_quality=0.0),
        "closed loop 0.1": scaled(target=0.1, min_quality=0.0, stop=1.0),
        "closed loop 0.1, gated": scaled(target=0.1, stop=1.0),
        "isolation and gated": with_isolation(scaled()),
        "isolation and gated, block-sparse 0.25": with_sparse(with_isolation(scaled())),
    },
}
