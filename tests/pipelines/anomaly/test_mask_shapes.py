"""Figures of masks: known shapes have known ones."""

from __future__ import annotations

import numpy as np
import pytest

from dit_attn.pipelines.anomaly.mask_shapes import describe, distance, nearest_overlap


def test_a_disk_is_round_and_smooth_and_a_line_is_long():
    y, x = np.mgrid[:41, :41] - 20
    disk, line = np.hypot(x, y) <= 12, np.zeros((41, 41), bool)
    line[20, 5:35] = True
    found = describe(disk)
    assert found["area"] == disk.sum() and found["number of parts"] == 1
    assert found["elongation"] == pytest.approx(1, abs=0.02) and found["roughness"] == pytest.approx(0.9, abs=0.1)
    assert describe(line)["elongation"] > 10
    comb = disk.copy()
    comb[::2] = False
    assert describe(comb)["roughness"] > 2 * found["roughness"] and describe(comb)["number of parts"] > 5


def test_equal_samples_have_no_distance_and_disjoint_ones_have_1():
    assert distance([1, 2, 3], [1, 2, 3]) == 0 and distance([1, 2, 3], [7, 8]) == 1


def test_a_mirrored_and_moved_copy_of_a_shot_is_found():
    shape = np.zeros((9, 14), bool)
    shape[1:8, 2:5] = shape[1:3, 2:12] = True
    copy = np.pad(shape[:, ::-1], 5)
    assert nearest_overlap(copy, [np.ones((3, 3), bool), shape]) == 1
    assert nearest_overlap(np.ones((7, 10), bool), [shape]) == pytest.approx(shape.sum() / 70)
