"""The quality figures compare like with like: the same captions and noise, dense first."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest

from dit_attn.pipelines import quality


def test_psnr_of_known_errors() -> None:
    black = np.zeros((4, 4, 3))
    assert quality.psnr(black, black) == math.inf
    assert quality.psnr(black, black + 0.1) == pytest.approx(20.0)


def test_a_run_writes_every_variant_with_its_settings(tmp_path: Path) -> None:
    file = tmp_path / "a" / "quality.json"
    arguments = ["tiny-image", "--density", "1.0", "0.25", "--count", "2", "--steps", "2", "--output", str(file)]
    assert quality.main(arguments) == 0
    variants = json.loads(file.read_text())["variants"]
    assert list(variants) == ["dense", "density 1.0", "density 0.25"]
    assert variants["density 1.0"]["bit_equal_to_dense"] == 2  # density 1 takes the stock path
    assert variants["density 0.25"]["bit_equal_to_dense"] == 0 and variants["density 0.25"]["psnr_to_dense_db"] > 5
    assert variants["density 0.25"]["method"]["density"] == 0.25
    assert variants["density 0.25"]["run_density"] == pytest.approx(0.25, abs=0.01)  # 0.1 of 2 steps rounds to none
    assert variants["dense"]["whole_caption"]["of"] == 2
