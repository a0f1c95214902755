"""The sizes of a layer are those of the tensors that its attention call gets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.processors.attach.layer_shape import compute_device, compute_dtype, head_count, layer_shape
from tests._support.compose import forward
from tests.families.test_flux_2 import TestFlux2 as Flux2
from tests.families.test_hidream import TestHiDream as HiDream
from tests.families.test_kandinsky_5 import TestKandinsky5 as Kandinsky5
from tests.families.test_lumina_2 import TestLumina2 as Lumina2
from tests.families.test_wan import TestWan as Wan


@pytest.mark.parametrize(
    ("layer", "count"),
    [({"heads": 4}, 4), ({"num_heads": 3}, 3), ({"n_heads": 2}, 2), ({"heads": None, "num_heads": 3}, 3), ({}, None)],
)
def test_the_number_of_heads_has_three_names(layer: dict[str, Any], count: int | None) -> None:
    assert head_count(SimpleNamespace(**layer)) == count


@pytest.mark.parametrize("family", [Flux2, HiDream, Kandinsky5, Lumina2, Wan])
def test_it_is_that_of_the_attention_call_whatever_the_projections_are_called(family: Any) -> None:
    torch.manual_seed(0)
    model = family().model().eval()
    session = dit_attn.enable(model)
    shapes = [layer_shape(layer, model.get_submodule(layer.name), len(session.layers)) for layer in session.layers]
    seen: list[Any] = []
    with dit_attn.observing(model, lambda call, *_: seen.append(call)):
        forward(model, family().inputs())
    assert {call.layer.index for call in seen} == set(range(len(shapes)))
    for call in seen:
        shape = shapes[call.layer.index]
        assert (shape.name, shape.kind, shape.index) == (call.layer.name, "self", call.layer.index)
        assert shape.count == len(shapes)
        assert (shape.heads, shape.head_dim) == call.q.shape[2:] and call.k.shape[2] % shape.kv_heads == 0
        assert shape.kv_heads == (shape.heads // 2 if family is Lumina2 else shape.heads)
        assert shape.dtype == call.q.dtype
        entered = model.get_submodule(shape.name)
        widths = {part.in_features for part in entered.children() if isinstance(part, torch.nn.Linear)}
        assert shape.hidden_size in widths


def test_weights_that_are_stored_in_8_bits_are_not_computed_in_8_bits() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2).to(torch.float8_e4m3fn), torch.nn.Linear(2, 2).bfloat16())
    assert compute_dtype(module) == torch.bfloat16
    assert compute_dtype(module[:1]) == torch.get_default_dtype()


def test_weights_without_a_place_are_computed_where_a_hook_brings_them() -> None:
    module = torch.nn.Sequential(torch.nn.Linear(2, 2, device="meta"))
    assert compute_device(module) == torch.device("cpu")
    module[0]._hf_hook = SimpleNamespace(execution_device="cuda:1")  # type: ignore[assignment]
    assert compute_device(module) == torch.device("cuda:1")
