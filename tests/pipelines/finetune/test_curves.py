"""The curves of fine-tuning: a small run of all arms, its record, and how it goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dit_attn.pipelines.finetune import curves

SMALL = ["--count", "1", "--densities", "0.1", "--points", "0", "1", "--steps", "1"]


def test_every_arm_is_scored_before_and_after_training_and_a_second_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(curves, "CurveConfig", lambda **given: small(given))
    words = ["--model", "tiny-image", *SMALL, "--output", str(tmp_path)]
    assert curves.main(words) == 0
    record = json.loads((tmp_path / "curves.json").read_text())
    trained = [f"{name} 0.1 @ {point}" for name in ("sla", "block-sparse", "rectified") for point in (0, 1)]
    assert {*trained, "dense", "mass 0.1 @ 0"} <= set(record["rows"])
    costs = [record["rows"][key]["computed"] for key in trained]
    assert max(costs) - min(costs) < 0.04  # one block of 32
    shown = capsys.readouterr().out
    assert shown.splitlines()[-5].split()[:2] == ["dense", "100%"]

    def refuse(*given: Any) -> Any:
        raise AssertionError("trained again")

    monkeypatch.setattr(curves, "_trained", refuse)
    assert curves.main(words) == 0


def small(given: dict[str, Any]) -> curves.CurveConfig:
    """The asked measurement on two recorded calls."""
    return REAL(**{**given, "runs": 2, "calls_per_run": 1, "batch": 1})


REAL = curves.CurveConfig


def test_scenes_of_several_objects_have_captions_of_their_own() -> None:
    config = curves.CurveConfig("tiny-multi", runs=8)
    assert config.kind == "multi" and curves.CurveConfig("tiny-video").kind == "video"
    assert any(" and " in caption for caption in curves._captions(config))


def test_the_table_has_an_arm_a_line() -> None:
    def row(right: int) -> dict[str, Any]:
        return {"whole_caption": {"right": right, "of": 9}, "computed": 0.2}

    rows = {"dense": row(9), "sla 0.1 @ 0": row(1), "sla 0.1 @ 30": row(8), "mass 0.1 @ 0": row(2)}
    rows["sla 0.1 @ 30: loss"] = {}
    assert [line.split("  ")[-1].strip() for line in curves.text_of(rows).splitlines()] == [
        "30 steps", "9 of 9", "8 of 9", "2 of 9"
    ]  # fmt: skip
