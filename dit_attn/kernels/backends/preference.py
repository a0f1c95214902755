"""Which backend calls on a CPU go to: as measured here, else by the processor's instructions.

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
"""Name of the backend that gathers for torch's flash attention."""
CPP = "cpp"
"""Name of the backend that is compiled on the machine."""


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
    """Return whether a 16-bit call on a CPU goes to torch's flash attention on gathered blocks, and why.

    Args:
        layout: the block layout; the width of its lists stands for the density, which would have to be counted.
        head_dim: D.
        dtype: of q, k and v.
        grad: whether gradients are requested.
        rival: the backend that computes the call otherwise.
    """
    measured = _measured(layout, head_dim, dtype, grad) if dtype.itemsize == 2 else None
    if measured is not None and FLASH in measured.order and rival in measured.order:
        return measured.first(FLASH, (rival,))
    missing = unsupported_reason_amx(dtype)
    return Preference(not missing, f"{missing}; only on request" if missing else "this CPU has AMX for this type")


def prefer_cpp(
    layout: BlockLayout, head_dim: int, dtype: torch.dtype, grad: bool, rivals: tuple[str, ...]
) -> Preference:
    """Return whether a call on a CPU goes to the C++ kernel, and why: only where it was measured to be the fastest.

    Args:
        layout, head_dim, dtype, grad: as for :func:`prefer_flash`.
        rivals: the other backends that can run the call.
    """
    measured = _measured(layout, head_dim, dtype, grad)
    if measured is None or CPP not in measured.order:
        return Preference(False, "not measured on this machine for such a call; only on request")
    return measured.first(CPP, rivals)


@dataclass(frozen=True)
class _Measured:
    order: tuple[str, ...]  # backends, fastest first
    at: str  # what was measured, in words

    def first(self, name: str, rivals: tuple[str, ...]) -> Preference:
        """Return whether a backend comes before its rivals; those that were not measured do not count."""
        ahead = [each for each in self.order[: self.order.index(name)] if each in rivals]
        if ahead:
            return Preference(False, f"not clearly faster than {ahead[0]} {self.at}")
        other = next((each for each in self.order if each in rivals), "the others")
        return Preference(True, f"about as fast as {other} or faster {self.at}")


def _measured(layout: BlockLayout, head_dim: int, dtype: torch.dtype, grad: bool) -> _Measured | None:
    """The nearest measurement of several backends to a plain call; ``None`` without one, and for other calls."""
    if torch.compiler.is_compiling() or grad:
        return None
    density = layout.kv_indices.shape[-1] / layout.nk
    found = measured_comparison("cpu", layout.q_len, head_dim, dtype, density)
    if found is None:
        return None
    at = f"{found.tokens:,} tokens, heads of {found.head_dim}, density {found.density:g}"
    return _Measured((found.backend, *found.slower), f"on this machine, measured at {at}")
