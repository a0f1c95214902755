"""Measuring the costs of this machine: on a tiny grid, into the user's file, from the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_attn.cli import main
from dit_attn.cli.commands.bench import costs as command
from dit_attn.kernels.cost import CostTable, cost_table
from dit_attn.kernels.cost import measure as measuring
from dit_attn.kernels.cost.lookup import this_machine
from dit_attn.kernels.cost.measure import Grid, measure_costs
from dit_attn.kernels.cost.store import VARIABLE

TINY = Grid(((256, 1, 32, 1), (320, 1, 32, 1)), (0.5, 0.25), (16,), ("float32",))


def test_every_shape_of_the_grid_becomes_a_cost() -> None:
    seen: list[str] = []
    found = measure_costs(torch.device("cpu"), TINY, seen.append)
    assert found.machine == this_machine("cpu") and found.provenance == "measured"
    assert [(c.tokens, c.density) for c in found.costs] == [(256, 0.5), (256, 0.25), (320, 0.5), (320, 0.3)]
    assert all(cost.ratio > 0 and cost.backend == "gather" for cost in found.costs) and len(seen) == 2


def test_a_ratio_is_selection_and_sparse_over_the_fastest_dense_call(monkeypatch: pytest.MonkeyPatch) -> None:
    dense = {"slow": lambda: None, "fast": lambda: None}
    monkeypatch.setattr(measuring, "dense_calls", lambda q, k, v: dense)
    times = [[9.0, 9.0, 9.0], [4.0, 2.0, 8.0], [1.0], [2.0], [1.0], [0.4]]  # dense, dense, selections, sparse
    monkeypatch.setattr(measuring, "interleaved", lambda calls, *_: times)
    found = measure_costs(torch.device("cpu"), Grid(((256, 1, 32, 1),), (0.5, 0.25), (16,), ("float32",)))
    assert [cost.ratio for cost in found.costs] == [0.5, 0.6]
    assert {cost.seconds for cost in found.costs} == {4e-3}  # one head


def test_bf16_on_a_cpu_is_timed_with_every_backend_in_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measuring, "dense_calls", lambda q, k, v: {"dense": lambda: None})
    monkeypatch.setattr(measuring, "contending_backends", lambda q, layout: ("gather-sdpa", "gather-bf16", "gather"))
    times = [[4.0], [1.0], [2.0], *([3.0], [1.0], [2.0]), *([0.21], [0.2], [0.1])]  # dense, selections, sparse twice
    monkeypatch.setattr(measuring, "interleaved", lambda calls, *_: times)
    grid = Grid(((256, 1, 32, 1),), (0.5, 0.25), (16,), ("bfloat16",))
    found = measure_costs(torch.device("cpu"), grid).costs
    assert [cost.ratio for cost in found] == [0.5, 0.525]
    assert [(cost.backend, *cost.slower) for cost in found] == [
        ("gather-bf16", "gather", "gather-sdpa"), ("gather", "gather-sdpa", "gather-bf16")
    ]  # fmt: skip
    assert measuring._ranked({"preferred": 0.21, "a tie": 0.2}) == ["preferred", "a tie"]
    monkeypatch.undo()
    for cost in measure_costs(torch.device("cpu"), Grid(((256, 1, 32, 1),), (0.25,), (16,), ("bfloat16",))).costs:
        assert {"gather-sdpa", "gather"} <= {cost.backend, *cost.slower}


def test_the_command_line_saves_the_table_that_auto_finds(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "costs.json"))
    monkeypatch.setattr(measuring, "CPU", TINY)
    saved = []  # when the runs begin, which choose their kernels by it

    def fixed(device: torch.device, table: CostTable) -> float:
        saved.append(cost_table(device))
        assert saved[-1].costs == table.costs
        return 4e-3

    monkeypatch.setattr(command, "measure_fixed", fixed)
    assert main(["bench", "kernels", "--save"]) == 0
    shown = capsys.readouterr().out
    assert "50 %" in shown and "320" in shown and str(tmp_path / "costs.json") in shown
    assert "and 4.0 ms a call for everything else" in shown
    found = cost_table("cpu")
    assert found.provenance == "measured" and found.fixed == 4e-3 and saved == [replace(found, fixed=0.0)]
    assert main(["bench", "kernels", "--save", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["costs"]) == 4


@pytest.mark.parametrize("flag", [["--seq", "256"], ["--output", "x.json"], ["--dtype", "float32"]])
def test_the_grid_takes_no_sizes(flag: list[str], capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.setattr(measuring, "interleaved", lambda *args: pytest.fail("timed"))
    assert main(["bench", "kernels", "--save", *flag]) == 2
    assert f"{flag[0]} is not for --save" in capsys.readouterr().err
