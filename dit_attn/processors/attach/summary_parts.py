"""Parts of a summary: twin passes, moved positions."""

from __future__ import annotations

from dataclasses import dataclass

from dit_attn.processors.attach.session import Session
from dit_attn.processors.attach.value_table import percent

_SHOWN = 3  # moves of positions that are listed


@dataclass(frozen=True)
class TwinSummary:
    """Twin passes of the last run: passes of the transformer that a method asked for in addition to the pipeline's.

    Attributes:
        passes: how many.
        reused: fraction of their blocks whose result was used again in the pipeline's passes.
    """

    passes: int
    reused: float

    def __str__(self) -> str:
        passes = _count(self.passes, "pass", "passes")
        return f"{passes} in addition to the pipeline's, which used {percent(self.reused)} of their blocks again"


@dataclass(frozen=True)
class PositionsSummary:
    """Positions that methods moved in the last run.

    Attributes:
        steps: steps at which they were moved.
        layers: layers whose tokens were moved.
        moves: what moved them: factors and shifts in tokens along t, h and w.
    """

    steps: int
    layers: int
    moves: tuple[str, ...]

    def __str__(self) -> str:
        shown, more = self.moves[:_SHOWN], len(self.moves) - _SHOWN
        text = " | ".join(shown) + (f" | {more} others" if more > 0 else "")
        return f"moved at {_count(self.steps, 'step')} in {_count(self.layers, 'layer')}: {text}"


def twin_of(sessions: dict[str, Session]) -> TwinSummary | None:
    """Return what the twin passes of some sessions were, ``None`` where no method asks for any."""
    runners = [session.twin for session in sessions.values() if session.twin is not None and session.ran]
    if not runners:
        return None
    blocks = sum(runner.evaluations * len(runner.blocks) for runner in runners)
    reused = sum(runner.reused_blocks for runner in runners)
    return TwinSummary(sum(runner.evaluations for runner in runners), reused / blocks if blocks else 0.0)


def positions_of(sessions: dict[str, Session]) -> PositionsSummary | None:
    """Return how positions were moved in some sessions, ``None`` where none was."""
    moved = [layer.stats.moved for session in sessions.values() if session.ran for layer in session.layers]
    steps = {step for moves in moved for found in moves.values() for step in found}
    if not steps:
        return None
    moves = dict.fromkeys(text for moves in moved for text in moves)
    return PositionsSummary(len(steps), sum(map(bool, moved)), tuple(moves))


def _count(number: int, noun: str, plural: str = "") -> str:
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"
