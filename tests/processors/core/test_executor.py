"""Watching a run: every call is shown, nothing about the result changes, and nothing stays behind."""

from __future__ import annotations

import torch

import dit_attn
from dit_attn.processors.attach.attach import session_of
from tests._support.compose import forward, tiny


def test_an_observer_sees_every_call_and_changes_nothing() -> None:
    model, inputs = tiny("wan")
    before = forward(model, inputs)
    seen: list[tuple[str, tuple[int, ...], bool]] = []
    with dit_attn.observing(
        model, lambda call, request, out: seen.append((call.layer.name, tuple(out.shape), request.layout is None))
    ):
        during = forward(model, inputs)
    assert torch.equal(before, during)
    assert session_of(model) is None
    assert len({name for name, *_ in seen}) == len(seen) > 0
    assert all(stock for *_, stock in seen)


def test_an_observer_sees_the_layout_a_method_asked_for_and_what_it_gave() -> None:
    model, inputs = tiny("wan")
    method = dit_attn.BlockSparse(density=0.5, q_block=32, kv_block=32, dense_steps=0)
    seen = {}
    with (
        dit_attn.enabled(model, method),
        dit_attn.observing(model, lambda call, request, out: seen.update({call.layer.name: (request.layout, out)})),
    ):
        forward(model, inputs)
        session = session_of(model)
        assert session is not None and session.observers
    layout, out = next((layout, out) for layout, out in seen.values() if layout is not None)
    assert layout.density < 0.75
    assert torch.isfinite(out).all()
    assert session.observers == []
