"""``dit-attn bench windows``: windowed attention next to dense attention on this CPU, on images of three sizes."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dit_attn.cli import outputs
from dit_attn.cli.commands.bench.model import load_average
from dit_attn.cli.options import Options
from dit_attn.cli.table import Table, show
from dit_attn.kernels.benchmark import measure, windows
from dit_attn.models.evaluate import current_commit
from dit_attn.models.export import environment


def run(options: Options) -> int:
    """Measure and print. Returns 0.

    Raises:
        DitAttnError: a file that cannot be written.
    """
    sizes = {"batch": 1, "heads": 2, "dim": 64, "repeats": 9} | options.pick("batch", "heads", "dim", "repeats")
    output = Path(options["output"]).expanduser() if options.get("output", None) else None
    if output:
        outputs.prepare_folder(output.parent)
    threads = options.get("threads", torch.get_num_threads())
    torch.set_num_threads(threads)
    before = load_average()
    rows = [row for side in windows.SIDES for row in windows.measure_windows(side, windows.WINDOW, **sizes)]
    flags = " ".join(f"--{name} {value}" for name, value in {**sizes, "threads": threads}.items())
    record: dict[str, Any] = {
        "what": f"windows of {windows.WINDOW} x {windows.WINDOW} tokens, fp32, next to torch's dense attention; every "
        "call right after a dense one; ratio is the median over the rounds",
        "command": f"dit-attn bench windows {flags}",
        "commit": current_commit(),
        "environment": environment(),
        "load_average": {"before": before, "after": load_average(), "cores": os.cpu_count()},
        **sizes,
        "rows": [measure.rounded(asdict(row)) for row in rows],
    }
    if output:
        outputs.write_json(record, output)
    if options.get("json", False):
        print(json.dumps(record, indent=1))
    else:
        place = record["environment"]
        table = [
            (
                row.kind, f"{row.side} x {row.side}", f"{row.density:.3f}", f"{row.dense_ms:.1f} ms",
                f"{row.window_ms:.1f} ms", f"{row.ratio:.3f}",
            )
            for row in rows
        ]  # fmt: skip
        show(
            f"windows of {windows.WINDOW} x {windows.WINDOW}, fp32: {place['hardware']}, {place['threads']} threads, "
            f"torch {place['torch']}",
            Table(("window", ">image", ">density", ">dense", ">window", ">window / dense"), table),
        )
    return 0
