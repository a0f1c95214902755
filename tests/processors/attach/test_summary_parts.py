"""Parts of a summary: twin passes and moved positions, counted and in words."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from dit_attn.processors.attach.summary_parts import PositionsSummary, TwinSummary, positions_of, twin_of
from dit_attn.processors.core.layer import Layer


def session(twin: Any = None, ran: bool = True) -> Any:
    """A session of two layers."""
    return SimpleNamespace(layers=[Layer("a", 0), Layer("b", 1)], twin=twin, ran=ran)


def test_twin_passes_of_all_transformers_are_counted() -> None:
    runner = SimpleNamespace(evaluations=3, reused_blocks=6, blocks=["a", "b", "c", "d"])
    first, second, idle = session(runner), session(runner), session(runner, ran=False)
    found = twin_of({"transformer": first, "transformer_2": second, "idle": idle})
    assert found == TwinSummary(6, 0.5)
    assert str(found) == "6 passes in addition to the pipeline's, which used 50.0 % of their blocks again"
    assert twin_of({"transformer": session()}) is None
    never = twin_of({"transformer": session(SimpleNamespace(evaluations=0, reused_blocks=0, blocks=[]))})
    assert never == TwinSummary(0, 0.0) and str(never).startswith("0 passes")


def test_moved_positions_are_counted_by_step_and_by_layer() -> None:
    one, other, idle = session(), session(), session(ran=False)
    assert positions_of({"transformer": one}) is None
    one.layers[0].stats.moved = {"h x0.5": {0, 1}, "w +2": {2}}
    other.layers[1].stats.moved = {"w +2": {2, 3}}
    idle.layers[0].stats.moved = {"t x2": {7}}
    found = positions_of({"transformer": one, "transformer_2": other, "idle": idle})
    assert found == PositionsSummary(4, 2, ("h x0.5", "w +2"))
    assert str(found) == "moved at 4 steps in 2 layers: h x0.5 | w +2"


def test_of_many_moves_the_first_are_shown() -> None:
    text = str(PositionsSummary(1, 1, tuple("abcde")))
    assert text == "moved at 1 step in 1 layer: a | b | c | 2 others"
