"""Measure a cost table: sparse attention and selection next to the fastest dense call, in turns, on a small grid."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch

from dit_attn.kernels.benchmark.inputs import Shape, random_inputs
from dit_attn.kernels.benchmark.measure import dense_calls
from dit_attn.kernels.benchmark.timing import interleaved, kernel_timed
from dit_attn.kernels.cost.lookup import this_machine
from dit_attn.kernels.cost.table import Cost, CostTable
from dit_attn.kernels.device import unsupported_reason_amx
from dit_attn.kernels.functional import contending_backends, sparse_attention
from dit_attn.kernels.selection.select import plan_blocks


@dataclass(frozen=True)
class Grid:
    """What is measured.

    Attributes:
        shapes: (tokens, heads, tokens per block, rounds); larger ones need fewer heads and rounds.
        densities: of the key blocks.
        head_dims: D.
        dtypes: names of types.
    """

    shapes: tuple[tuple[int, int, int, int], ...] = ((1024, 4, 64, 9), (4096, 4, 128, 5), (16384, 2, 128, 3))
    densities: tuple[float, ...] = (0.5, 0.25, 0.125, 0.0625)
    head_dims: tuple[int, ...] = (64, 128)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")


CLEAR = 1.1
"""How many times as fast a backend has to be to pass the one that is preferred: rounds are few, and a tie is no reason
to change the bits of a result."""
CPU = Grid()
ACCELERATOR = Grid(
    ((1024, 16, 64, 9), (4096, 16, 128, 9), (16384, 16, 128, 5)), dtypes=("float32", "bfloat16", "float16")
)  # enough heads to keep it busy


def measure_costs(
    device: torch.device, grid: Grid | None = None, on_progress: Callable[[str], None] = lambda text: None
) -> CostTable:
    """Measure the costs of a device, with torch's current number of threads; about a minute on two cores.

    Every figure is the median of the rounds of a selection and of a sparse call over that of the dense call, of the
    fastest kernels where there are several.

    Args:
        device: what is measured.
        grid: the shapes; default: :data:`CPU`, with fp16 where AMX multiplies it, or :data:`ACCELERATOR`.
        on_progress: called with a line of text before every shape.

    Raises:
        DitAttnError: no kernel runs there.
    """
    costs: list[Cost] = []
    grid = grid or (_cpu_grid() if device.type == "cpu" else ACCELERATOR)
    for tokens, heads, block, rounds in grid.shapes:
        for size in grid.head_dims:
            for dtype in grid.dtypes:
                on_progress(f"{tokens:,} tokens, heads of {size}, {dtype}")
                costs += _measured(Shape(1, tokens, heads, size, block), dtype, device, grid.densities, rounds)
    return CostTable(this_machine(device), tuple(costs))


def _cpu_grid() -> Grid:
    return CPU if unsupported_reason_amx(torch.float16) else replace(CPU, dtypes=(*CPU.dtypes, "float16"))


def _ranked(spent: dict[str, float]) -> list[str]:
    """The names from the fastest to the slowest; one passes those before it in ``spent`` only where it is clear."""
    order: list[str] = []
    for name, time in spent.items():
        order.insert(next((i for i, other in enumerate(order) if spent[other] > CLEAR * time), len(order)), name)
    return order


def _measured(shape: Shape, dtype: str, device: torch.device, densities: Sequence[float], rounds: int) -> list[Cost]:
    made = random_inputs(shape, getattr(torch, dtype), device, densities)
    q, k, v = made.q, made.k, made.v
    with torch.no_grad():
        dense = dense_calls(q, k, v)
        choose = [
            partial(plan_blocks, q, k, q_block=shape.block, kv_block=shape.block, density=density)
            for density in densities
        ]
        names = [contending_backends(q, layout) for layout in made.layouts]
        sparse = [
            partial(sparse_attention, q, k, v, layout, backend=name)
            for layout, each in zip(made.layouts, names)
            for name in each
        ]
        times = interleaved([*dense.values(), *choose, *sparse], rounds, device, kernel_timed)
    middle = [statistics.median(each) for each in times]
    best, selections = min(middle[: len(dense)]), middle[len(dense) :][: len(densities)]
    head = float(f"{best / 1e3 / (q.shape[0] * q.shape[2]):.4g}")
    rest = iter(middle[len(dense) + len(densities) :])
    found = {}
    for layout, selection, each in zip(made.layouts, selections, names):
        spent = {name: next(rest) for name in each}
        fastest, *slower = _ranked(spent)
        ratio = float(f"{(selection + spent[fastest]) / best:.4g}")
        found[layout.density] = Cost(shape.dim, dtype, shape.seq, layout.density, ratio, fastest, tuple(slower), head)
    return list(found.values())
