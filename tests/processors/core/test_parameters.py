"""Modules that methods own: named by method and layer, copied, pickled empty, saved and loaded whole or not at all."""

from __future__ import annotations

import copy
import pickle
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.core.layer import Layer
from dit_attn.processors.core.parameters import LayerShape, LearnedModules, make_module, on_device

METHOD = SimpleNamespace(slug="two-words")
SHAPE = LayerShape("blocks.0.attn", "self", 0, 2, 2, 2, 4, 8, torch.float32)


def modules(count: int = 2) -> LearnedModules:
    found = LearnedModules("Model")
    found.add(METHOD, {f"blocks.{i}.attn": torch.nn.Linear(2, 1) for i in range(count)}, count)
    return found


def test_a_child_is_named_by_the_method_and_its_layers() -> None:
    found = modules()
    found.add(SimpleNamespace(slug="two-words"), {"blocks.1.attn": torch.nn.Linear(1, 1)}, 2)
    assert list(found.methods) == ["two_words", "two_words_2"] and found.methods["two_words"] is METHOD
    assert list(found.state_dict())[-1] == "two_words_2.blocks.1.attn.bias"
    assert found.find("two_words", "blocks.0.attn") is found.get_submodule("two_words.blocks.0.attn")
    assert found.find("two_words_2", "blocks.0.attn") is None


def test_layers_get_their_modules() -> None:
    found, layers = modules(1), [Layer(f"blocks.{i}.attn", i) for i in range(2)]
    found.bind(layers)
    assert layers[0].learned == {id(METHOD): found.find("two_words", "blocks.0.attn")} and not layers[1].learned


def test_what_is_adopted_is_the_same_object() -> None:
    first, second = modules(), LearnedModules("Model")
    second.adopt(METHOD, first, "two_words")
    assert all(a is b for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_copy_has_tensors_of_its_own_and_the_same_methods() -> None:
    found = modules().eval()
    clone = copy.deepcopy(found)
    assert (clone.methods, clone.counts) == (found.methods, {"two_words": 2})
    assert clone.transformer == "Model" and not clone.training
    assert not {x.data_ptr() for x in clone.parameters()} & {x.data_ptr() for x in found.parameters()}
    assert [name for name, _ in clone.named_parameters()] == [name for name, _ in found.named_parameters()]


def test_it_is_pickled_empty() -> None:
    back = pickle.loads(pickle.dumps(modules()))
    assert isinstance(back, LearnedModules) and not back.state_dict() and not back.methods


def test_tensors_are_copies_on_the_cpu_and_meta_ones_cannot_be_saved() -> None:
    found = modules()
    tensors = found.tensors("two_words")
    assert list(tensors) == [f"blocks.{i}.attn.{part}" for i in range(2) for part in ("weight", "bias")]
    tensors["blocks.0.attn.weight"].zero_()
    assert found.tensors("two_words")["blocks.0.attn.weight"].any()
    with pytest.raises(DitAttnError, match="meta device or offloaded"):
        found.to("meta").tensors("two_words")


def test_loading_casts_and_changes_nothing_where_one_tensor_does_not_fit() -> None:
    found = modules()
    tensors = {name: torch.full_like(x, 2.0, dtype=torch.bfloat16) for name, x in found.tensors("two_words").items()}
    with pytest.raises(DitAttnError, match=r"^here: blocks\.1\.attn\.bias is \(4,\) and must be \(1,\)"):
        found.load("two_words", {**tensors, "blocks.1.attn.bias": torch.zeros(4)}, "here")
    assert not any(bool((x == 2).any()) for x in found.parameters())
    found.load("two_words", tensors, "here")
    assert all(bool((x == 2).all()) and x.dtype == torch.float32 for x in found.parameters())


def test_a_module_is_made_on_the_cpu_and_trainable_whatever_surrounds_it() -> None:
    torch.manual_seed(0)
    expected, state = torch.nn.Linear(2, 2), torch.manual_seed(0).get_state()
    with torch.device("meta"), torch.inference_mode():
        made: Any = make_module(lambda shape: torch.nn.Linear(shape.heads, 2), SHAPE)
    assert torch.equal(made.weight, expected.weight) and torch.equal(torch.get_rng_state(), state)
    assert not made.weight.is_inference() and made.weight.requires_grad
    assert make_module(lambda shape: None, SHAPE) is None


def test_a_module_follows_the_call_but_not_where_a_hook_brings_its_tensors() -> None:
    module = torch.nn.Linear(2, 2)
    weight = module.weight
    assert on_device(module, torch.device("cpu")).weight is weight
    assert on_device(module, torch.device("meta")).weight.is_meta  # type: ignore[union-attr]
    assert on_device(module, torch.device("cpu")).weight.is_meta  # type: ignore[union-attr]
