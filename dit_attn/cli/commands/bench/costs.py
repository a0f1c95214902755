"""``dit-attn bench kernels --save``: measure the cost table of this machine and store it for the method ``auto``."""

from __future__ import annotations

import json
from dataclasses import replace

import torch

from dit_attn.cli import load_pipeline
from dit_attn.cli.options import Options
from dit_attn.cli.progress import StatusLine
from dit_attn.cli.table import Table, show
from dit_attn.errors import DitAttnError
from dit_attn.kernels import build_cpp
from dit_attn.kernels.cost.lookup import read_again
from dit_attn.kernels.cost.measure import measure_costs
from dit_attn.kernels.cost.store import save_table
from dit_attn.kernels.cost.table import CostTable
from dit_attn.pipelines.benchmark.fixed_cost import measure_fixed


def save(options: Options) -> int:
    """Measure, store and print. Returns 0.

    Raises:
        DitAttnError: a device that is not there, or a file that cannot be written.
    """
    device = load_pipeline.pick_device(options.get("device", "auto"))
    if options.get("threads"):
        torch.set_num_threads(options["threads"])
    status = StatusLine(not options.get("json"))
    without = _compiled(status) if device.type == "cpu" else ""
    table = measure_costs(device, on_progress=status)
    status("runs of a model")
    save_table(table)
    read_again()  # the calls of the runs go to the kernels that are the fastest here
    table = replace(table, fixed=measure_fixed(device, table))
    status("")
    path = save_table(table)
    if options.get("json"):
        print(json.dumps({"file": str(path), "note": without, **table.to_dict()}, indent=1))
    else:
        fixed = f"and {1e3 * table.fixed:.1f} ms a call for everything else"
        said = "\n".join(filter(None, (fixed, without, f"saved in {path}")))
        show(f"{table.machine}: time of sparse attention and selection, dense = 1", _drawn(table), said)
    return 0


def _compiled(status: StatusLine) -> str:
    """Compile the C++ kernel, to be measured with the others. Returns why that cannot be, or nothing."""
    status("compiling the C++ kernel")
    try:
        build_cpp()
    except DitAttnError as missing:
        return f"without the backend cpp: {missing}"
    return ""


def _drawn(table: CostTable) -> Table:
    """A row for every size and type, a column for every density."""
    densities = sorted({cost.density for cost in table.costs}, reverse=True)
    rows = []
    for tokens, size, dtype in dict.fromkeys((cost.tokens, cost.head_dim, cost.dtype) for cost in table.costs):
        ratios = (table.expected(tokens, size, dtype, density) for density in densities)
        rows.append((dtype, f"{tokens:,}", str(size), *(f"{ratio:.2f}" for ratio in ratios)))
    return Table(("type", ">tokens", ">head size", *(f">{100 * each:g} %" for each in densities)), rows)
