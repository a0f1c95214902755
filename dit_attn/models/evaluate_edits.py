"""Does a model that edits images follow its instructions, and leave the rest alone? Held-out edits, the stock pipeline.

`python -m dit_attn.models.evaluate tiny-edit` scores with this module. Scenes before the edit are drawn without shifts.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dit_attn.contact_sheet import flow, tile
from dit_attn.eval.shapes_world import edit_samples, edits
from dit_attn.eval.shapes_world.edit_verify import EditVerdict, judge_edit
from dit_attn.models import omnigen
from dit_attn.models.rates import RIGHT, WRONG, rate

if TYPE_CHECKING:
    from PIL.Image import Image

FOLLOWED, KEPT = 0.6, 0.8  # least shares of single edits followed and of untouched objects kept, for weights to ship


@dataclass(frozen=True)
class EditSample:
    """One edited image with its verdict.

    Args:
        edit: the scene before and the instruction.
        source: (H, W, 3) image before, in [0, 1].
        output: the same after.
        verdict: what is right about it.
    """

    edit: edits.Edit
    source: np.ndarray
    output: np.ndarray
    verdict: EditVerdict


def generate(
    pipeline: Any, items: Sequence[edits.Edit], call: dict[str, Any], seed: int, batch: int = 8
) -> list[EditSample]:
    """Edit one image per item through the stock `pipeline`; item i always gets the noise of `seed + i`.

    Instructions of a batch are sorted by length: the pipeline takes rotary positions from the first, which must be the
    longest.

    Args:
        call: keyword arguments of the call, `height` and `width` among them.
    """
    from PIL import Image as pil

    drawn = edit_samples.render_pairs(items, call["height"], call["width"])[0].permute(0, 2, 3, 1).numpy()
    prompts = [omnigen.prompt_of(edits.instruction(item.pieces)) for item in items]
    lengths = [len(ids) for ids in pipeline.tokenizer(prompts).input_ids]
    order = sorted(range(len(items)), key=lambda i: -lengths[i])
    out: dict[int, EditSample] = {}
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        images = [[pil.fromarray((drawn[i] * 255).round().astype(np.uint8))] for i in rows]
        generators = [torch.Generator().manual_seed(seed + i) for i in rows]
        made = pipeline(
            [prompts[i] for i in rows], input_images=images, generator=generators, output_type="np", **call
        ).images
        for i, image in zip(rows, made, strict=True):
            out[i] = EditSample(items[i], drawn[i], image, judge_edit(image, items[i]))
    return [out[i] for i in range(len(items))]


def table(samples: Sequence[EditSample]) -> dict[str, Any]:
    """Compute how often pieces are followed and untouched objects kept, with 95 % Wilson intervals.

    Returns:
        ``single_edits``: instructions of one piece that are followed; ``pieces``: pieces followed, by their number in
        the instruction; ``kinds``: the same by what they change; ``untouched``: objects that no piece names and whose
        words are all as before; ``background``: it is that of the scene after; ``whole_edit``: all of these, and the
        number of objects. ``seen_pairs`` and ``never_seen_pairs`` are whole edits by the pairs of color and shape.
        ``passed``: single edits and untouched objects reach what weights must reach to ship.
    """
    by_number = {n: [s for s in samples if len(s.edit.pieces) == n] for n in range(1, edits.MOST_PIECES + 1)}
    judged = [(p.kind, ok) for s in samples for p, ok in zip(s.edit.pieces, s.verdict.followed, strict=True)]
    whole = [(edit_samples.never_seen(s.edit), all(s.verdict.attributes().values())) for s in samples]
    figures: dict[str, Any] = {
        "single_edits": rate(ok for s in by_number[1] for ok in s.verdict.followed),
        "pieces": {str(n): rate(ok for s in by_number[n] for ok in s.verdict.followed) for n in by_number},
        "kinds": {kind: rate(ok for name, ok in judged if name == kind) for kind in edits.KINDS},
        "untouched": rate(ok for s in samples for ok in s.verdict.kept),
        "background": rate(s.verdict.background for s in samples),
        "whole_edit": rate(ok for _, ok in whole),
        "seen_pairs": rate(ok for new, ok in whole if not new),
        "never_seen_pairs": rate(ok for new, ok in whole if new),
    }
    reached = figures["single_edits"]["accuracy"] >= FOLLOWED and figures["untouched"]["accuracy"] >= KEPT
    return {**figures, "passed": reached}


def evaluate(
    pipeline: Any, call: dict[str, Any], count: int = 200, seed: int = 0, batch: int = 8
) -> tuple[dict[str, Any], list[EditSample]]:
    """Score `count` held-out edits, with each number of pieces in turn: `table` with timing, and the samples."""
    items = edit_samples.held_out_sample(count, seed)
    pipeline.set_progress_bar_config(disable=True)
    started = time.perf_counter()
    samples = generate(pipeline, items, call, seed, batch)
    seconds = time.perf_counter() - started
    result = {"edits": len(samples), "seed": seed, "batch": batch, "call": call}
    return {**result, "seconds_per_sample": round(seconds / max(1, len(samples)), 3), **table(samples)}, samples


def short(figures: dict[str, Any]) -> dict[str, float]:
    """Pick the figures that a training logs."""
    out = {name: figures[name]["accuracy"] for name in ("single_edits", "untouched", "background", "whole_edit")}
    return out | {f"pieces:{number}": cell["accuracy"] for number, cell in figures["pieces"].items()}


def report_lines(figures: dict[str, Any]) -> list[str]:
    """Say the figures in words."""

    def percent(cells: dict[str, Any]) -> str:
        shown = {name: cell for name, cell in cells.items() if cell["of"]}
        return ", ".join(f"{name} {100 * cell['accuracy']:.0f} %" for name, cell in shown.items())

    main = {name.replace("_", " "): figures[name] for name in ("single_edits", "untouched", "background", "whole_edit")}
    verdict = "passed" if figures["passed"] else "not passed"
    return [
        f"on {figures['edits']} held-out edits: {percent(main)}",
        f"pieces followed, by their number in the instruction: {percent(figures['pieces'])}",
        f"pieces followed, by what they change: {percent(figures['kinds'])}",
        f"gate, {FOLLOWED:.0%} of single edits followed and {KEPT:.0%} of untouched objects kept: {verdict}",
    ]


def contact_sheet(samples: Sequence[EditSample], height: int = 128, columns: int = 4) -> Image:
    """Draw each image before and after with its instruction; green where all is right, wrong pieces in the note."""
    cells = []
    for sample in samples:
        verdict = sample.verdict
        pairs = zip(sample.edit.pieces, verdict.followed, strict=True)
        wrong = [edits.write_piece(piece) for piece, ok in pairs if not ok]
        wrong += [f"the {one.shape}" for one, ok in zip(sample.edit.untouched, verdict.kept, strict=True) if not ok]
        wrong += ["background"] * (not verdict.background) + ["count"] * (not verdict.count)
        note, border = (f"wrong: {', '.join(wrong)}", WRONG) if wrong else ("", RIGHT)
        pixels = (np.stack([sample.source, sample.output]) * 255).round().astype(np.uint8)
        cells.append(tile(pixels, edits.instruction(sample.edit.pieces), note, height, strip=2, border=border))
    return flow(cells, width=columns * (2 * height + 12))
