"""`search` on workers: the scores, heads and images of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.conftest import FAST

pytestmark = pytest.mark.usefixtures("quick_workers")

WORDS = (
    "search", "--model", "tiny-image", *FAST, "--rounds", "1", "--per-round", "1", "--pairs", "2", "--batch", "2",
    "--controls", "0",
)  # fmt: skip


def scores(folder: Path) -> dict[str, Any]:
    rows = [json.loads(line) for line in (folder / "evaluations.jsonl").read_text().splitlines()[1:]]
    return {row["key"]: row["value"] for row in rows}


def heads(folder: Path) -> dict[str, Any]:
    """What was found, without what is of the run: its command, seconds and machine."""
    found = json.loads((folder / "heads.json").read_text())
    return found | {"search": {name: found["search"][name] for name in ("images", "passes", "objective", "pairs")}}


def images(folder: Path) -> list[str]:
    return [part for part in (folder / "search.html").read_text().split('"') if part.startswith("data:image")]


@pytest.mark.parametrize("more", [("--objective", "verifier"), ("--strategy", "gradient", "--screen", "0.01")])
def test_workers_find_what_one_process_finds_and_go_on_with_its_log(
    cli: Any, tmp_path: Path, more: Any, engine: tuple[str, ...]
) -> None:
    assert cli(*WORDS, *more, "-o", "alone").code == 0
    alone, workers = tmp_path / "alone", tmp_path / "workers"
    workers.mkdir()
    kept = (alone / "evaluations.jsonl").read_text().splitlines(keepends=True)[:4]
    (workers / "evaluations.jsonl").write_text("".join(kept))
    found = cli(*WORDS, *more, "-o", "workers", *engine, "--resume")
    assert found.code == 0 and "Verdict: " in found.out, found.err
    assert scores(workers) == scores(alone) and heads(workers) == heads(alone)
    assert images(workers) == images(alone) and len(images(alone)) == 4
    about = json.loads((workers / "heads.json").read_text())["search"]
    assert about["engine"] == f"{engine[-1]}, 2 workers" and not list(workers.glob(".partial-*"))


def test_a_candidate_that_every_worker_fails_is_named(cli: Any, tmp_path: Path) -> None:
    words = ("--objective", "verifier", "--pipeline-kwargs", '{"sigmas": ["none"]}')
    found = cli(*WORDS, *words, "-o", "out", "--workers", "1")
    assert found.code == 1 and "a candidate failed: " in found.err and "--resume" in found.err, found.err
    assert "(tried 3 times) (and 11 others)" in found.err and not (tmp_path / "out" / "heads.json").exists()
