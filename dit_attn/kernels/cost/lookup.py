"""The cost table of a device: measured here, else shipped for the same hardware, else a careful guess."""

from __future__ import annotations

import functools
from dataclasses import replace
from importlib import resources
from typing import Any

import torch

from dit_attn import files
from dit_attn.errors import DitAttnError
from dit_attn.kernels.backends.cpp import library
from dit_attn.kernels.cost.store import saved_table
from dit_attn.kernels.cost.table import KERNELS, Cost, CostTable, Machine
from dit_attn.kernels.device import unsupported_reason_amx
from dit_attn.machine import processor

SLACK = 1.5
"""How much slower, relative to dense, a processor that was never measured is assumed to be than the slowest shipped."""
SLACK_AMX = 2.5 * SLACK
"""The same for 16 bits where AMX speeds up the dense calls (benchmarks/kernels/cpu_amx_4096.json)."""
LEAST_TOKENS = 4096
"""Fewest tokens at which one is assumed to gain."""
GUESSED_FIXED = 5e-3
"""Seconds of a call besides its kernels that are assumed where they were not measured."""
GUESSED_FLOPS = 5e11
"""Operations a second of a thread in dense attention: no processor that was measured does more."""


def this_machine(device: torch.device | str) -> Machine:
    """Return what measurements on a device hold for."""
    kind = torch.device(device).type
    accelerator = kind == "cuda" and torch.cuda.is_available()
    hardware = torch.cuda.get_device_name(torch.device(device)) if accelerator else processor()
    threads = torch.get_num_threads() if kind == "cpu" else 0
    return Machine(kind, hardware, threads, torch.__version__, KERNELS, kind == "cpu" and library.built())


def cost_table(device: torch.device | str) -> CostTable:
    """Return what sparse attention is known to cost on a device.

    In this order: the table that ``dit-attn bench kernels --save`` has measured on this machine, with these threads,
    this torch and these kernels; one that is shipped for the same hardware and threads; on other
    processors a guess, which is slower than everything shipped; elsewhere an empty table, which expects no gain.
    """
    machine = this_machine(device)
    measured, missing = saved_table(machine)
    if measured is not None:
        return measured
    for table in shipped_tables():
        if (table.machine.hardware, table.machine.threads) == (machine.hardware, machine.threads):
            return table
    if machine.device == "cpu":
        slowest = "half as slow again as the slowest shipped record"
        note = f"{slowest}, from {LEAST_TOKENS:,} tokens on; {missing}"
        return CostTable(machine, _guessed(machine.threads), "guess", note, GUESSED_FIXED)
    return CostTable(machine, (), "guess", f"no {machine.device} device has been measured; {missing}")


def measured_comparison(
    device_type: str, tokens: int, head_dim: int, dtype: torch.dtype, density: float
) -> Cost | None:
    """Return the comparison of backends measured on this machine that is nearest to a call, ``None`` without one.

    The saved table is read once in a process, for each number of threads, so that what is chosen by it holds to the
    end of a run although the file may change. Arguments as for :meth:`CostTable.nearest_comparison`.
    """
    return _comparison(device_type, torch.get_num_threads(), tokens, head_dim, dtype, density)


def read_again() -> None:
    """Forget the tables that this process has read: it has saved another one."""
    _table_of_process.cache_clear()
    _comparison.cache_clear()


@functools.lru_cache(maxsize=4096)
def _comparison(device_type: str, threads: int, *call: Any) -> Cost | None:
    table = _table_of_process(device_type, threads)
    return None if table is None else table.nearest_comparison(*call)


@functools.cache
def _table_of_process(device_type: str, threads: int) -> CostTable | None:
    try:
        return saved_table(this_machine(device_type))[0]
    except (DitAttnError, RuntimeError):  # no path is named, or there is no home folder: attention needs neither
        return None


@functools.cache
def shipped_tables() -> tuple[CostTable, ...]:
    """Return the tables that come with the package; ``tests/_support/shipped_costs.py`` makes them from records."""
    data = files.parse_json(resources.files(__package__).joinpath("shipped.json").read_text(encoding="utf-8"))
    return tuple(
        replace(CostTable.from_dict(table, "shipped", f"from {', '.join(table['records'])}"), fixed=GUESSED_FIXED)
        for table in data["tables"]
    )


@functools.cache
def _guessed(threads: int) -> tuple[Cost, ...]:
    known = [cost for table in shipped_tables() if table.machine.device == "cpu" for cost in table.costs]
    large = [cost for cost in known if cost.tokens >= LEAST_TOKENS]
    slowest = {d: max(cost.ratio for cost in large if cost.density == d) for d in {cost.density for cost in large}}
    operations = 4.0 * LEAST_TOKENS**2
    slack = {"float32": SLACK, "bfloat16": SLACK if unsupported_reason_amx(torch.bfloat16) else SLACK_AMX}
    return tuple(
        Cost(size, dtype, LEAST_TOKENS, density, factor * ratio, seconds=operations * size / (GUESSED_FLOPS * threads))
        for size in (64, 128)
        for dtype, factor in slack.items()
        for density, ratio in sorted(slowest.items())
    )
