"""`finetune` on workers: the examples, losses and weights of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

WORDS = ("finetune", "sla", "--tiny", "--train-steps", "2", "--runs", "2", "--densities", "0.5,0.25")


def contents(folder: Path) -> dict[str, Any]:
    """Bytes of the tensors, and the metadata, whose order in the file is not the library's to keep."""
    found = {}
    for path in folder.rglob("*.safetensors"):
        with safe_open(path, "np") as file:
            tensors = {name: file.get_tensor(name).tobytes() for name in file.keys()}  # noqa: SIM118
            found[str(path.relative_to(folder))] = tensors, file.metadata()
    return found


def losses(folder: Path) -> list[dict[str, Any]]:
    log = json.loads((folder / "log.json").read_text())["log"]
    return [{name: value for name, value in entry.items() if name != "seconds"} for entry in log]


@pytest.mark.parametrize("loss", ["teacher", "flow"])
def test_workers_draw_and_validate_as_one_process_does(
    cli: Any, tmp_path: Path, loss: str, engine: tuple[str, ...]
) -> None:
    alone, workers = tmp_path / "alone", tmp_path / "workers"
    assert cli(*WORDS, "--loss", loss, "-o", "alone").code == 0
    found = cli(*WORDS, "--loss", loss, "-o", "workers", *engine)
    assert found.code == 0, found.err
    assert losses(workers) == losses(alone) and [entry["step"] for entry in losses(alone)] == [0, 1, 2]
    assert all("held_out" in entry for entry in losses(alone))
    assert contents(workers) == contents(alone) and not list(workers.glob(".partial-*"))
