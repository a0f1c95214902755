"""Which table a device gets: its own, the one shipped for its hardware, a guess, or none."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dit_attn.kernels.cost import lookup
from dit_attn.kernels.cost.lookup import LEAST_TOKENS, SLACK, cost_table, shipped_tables, this_machine
from dit_attn.kernels.cost.store import VARIABLE, save_table
from dit_attn.kernels.cost.table import CostTable
from tests._support import shipped_costs


def test_shipped_tables_are_those_of_the_records() -> None:
    assert json.loads(shipped_costs.FILE.read_text()) == shipped_costs.shipped()
    for table in shipped_tables():
        assert table.provenance == "shipped" and all(name in table.note for name in shipped_costs.RECORDS)
        assert len({(c.head_dim, c.dtype, c.tokens, c.density) for c in table.costs}) == len(table.costs)


def test_what_was_measured_here_comes_first_then_what_is_shipped_then_a_guess(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(VARIABLE, str(tmp_path / "costs.json"))
    shipped = shipped_tables()[0]
    machine = replace(this_machine("cpu"), hardware="another processor")
    monkeypatch.setattr(lookup, "this_machine", lambda device: machine)
    guess = cost_table("cpu")
    assert guess.provenance == "guess" and "run dit-attn bench kernels --save" in str(guess)
    machine = replace(shipped.machine, torch="9.9", kernels=9)
    assert cost_table("cpu") == shipped
    machine = replace(machine, threads=machine.threads + 1)
    assert cost_table("cpu").provenance == "guess"
    save_table(CostTable(machine, shipped.costs[:1]))
    assert cost_table("cpu") == CostTable(machine, shipped.costs[:1])


def test_a_guess_is_more_careful_in_16_bits_where_amx_speeds_up_the_dense_calls(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Held against the record of a processor with AMX, with the backend that is chosen there before any measurement."""
    record = json.loads((shipped_costs.ROOT / "benchmarks/kernels/cpu_amx_4096.json").read_text())["rows"]["bfloat16"]
    found = {}
    for missing in (None, "no AMX"):
        monkeypatch.setattr(lookup, "unsupported_reason_amx", lambda dtype, missing=missing: missing)
        lookup._guessed.cache_clear()
        found[missing] = CostTable(this_machine("cpu"), lookup._guessed(2), "guess")
    lookup._guessed.cache_clear()
    for row in record:
        call = (4096, 128, "bfloat16", row["density"])
        measured = (row["others"]["gather-sdpa"] + row["selection_ms"]) / row["dense_ms"]
        assert found[None].expected(*call) >= min(1.0, measured)
        assert found[None].expected(*call) > found["no AMX"].expected(*call) or measured > 1
        assert found[None].expected(4096, 128, "float32", row["density"]) == found["no AMX"].expected(*call)


def test_a_guess_is_slower_than_everything_shipped_and_starts_late(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = replace(this_machine("cpu"), hardware="another processor")
    monkeypatch.setattr(lookup, "this_machine", lambda device: machine)
    guess = cost_table("cpu")
    assert guess.unknown(LEAST_TOKENS - 1, 64, "float32") is not None
    for cost in shipped_tables()[0].costs:
        if cost.tokens >= LEAST_TOKENS:
            assert guess.expected(cost.tokens, cost.head_dim, cost.dtype, cost.density) >= SLACK * cost.ratio - 1e-9


def test_no_gain_is_expected_of_a_device_that_was_never_measured() -> None:
    found = cost_table(torch.device("meta"))
    assert found.expected(10**6, 128, torch.bfloat16, 0.01) == 1.0 and "no meta device has been measured" in str(found)
