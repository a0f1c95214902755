"""What a sparse call of a method takes besides its kernels: token order, block selection and Python, in seconds."""

from __future__ import annotations

import statistics
from typing import Any

import torch

from dit_attn.api import enabled, run_context, summary
from dit_attn.kernels.cost import CostTable
from dit_attn.models.architectures import architecture
from dit_attn.processors.methods.re_ttention import ReTtention
from dit_attn.processors.methods.rectified_spaattn import RectifiedSpaAttn

TOKENS = 1024
"""Visual tokens of the calls: few, so that what does not grow with them stands out."""
STEPS = 10
ROUNDS = 5


def measure_fixed(device: torch.device, table: CostTable) -> float:
    """Return the seconds that a sparse call takes on top of what a cost table says of it.

    Two layers of a Wan transformer with two heads and random weights make runs with every method that ``auto`` picks
    by default. On a CPU it is the time of a sparse call less that which the table expects, elsewhere the time to
    enqueue one; medians of the runs, of the method that takes longer.

    Args:
        device: where the model runs.
        table: ratios measured there.
    """
    on_cpu = device.type == "cpu"
    dtype = torch.float32 if on_cpu else torch.bfloat16
    arch = architecture("wan2.1-1.3b").sized(layers=2, heads=2).with_tokens(TOKENS)
    model: Any = arch.build(device, dtype)
    inputs = arch.call(device, dtype)
    found = []
    for method in (RectifiedSpaAttn(), ReTtention()):
        ratio = method.relative_time(lambda density: table.expected(TOKENS, arch.head_dim, dtype, density), arch.grid)
        beyond = []
        with enabled(model, method), torch.no_grad():
            for turn in range(ROUNDS + 1):
                for step in range(STEPS):
                    with run_context(model, step=step, steps=STEPS, branch="cond"):
                        model(**inputs, return_dict=False)
                layers = summary(model).layers
                sparse = sum(layer.seconds for layer in layers) / sum(layer.sparse_calls for layer in layers)
                if turn and on_cpu:
                    calls = sum(layer.dense_calls for layer in layers)
                    sparse -= (ratio or 1.0) * sum(layer.dense_seconds for layer in layers) / calls
                if turn:
                    beyond.append(sparse)
        found.append(statistics.median(beyond))
    return float(f"{max(0.0, *found):.4g}")
