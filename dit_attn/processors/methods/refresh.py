"""When a method measures anew what it keeps for the steps between: every so many steps, the layers in turns."""

from __future__ import annotations

from dataclasses import dataclass

from dit_attn.processors.core.call import AttentionCall
from dit_attn.processors.methods.base import resolve_count


@dataclass(frozen=True)
class RefreshSchedule:
    """The steps at which a layer refreshes.

    Attributes:
        period: steps from one refresh to the next.
        stagger: whether the layers refresh at different steps of the period, which spreads the cost over the steps.
        dense_steps: dense steps at the start of the run, as a fraction or a count.
        dense_last_steps: those at its end.
    """

    period: int
    stagger: bool
    dense_steps: float | int
    dense_last_steps: float | int

    def due(self, call: AttentionCall, last: int | None) -> bool:
        """Return whether a step after the dense ones has to refresh.

        Args:
            call: the attention call.
            last: step of the last refresh, ``None`` where there was none.
        """
        if last is None or call.clock.step - last >= self.period:
            return True
        first = self._first(call)
        turn = first is not None and (call.clock.step - first) % self.period == self._offset(call)
        return turn and call.clock.step > last

    def early(self, call: AttentionCall) -> bool:
        """Return whether a dense step is this layer's turn of the last period before the sparse ones."""
        first, offset = self._first(call), self._offset(call)
        return first is not None and offset > 0 and call.clock.step == first - self.period + offset

    def ends(self, call: AttentionCall) -> bool:
        """Return whether no later step of the run will be sparse."""
        total = call.clock.total
        return bool(total) and call.clock.step + 1 >= (total or 0) - resolve_count(self.dense_last_steps, total or 0)

    def _offset(self, call: AttentionCall) -> int:
        return call.layer.index % self.period if self.stagger else 0

    def _first(self, call: AttentionCall) -> int | None:
        """The step after the dense ones, ``None`` when it is not known beforehand."""
        if call.clock.total:
            return resolve_count(self.dense_steps, call.clock.total)
        return None if isinstance(self.dense_steps, float) else self.dense_steps
