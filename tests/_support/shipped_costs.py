"""The cost tables that are shipped, made from the records: ``python -m tests._support.shipped_costs`` writes them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dit_attn import files
from dit_attn.kernels.cost import Cost, CostTable, Machine
from dit_attn.kernels.cost.store import FORMAT
from dit_attn.kernels.cost.table import KERNELS

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "dit_attn/kernels/cost/shipped.json"
RECORDS = ("benchmarks/kernels/cpu.json", "benchmarks/kernels/cpu_tiny_video.json")


def shipped() -> dict[str, Any]:
    """The content of the file: a table for every machine that a record is of."""
    tables: dict[Machine, dict[str, Any]] = {}
    for name in RECORDS:
        record = json.loads((ROOT / name).read_text())
        machine, costs = read_record(record)
        table = tables.setdefault(machine, {"records": [], "costs": []})
        table["records"].append(name)
        table["costs"] += costs
    made = [{"records": each["records"], **CostTable(at, each["costs"]).to_dict()} for at, each in tables.items()]
    return {"format": FORMAT, "tables": made}


def read_record(record: dict[str, Any]) -> tuple[Machine, list[Cost]]:
    """The machine and the costs of a record of ``bench kernels``."""
    place, shape = record["environment"], record["shape"]
    machine = Machine(record["device"], place["hardware"], place["threads"], place["torch"], KERNELS)
    parts = 1e3 * shape["batch"] * shape["heads"]

    def cost(dtype: str, row: dict[str, Any]) -> Cost:
        head = round(row["dense_median_ms"] / parts, 6)
        return Cost(shape["dim"], dtype, shape["seq"], row["density"], ratio_of(row), row["backend"], seconds=head)

    return machine, [cost(dtype, row) for dtype, rows in record["rows"].items() for row in rows]


def ratio_of(row: dict[str, Any]) -> float:
    """Sparse and selection over dense: medians, and of selection the shortest time, which is all a record has."""
    return float(f"{(row['sparse_median_ms'] + row['selection_ms']) / row['dense_median_ms']:.4g}")


if __name__ == "__main__":
    files.write_json(FILE, shipped())
