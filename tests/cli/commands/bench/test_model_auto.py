"""``dit-attn bench model --method auto``: what it picks is timed, and said; where it stays dense, so is that."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests._support.cost_files import measured

SMALL = ("--layers", 2, "--heads", 1, "--tokens", 512, "--repeats", 1, "--threads", 1, "--device", "cpu")
SPARSE = "block-sparse:density=0.25,q_block=32,kv_block=32"


def test_what_it_picks_is_timed_and_said(cli: Any, tmp_path: Path, monkeypatch: Any) -> None:
    measured(tmp_path, monkeypatch, {0.0625: 0.1, 0.5: 0.1})
    done = cli("bench", "model", "--config", "pixart-sigma", *SMALL, "--method", "auto", "-o", tmp_path / "x.json")
    assert done.code == 0, done.err
    assert "auto: rectified-spaattn, density 0." in done.out and "costs: measured on this machine" in done.out
    record = json.loads((tmp_path / "x.json").read_text())
    (row,) = record["rows"]
    assert row["label"] == "auto" and row["method"]["method"] == "rectified-spaattn"
    assert record["decisions"]["auto"].startswith("rectified-spaattn")


def test_dense_attention_is_no_competitor(cli: Any) -> None:
    done = cli("bench", "model", "--config", "pixart-sigma", *SMALL, "--method", "auto")
    assert done.code == 2 and "--method auto stays dense here: no gain is assumed" in done.err
    done = cli("bench", "model", "--config", "pixart-sigma", *SMALL, "--method", "auto", "--method", SPARSE)
    assert done.code == 0 and "auto: dense: no gain is assumed" in done.out and "block-sparse" in done.out
