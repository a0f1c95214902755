"""A cost table of this machine in a file of its own, as if it had been measured."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dit_attn.kernels.cost import Cost, CostTable
from dit_attn.kernels.cost.lookup import this_machine
from dit_attn.kernels.cost.store import VARIABLE, save_table

FAST = {0.0625: 0.1, 0.25: 0.3, 0.5: 0.5}


def measured(
    tmp_path: Path, monkeypatch: Any, ratios: Mapping[float, float] = FAST, tokens: int = 256, head_dim: int = 8
) -> CostTable:
    """Save ratios by density, which hold from some tokens and head size on, and return the table."""
    monkeypatch.setenv(VARIABLE, str(tmp_path / "costs.json"))
    costs = tuple(Cost(head_dim, "float32", tokens, density, ratio) for density, ratio in ratios.items())
    table = CostTable(this_machine("cpu"), costs)
    save_table(table)
    return table
