"""A wrapped layer: its handle, the batch rows of its calls, and what a new run empties."""

from __future__ import annotations

import gc

import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.core.layer import Layer, LayerStats, PassStates, layer_by_id, new_handle


def test_a_layer_is_found_by_its_handle_as_long_as_it_exists() -> None:
    first, second = Layer("blocks.0.attn1", 0), Layer("blocks.1.attn1", 1)
    assert layer_by_id(int(first.handle)) is first and layer_by_id(int(second.handle)) is second
    number = first.id
    del first
    gc.collect()
    with pytest.raises(DitAttnError, match="another load of dit_attn, or is gone"):
        layer_by_id(number)
    assert Layer("blocks.0.attn1", 0).id > number  # numbers are not given twice


def test_a_handle_is_a_cpu_tensor_of_its_number_whatever_the_default_device() -> None:
    with torch.device("meta"):
        handle = new_handle(41)
    assert (handle.device.type, handle.dtype, handle.shape, int(handle)) == ("cpu", torch.int64, (), 41)


def test_rows_follow_each_other_where_a_model_attends_to_its_samples_one_by_one() -> None:
    layer, seen = Layer("blocks.0", 0), []
    for count in (1, 1, 2):
        layer.advance_rows(count)
        seen.append(layer.rows)
    assert seen == [(0, 1), (1, 2), (2, 4)]


def test_a_new_run_empties_statistics_and_state_and_nothing_else() -> None:
    layer = Layer("blocks.0", 0)
    before = layer.stats
    before.calls, before.fallbacks["dense step"] = 3, 2
    layer.state["probe"] = torch.zeros(3)
    layer.disabled, layer.checked_run = "kernel failed", 4
    layer.begin_run()
    assert layer.stats == LayerStats() and not layer.state
    assert (layer.disabled, layer.checked_run) == ("kernel failed", 4)
    assert before.calls == 3  # a summary that was taken stays as it is


def test_every_window_has_a_state_of_its_own() -> None:
    layer = Layer("blocks.0", 0)
    for window in (0, 1):
        layer.begin_call(window)
        layer.state["probe"] = window
    layer.begin_call(0)
    assert layer.state == {"probe": 0} and layer.rows == (0, 0)
    layer.stateless = "windows"
    layer.drop_state()
    for window in (0, 1, None):
        layer.begin_call(window)
        assert not layer.state
    assert layer.stateless == "windows"
    layer.begin_run()
    assert layer.stateless is None


def test_statistics_of_two_layers_are_their_own() -> None:
    one, other = LayerStats(), LayerStats()
    one.fallbacks["dense step"] += 1
    one.measured.add(0.5)
    assert not other.fallbacks and not other.measured


def test_a_layer_prints_its_name_and_index() -> None:
    assert repr(Layer("blocks.3.attn1", 3)) == "Layer('blocks.3.attn1', index=3)"


def test_the_state_of_another_pass_of_the_same_window_can_be_asked_for() -> None:
    states = PassStates()
    states.begin_call(3)
    states.current["probe"] = 1
    states.begin_call(3, "twin")
    assert states.current == {} and states.of("plain") == {"probe": 1} and states.of("perturbed") == {}
    states.begin_call(4, "twin")
    assert states.of("plain") == {}
    states.drop()
    states.begin_call(3)
    assert states.current == {}
