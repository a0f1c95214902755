"""`calibrate` on workers: the measurements and the file of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.cli.commands.calibrate.test_command import FILE, SMALL, rows

pytestmark = pytest.mark.usefixtures("quick_workers")

WORDS = ("calibrate", *SMALL)


def measured(folder: Path) -> dict[str, Any]:
    return {row["key"]: row["value"] for row in rows(folder)[1:]}


def densities(folder: Path) -> dict[str, Any]:
    """The method without what is of the run: its command, commit and machine."""
    found = json.loads((folder / FILE).read_text())
    about = found.pop("calibration")
    return found | {name: about[name] for name in ("expected", "checked", "uniform", "layers", "call")}


def test_workers_measure_what_one_process_does_and_go_on_with_its_log(
    cli: Any, tmp_path: Path, engine: tuple[str, ...]
) -> None:
    assert cli(*WORDS, "--held-out", "2", "-o", "alone").code == 0
    found = cli(*WORDS, "--held-out", "2", "-o", "workers", *engine)
    assert found.code == 0 and "Verdict: " in found.out, found.err
    alone, workers = tmp_path / "alone", tmp_path / "workers"
    assert measured(workers) == measured(alone) and densities(workers) == densities(alone)
    assert [path.name for path in workers.glob(".*") if "partial" in path.name] == []
    log = workers / "measurements.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:-3]))
    (workers / FILE).unlink()
    assert cli(*WORDS, "--held-out", "2", "-o", "workers", "--resume").code == 0  # another engine goes on
    assert measured(workers) == measured(alone) and densities(workers) == densities(alone)


def test_a_run_that_every_worker_fails_is_named_and_what_is_measured_stays(cli: Any, tmp_path: Path) -> None:
    found = cli(*WORDS, "-o", "out", "--workers", "1", "--pipeline-kwargs", '{"sigmas": ["none"]}')
    assert found.code == 1 and "a run failed: " in found.err and "(tried 3 times)" in found.err, found.err
    assert "--resume" in found.err and len(found.err.splitlines()) == 1 and not (tmp_path / "out" / FILE).exists()
