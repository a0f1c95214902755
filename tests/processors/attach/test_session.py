"""The session of a transformer: what it refers to, and what a copy of the transformer gets."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.processors.attach.attach import prepare, session_of
from dit_attn.processors.attach.families import families
from dit_attn.processors.attach.session import Session, _end_run
from dit_attn.processors.core.clock import Clock
from tests._support.compose import forward, tiny

WAN = next(row for row in families() if row.name == "wan")
METHODS = (dit_attn.BlockSparse(density=0.5, q_block=32, kv_block=32), dit_attn.SoftPAG(heads="1:0"))


class Pipe:
    """Holds a transformer."""


def test_a_new_session_has_its_methods_and_the_rule_of_its_family() -> None:
    model, clock = torch.nn.Linear(1, 1), Clock()
    session = Session(model, WAN, METHODS, clock)
    assert session.methods == METHODS and session.clock is clock and session.cfg is WAN.cfg
    assert not session.installed and session.guider is None and session.pipe is None
    session.add_layer("blocks.0.attn1")
    assert repr(session) == f"Session(wan, 1 layers, methods={list(METHODS)})"


def test_a_session_keeps_neither_its_transformer_nor_its_pipeline_alive() -> None:
    model, pipe = torch.nn.Linear(1, 1), Pipe()
    session = Session(model, WAN, (), Clock(), pipe)
    assert session.model is model and session.owner is pipe and session.pipe is None
    del model, pipe
    gc.collect()
    assert session.owner is None
    with pytest.raises(ReferenceError, match="no longer exists"):
        _ = session.model


def test_a_copy_has_layers_clock_and_guider_of_its_own() -> None:
    model, _ = tiny("wan")
    session = prepare(model, METHODS, Clock())
    session.installed = True
    session.clock.tick(900.0, session.cfg)
    session.layers[0].stats.calls = 7
    session.layers[0].state["probe"] = torch.zeros(1)
    clone = copy.deepcopy(model)
    memo: dict[int, Any] = {id(model): clone}
    other = copy.deepcopy(session, memo)
    assert copy.deepcopy(session, memo) is other
    assert other.model is clone and other.family is session.family and other.methods == METHODS and other.installed
    assert [layer.name for layer in other.layers] == [layer.name for layer in session.layers]
    assert not {layer.id for layer in other.layers} & {layer.id for layer in session.layers}
    assert other.layers[0].stats.calls == 0 and not other.layers[0].state
    assert other.clock is not session.clock and other.clock.run == 1
    assert other.guider is not None and other.guider is not session.guider and other.guider.session is other


def test_a_session_is_not_copied_without_its_transformer() -> None:
    model = torch.nn.Linear(1, 1)
    with pytest.raises(TypeError, match="deepcopy the transformer instead"):
        copy.deepcopy(Session(model, WAN, (), Clock()))


@pytest.mark.parametrize("share_prefix", [True, False])
def test_a_copy_of_a_guided_transformer_is_guided_alone(share_prefix: bool) -> None:
    model, args = tiny("wan")
    session = dit_attn.enable(model, dit_attn.SoftPAG(heads="1:0", share_prefix=share_prefix))
    clone = copy.deepcopy(model)
    expected = forward(model, args)
    other = session_of(clone)
    assert other is not None and other.guider is not None and other.guider.evaluations == 0
    assert torch.equal(forward(clone, args), expected) and other.guider.evaluations == 1
    assert session.guider is not None and session.guider.evaluations == 1
    dit_attn.disable(clone)
    assert not torch.equal(forward(clone, args), expected)
    session.reset()
    assert torch.equal(forward(model, args), expected)


@pytest.mark.parametrize("methods", [(), METHODS])
def test_a_session_is_of_one_thread_only_where_it_has_methods(methods: tuple[dit_attn.BlockSparse, ...]) -> None:
    model = torch.nn.Linear(1, 1)
    session = Session(model, WAN, methods, Clock())
    session.check_thread()  # nothing has run
    session._thread = -1  # another one made the last call
    if methods:
        with pytest.raises(dit_attn.DitAttnError, match="another thread is running this transformer"):
            session.check_thread()
    else:
        session.check_thread()


def test_a_run_that_ends_late_frees_nothing_of_the_next_one() -> None:
    model = torch.nn.Linear(1, 1)
    session = Session(model, WAN, METHODS, Clock(run=2))
    layer = session.add_layer("blocks.0.attn1")
    layer.state["kept"] = 1
    _end_run(weakref.ref(session), 1)
    assert layer.state == {"kept": 1}
    _end_run(weakref.ref(session), 2)
    assert layer.state == {}
