"""The comparison of head drops: a small one on an embedded model, resumed, and its record."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dit_attn.pipelines.head_drop import measure
from dit_attn.pipelines.measurement_log import MeasurementLog

SMALL = ["tiny-image", "--count", "1", "--profiled", "1", "--searched", "1", "--steps", "2", "--seeds", "1"]


class Search:
    """Ranks the heads of two layers in the order of their numbers."""

    def __init__(self, pipe: Any, captions: list[str], *more: Any, **call: Any) -> None:
        layers = [name.removesuffix(".to_q") for name, _ in pipe.transformer.named_modules() if name.endswith("to_q")]
        scores = [[layer, head, float(-index)] for index, layer in enumerate(layers[::2]) for head in (0, 1)]
        self.rounds = [{"scores": [[*scores[0][:2], None], *scores[1:]]}]

    def search(self) -> Search:
        return self


def test_a_small_comparison_writes_its_record_and_is_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "HeadHunter", Search)
    output = tmp_path / "heads" / "tiny.json"
    words = [*SMALL, "--fractions", "0.1", "--output", str(output)]
    assert measure.main(words) == 0
    record = json.loads(output.read_text())
    arms = {row["arm"]: row for row in record["rows"]}
    dense = arms.pop("dense")
    assert dense["dropped"] == 0 and len(dense["followed"]) == 1
    assert len(arms) == 9 and all(row["dropped"] == 1 and row["of"] == 12 for row in arms.values())
    assert all(5.0 < row["psnr"][0] < 60.0 and len(row["followed"]) == 1 for row in arms.values())
    (ours,) = (row for row in record["table"] if row["arm"] == "ours, refit")
    assert ours["psnr"]["value"] == arms["ours, refit"]["psnr"][0]
    assert record["search"][0][1] == 1 and arms["search, refit"]["heads"] != arms["search, its last, refit"]["heads"]
    shown = capsys.readouterr().out
    assert "prompts followed" in shown and "1 of 12" in shown and "random, refit" in shown

    log = output.with_suffix(".jsonl")
    log.write_text("\n".join(line for line in log.read_text().splitlines() if "ours, refit removed" not in line))
    asked: list[str] = []
    add = MeasurementLog.add

    def noted(self: MeasurementLog, key: str, value: Any) -> None:
        asked.append(key)
        add(self, key, value)

    monkeypatch.setattr(MeasurementLog, "add", noted)
    assert measure.main([*words, "--resume"]) == 0
    assert asked == ["1: ours, refit removed"]
    again = json.loads(output.read_text())
    assert {row["arm"]: row["psnr"][0] for row in again["rows"] if row["dropped"]} == pytest.approx(
        {name: row["psnr"][0] for name, row in arms.items()}
    )


def test_random_sets_are_one_row_of_the_table() -> None:
    rows = [{"dropped": 2, "arm": f"random {n}, refit", "psnr": [n, n + 1], "followed": [n > 0, True]} for n in (0, 1)]
    (row,) = measure.table(rows)
    assert row["arm"] == "random, refit" and row["psnr"]["value"] == 1.0 and row["followed"]["value"] == 0.75
    assert measure.text_of([row], 12).splitlines()[1] == "random, refit                  1.0 dB, 75%"


@pytest.mark.parametrize(
    ("change", "message"),
    [(["--count", "0"], "raise what is 0"), (["--fractions", "0.9"], "every layer keeps one")],
)
def test_what_cannot_be_measured_is_one_line(
    change: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, "--searched", "0", *change, "--output", str(tmp_path / "a.json")]
    assert measure.main(words) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "a.json").exists()
