"""The density that an inspection advises."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from dit_attn.eval.report.density_advice import density_advice, density_for


def advised(*layers: tuple[float, float, float], bound: float = 0.2) -> Any:
    """Recall at density 0.1, 0.25 and 0.5 of each layer."""
    shape = (2, len(layers), 3, 2)
    values = torch.tensor(layers).T[:, None, :, None, None].expand(3, *shape)
    tensors = {f"recall_{share}": one.clone() for share, one in zip((10, 25, 50), values, strict=True)}
    tensors["blocks_90"] = torch.full(shape, bound)
    return density_advice({"block": 64, "axes": {"layer": [f"blocks.{i}" for i in range(len(layers))]}}, tensors)


def test_the_density_lies_where_the_curve_reaches_the_mass() -> None:
    assert density_for([(0.1, 0.5), (0.25, 0.8), (0.5, 1.0)], 0.9) == pytest.approx(0.375)
    assert density_for([(0.1, 0.95)]) == pytest.approx(0.1 * 0.9 / 0.95)
    assert density_for([(0.5, 0.8)]) == pytest.approx(0.75) and math.isnan(density_for([(0.5, math.nan)]))


def test_one_density_is_advised_rounded_up_and_each_layer_has_its_own() -> None:
    advice = advised((0.5, 0.8, 0.92), (0.7, 0.9, 0.98))
    assert advice.chip == "density 0.4" and advice.kind == "good"  # 0.85 at 0.25, 0.95 at 0.5
    covers = "a selection by the means of 64-token blocks covers 90 % of the attention."
    assert advice.sentence == f"Set density=0.4: then {covers}"
    assert advice.layers == {"blocks.0": pytest.approx(0.4583, abs=1e-3), "blocks.1": pytest.approx(0.25)}
    assert "blocks.1 needs 0.25, blocks.0 0.46: dit-attn calibrate" in advice.detail
    assert "below 0.20" in advice.detail and "rectified" not in advice.detail


def test_attention_that_is_spread_stays_dense() -> None:
    advice = advised((0.15, 0.3, 0.55), bound=0.88)
    assert (advice.kind, advice.chip) == ("none", "stay dense") and advice.sentence.startswith(
        "Leave it dense: only at"
    )
    assert "rectified-spaattn, re-ttention" in advice.detail and "needs" not in advice.detail


def test_a_layer_that_was_not_measured_has_no_density_and_no_say() -> None:
    advice = advised((0.7, 0.9, 0.98), (math.nan,) * 3)
    assert math.isnan(advice.layers["blocks.1"]) and advice.density == 0.25 and "blocks.1" not in advice.detail


def test_without_recall_nothing_is_advised() -> None:
    assert density_advice({"block": 64, "axes": {"layer": ["a"]}}, {"entropy": torch.ones(1, 1, 1, 1)}) is None
    assert advised((math.nan,) * 3) is None
