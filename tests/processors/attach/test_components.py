"""Transformers of a pipeline, behind wrappers too."""

from __future__ import annotations

from types import SimpleNamespace

import torch

from dit_attn.processors.attach.components import has_component, unwrap


def test_wrappers_are_taken_off() -> None:
    model = torch.nn.Linear(2, 2)
    compiled = torch.compile(model)
    assert unwrap(model) is model and unwrap(compiled) is model and unwrap(None) is None
    assert unwrap(torch.compile(torch.nn.DataParallel(model))) is model


def test_a_pipeline_has_two_places_for_a_transformer() -> None:
    one, two = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    pipe = SimpleNamespace(transformer=one, transformer_2=torch.compile(two), vae=torch.nn.Linear(2, 2))
    assert has_component(pipe, one) and has_component(pipe, two) and not has_component(pipe, pipe.vae)
    assert not has_component(SimpleNamespace(transformer=None), one) and not has_component(object(), one)
