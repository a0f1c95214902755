"""Can a base model paint defects by their word alone? The gate of tiny-inspect, on pieces that it never saw.

Normal pieces and masks of the inspection world are painted with the word of the type, and with the prompt of the normal
product as the control. The normal twin and the true change are known exactly, so the ratio needs no estimate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dit_attn.contact_sheet import Tile, tile
from dit_attn.eval.inspection_world import world
from dit_attn.eval.inspection_world.measures import Measures, mean_change, measure
from dit_attn.pipelines.anomaly.generator import AnomalyGenerator
from dit_attn.pipelines.anomaly.orders import GenerateConfig, Order
from dit_attn.pipelines.anomaly.sheet import outlined

PASS_RATIO = 0.7  # mean over the pairs that the model was trained on
_REFERENCE = 20  # true defects that a ratio is measured against


@dataclass(frozen=True)
class Painted:
    """A piece painted by its word.

    Attributes:
        piece: what was asked for.
        image, mask: as painted.
        word, control: measures with the word of the type and with the prompt of the normal product.
    """

    piece: world.Piece
    image: np.ndarray
    mask: np.ndarray
    word: Measures
    control: Measures

    @property
    def cell(self) -> Tile:
        """A cell of a contact sheet."""
        note = f"ratio {self.word.ratio:.2f}, normal prompt {self.control.ratio:.2f}"
        return tile(outlined(self.image, self.mask)[None], world.caption(self.piece), note, height=160)


def evaluate_base(pipe: Any, resolution: int, count: int, seed: int = 0) -> tuple[dict[str, Any], list[Painted]]:
    """Paint ``count`` pieces over all pairs of product and defect: figures, and the pieces.

    Args:
        pipe: the base model.
        resolution: pixels.
        count: pieces in all, shared out evenly; pairs never trained on come last.
        seed: another one paints other pieces.
    """
    generator = AnomalyGenerator(pipe, None, GenerateConfig(seed=seed), resolution=resolution)
    pairs = world.pairs() + world.pairs(held_out=True)
    pieces = [
        world.Piece(*pairs[i % len(pairs)], world.FIRST_HELD_OUT_SEED + 10**9 * (seed + 1) + i) for i in range(count)
    ]
    painted: list[Painted] = []
    for start in range(0, count, generator.config.batch):
        painted += _paint(generator, pieces[start : start + generator.config.batch], resolution)
    seen = [one for one in painted if (one.piece.product, one.piece.defect) not in world.HELD_OUT_PAIRS]
    new = [one for one in painted if one not in seen]
    figures: dict[str, Any] = {"pieces": count, "seed": seed}
    figures |= {"seen_pairs": _figures(seen), "held_out_pairs": _figures(new)}
    figures["passed"] = bool(seen) and figures["seen_pairs"]["word"]["ratio"] >= PASS_RATIO
    names = [f"{product}+{defect}" for product, defect in pairs]
    groups = {name: [one for one in painted if f"{one.piece.product}+{one.piece.defect}" == name] for name in names}
    figures["pairs"] = {name: _figures(group) for name, group in groups.items() if group}
    return figures, painted


def _paint(generator: AnomalyGenerator, pieces: Sequence[world.Piece], resolution: int) -> list[Painted]:
    drawn = [world.draw(piece, resolution) for piece in pieces]
    orders = [
        Order(
            piece.product, piece.defect, i, 0, Path(), (one.normal * 255).round().astype(np.uint8), one.mask, piece.seed
        )
        for i, (piece, one) in enumerate(zip(pieces, drawn))
    ]
    results = [generator.make(orders, control=control) for control in (False, True)]
    out = []
    for piece, one, *made in zip(pieces, drawn, *results):
        reference = _reference(piece.product, piece.defect, resolution)
        word, control = (measure(m.image / 255, m.order.pixels / 255, one.mask, reference) for m in made)
        out.append(Painted(piece, made[0].image, one.mask, word, control))
    return out


def _reference(product: str, defect: str, size: int) -> np.ndarray:
    first = world.FIRST_HELD_OUT_SEED + 7 * 10**8
    return mean_change([world.draw(world.Piece(product, defect, first + i), size) for i in range(_REFERENCE)])


def _figures(painted: Sequence[Painted]) -> dict[str, Any]:
    """Means over pieces, with the word and with the control's prompt."""
    out: dict[str, Any] = {"of": len(painted)}
    for name in ("word", "control"):
        found = [getattr(one, name) for one in painted]
        if found:
            means = {key: float(np.mean([getattr(m, key) for m in found])) for key in ("ratio", "fill", "leak")}
            rounded = {key: round(value, 4) for key, value in means.items()}
            out[name] = {**rounded, "passed": sum(m.passed for m in found)}
    return out


def report_lines(figures: dict[str, Any]) -> list[str]:
    """Say the figures in words."""
    lines = []
    for key, label in (("seen_pairs", "pairs of the training"), ("held_out_pairs", "pairs never trained on")):
        group = figures[key]
        if group["of"]:
            word, control = group["word"], group["control"]
            lines.append(
                f"{label}, {group['of']} pieces: ratio {word['ratio']:.2f}, {word['passed']} pass (normal prompt "
                f"{control['ratio']:.2f}, {control['passed']} pass)"
            )
    verdict = "passed" if figures["passed"] else "not passed"
    return [*lines, f"gate, ratio of at least {PASS_RATIO:g} on pairs of the training: {verdict}"]
