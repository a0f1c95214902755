"""What the gate accepts: true defects that it was not fitted on, and normal texture in the place of a defect.

``python benchmarks/anomaly/measure_gate.py --output benchmarks/anomaly/gate.json`` takes every product and defect of
the inspection world at 64 pixels. No model takes part: the control is another normal piece inside the mask.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from dit_attn import files
from dit_attn.eval.inspection_world.world import FIRST_HELD_OUT_SEED, HELD_OUT_PAIRS, Drawing, Piece, draw, pairs
from dit_attn.models.evaluate import current_commit, interval
from dit_attn.models.export import environment
from dit_attn.pipelines.anomaly.gate import Gate
from dit_attn.pipelines.anomaly.masks import MaskSource, foreground

SHOTS, TESTS, NORMALS = (1, 3, 5), 30, 64


def piece(product: str, defect: str, number: int) -> Drawing:
    """A piece that no training draws."""
    return draw(Piece(product, defect, FIRST_HELD_OUT_SEED + number), 64)


def accepted(product: str, defect: str, shots: int) -> tuple[int, int]:
    """Of `TESTS` each: true defects, and masks filled with another normal piece, that a gate of `shots` accepts."""
    given = [piece(product, defect, 1000 + i) for i in range(shots)]
    rng, masks = np.random.default_rng(0), MaskSource("real", [one.mask for one in given])
    normals = []
    for i in range(NORMALS):
        pixels = (piece(product, "", 2000 + i).image * 255).round().astype(np.uint8)
        normals.append((pixels / 255, masks.sample(foreground(pixels), rng)))
    gate = Gate.fit([(one.image, one.mask) for one in given], normals)
    true = false = 0
    for i in range(TESTS):
        test, other = piece(product, defect, 3000 + i), piece(product, "", 4000 + i)
        redrawn = np.where(test.mask[..., None], other.image, test.normal)
        true += not gate.verdict(gate.score(test.image, test.normal, test.mask))
        false += not gate.verdict(gate.score(redrawn, test.normal, test.mask))
    return true, false


def main() -> None:
    """Measure and write the record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for shots in SHOTS:
        found = {f"{p}+{d}": accepted(p, d, shots) for p, d in [*pairs(), *HELD_OUT_PAIRS]}
        total = TESTS * len(found)
        row: dict[str, Any] = {"shots": shots, "of": total}
        for place, name in enumerate(("true_defects", "normal_texture")):
            count = sum(one[place] for one in found.values())
            row[name] = {"accepted": count, "share": round(count / total, 4), "ci95": interval(count, total)}
        rows.append({**row, "pairs": found})
        print(shots, row, flush=True)
    files.write_json(given.output, {
        "what": "accepted by the gate: held-out true defects, and another normal piece inside the mask",
        "command": "python benchmarks/anomaly/measure_gate.py --output benchmarks/anomaly/gate.json",
        "commit": current_commit(), "environment": environment(), "rows": rows,
    })  # fmt: skip


if __name__ == "__main__":
    main()
