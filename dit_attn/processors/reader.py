"""What all methods that decide which keys are read have in common: their blocks, and where they stay dense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dit_attn.processors.executor import AttentionCall, Request
from dit_attn.processors.method import Method, setting, share


@dataclass(frozen=True)
class Reader(Method):
    """A method that supplies the layout of the visual rows.

    Dense exceptions: ``dense_steps`` at the start of the run, ``dense_last_steps`` at its end, ``dense_layers`` by
    index (negative counts from the end); a float is a fraction, an int a count.

    Attributes:
        q_block: tokens per query block.
        kv_block: tokens per key block.
        dense_steps: steps at the start of the run that stay dense.
        dense_last_steps: steps at its end that stay dense.
        dense_layers: layers that stay dense.
        max_error: largest relative L2 error of a layer's output, measured on sampled rows once a run; a layer above it
            goes dense for the rest of the session. ``None`` measures nothing.
    """

    role: ClassVar[str] = "reader"

    q_block: int = setting(128, "tokens per query block", low=8, high=1024)
    kv_block: int = setting(128, "tokens per key block", low=8, high=1024)
    dense_steps: float | int = setting(0.1, "dense steps at the start (fraction or count)", low=0)
    dense_last_steps: float | int = setting(0.0, "dense steps at the end (fraction or count)", low=0)
    dense_layers: tuple[int, ...] = setting((), "layers that stay dense, by index")
    max_error: float | None = setting(None, "error of a layer's output above which it goes dense", low=0.0)

    @property
    def is_dense(self) -> bool:
        """Whether the settings keep everything."""
        return False

    @property
    def executed(self) -> float | None:
        """Share of the visual rows' map that a sparse call computes, virtual keys too; ``None`` when data decide."""
        return None

    def request(self, call: AttentionCall, request: Request) -> None:
        """Plan the call, or decline it (dense step, dense layer, density 1)."""
        reason = self.exception(call)
        if reason:
            request.decline(reason)
            return
        request.max_error = self.max_error
        self.plan(call, request)

    def plan(self, call: AttentionCall, request: Request) -> None:
        """Say in ``request`` how the visual rows of ``call`` are computed."""
        raise NotImplementedError

    def exception(self, call: AttentionCall) -> str | None:
        """Why this call stays dense, or ``None``."""
        if self.is_dense:
            return "density 1"
        layers = call.site.session.layer_count
        if any(index % layers == call.site.index for index in self.dense_layers):
            return "dense layer"
        return dense_step(self.dense_steps, self.dense_last_steps, call)


def dense_step(first: float | int, last: float | int, call: AttentionCall) -> str | None:
    """``"dense step"`` when the call's step is one of the first or last steps that stay dense, else ``None``.

    With an unknown number of steps, fractions are taken of the noise range and counts at the end are ignored.
    """
    clock = call.clock
    if clock.total:
        if clock.step < share(first, clock.total) or clock.step >= clock.total - share(last, clock.total):
            return "dense step"
        return None
    early = clock.progress < first if isinstance(first, float) else clock.step < first
    late = isinstance(last, float) and last > 0 and clock.progress >= 1.0 - last
    return "dense step" if early or late else None
