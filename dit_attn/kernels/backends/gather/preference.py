"""Whether 16-bit calls on a CPU go to torch's flash attention on gathered blocks: as measured here, else by AMX.

Nothing is timed in a run, so that the same call always goes the same way on a machine: in every run, in every worker.
Calls with gradients and compiled calls follow the processor alone, since only plain calls are measured and the table of
a machine may be replaced between the parts of a training run.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dit_attn.kernels.cost.lookup import measured_comparison
from dit_attn.kernels.device import unsupported_reason_amx
from dit_attn.kernels.layouts.block_layout import BlockLayout

FLASH = "gather-sdpa"
"""Name of the backend."""


@dataclass(frozen=True)
class Preference:
    """Whether a backend is chosen for a call that it can run.

    Attributes:
        chosen: whether it is.
        why: the reason, where it is not its place in the list of backends.
    """

    chosen: bool
    why: str = ""


ALWAYS = Preference(True)


def prefer_flash(layout: BlockLayout, head_dim: int, dtype: torch.dtype, grad: bool, rival: str) -> Preference:
    """Return whether a call on a CPU goes to torch's flash attention on gathered blocks, and why.

    Args:
        layout: the block layout; the width of its lists stands for the density, which would have to be counted.
        head_dim: D.
        dtype: of q, k and v.
        grad: whether gradients are requested.
        rival: the backend that computes the call otherwise.
    """
    if not torch.compiler.is_compiling() and not grad and dtype.itemsize == 2:
        density = layout.kv_indices.shape[-1] / layout.nk
        found = measured_comparison("cpu", layout.q_len, head_dim, dtype, density)
        order = () if found is None else (found.backend, *found.slower)
        if found is not None and FLASH in order and rival in order:
            first = order.index(FLASH) < order.index(rival)
            said = f"about as fast as {rival} or faster" if first else f"not clearly faster than {rival}"
            at = f"{found.tokens:,} tokens, heads of {found.head_dim}, density {found.density:g}"
            return Preference(first, f"{said} on this machine, measured at {at}")
    missing = unsupported_reason_amx(dtype)
    return Preference(not missing, f"{missing}; only on request" if missing else "this CPU has AMX for this type")
