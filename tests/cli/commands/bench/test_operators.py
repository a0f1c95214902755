"""``dit-attn bench operators``."""

from __future__ import annotations

import json

import pytest

from dit_attn.pipelines.benchmark import equal_cost

SMALL = ("--source", "synthetic", "--grid", 4, 8, 8, "--block", 16, "--steps", 2, "--every", 1, "--prompts", 2)
FEW = ("--family", "default", "none hilbert", "paper hilbert", "--density", 0.5, 0.25, 0.07)


def test_the_table_the_record_and_the_verdict_on_the_targets(cli, tmp_path) -> None:
    done = cli("bench", "operators", *SMALL, *FEW, "--threads", 1, "--verbose", "-o", tmp_path / "deep" / "found.json")
    assert done.code == 0, done.err
    assert "default 0.5" in done.out and "default over none hilbert, l2 <= 0.35" in done.out
    record = json.loads((tmp_path / "deep" / "found.json").read_text())
    assert {"command", "commit", "environment", "intervals", "equal_cost", "targets", "best"} <= record.keys()
    assert record["command"].startswith("dit-attn bench operators --source synthetic")
    assert [row["family"] for row in record["rows"]] == ["default"] * 3 + ["none hilbert"] * 3 + ["paper hilbert"] * 3
    assert all(row["l2"]["n"] == 2 for row in record["rows"]) and record["calls"] == 2 * 6 * 2
    assert [target["limit"] for target in record["targets"]] == [limit for _, _, limit in equal_cost.TARGETS]


def test_targets_are_for_those_who_ask(cli) -> None:
    done = cli("bench", "operators", *SMALL, "--family", "default", "--density", 0.5, "--threads", 1)
    assert done.code == 0 and "attention computed" in done.out and "default over" not in done.out


def test_an_embedded_model_at_another_size(cli) -> None:
    words = ("--source", "tiny-multi", "--height", 64, "--width", 96, "--steps", 1, "--every", 1, "--prompts", 1)
    done = cli("bench", "operators", *words, "--family", "combined", "--density", 0.25, "--threads", 1, "--json")
    record = json.loads(done.out)
    assert record["tokens"] == [16 * 24 + 80] and record["block"] == 32
    assert "operators --source tiny-multi --prompts 1 --every 1 --height 64 --width 96" in record["command"]


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--source", "wan"), ("--source", "synthetic")),
        (("--density", 1.0), ("--density", "dense")),
        (("--prompts", 0), ("--prompts", "at least 1")),
        (("--source", "synthetic", "--grid", 1, 4, 4), ("--grid", "256")),
        (("--block", 4), ("--block", "8")),
        (("--source", "synthetic", "--height", 64), ("--height", "--grid")),
        (("--source", "synthetic", "--device", "cuda"), ("--device", "CPUs")),
        (("--source", "wan2.1-1.3b", "--width", 64), ("--width", "--grid")),
        (("--grid", 4, 8, 8), ("--grid", "tiny-image", "--height")),
        (("--device", "cuda:7"), ("--device cuda:7", "no such GPU")),
        (("--width", 100), ("--width must be a multiple of 16",)),
        (("--family", "merge 7"), ("merge 7", "default")),
    ],
)
def test_bad_input_is_refused_in_one_line(cli, words, parts) -> None:
    cli("bench", "operators", *words).refused(*parts)


def test_kernels_keep_their_defaults(cli) -> None:
    sizes = ("--seq", 256, "--heads", 1, "--dim", 16, "--dtype", "float32", "--repeats", 1)
    done = cli("bench", "kernels", *sizes, "--json")
    record = json.loads(done.out)
    assert record["shape"]["block"] == 128 and len(record["rows"]["float32"]) == 4
