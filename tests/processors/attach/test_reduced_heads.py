"""Heads by part of the run, in copies and in compiled transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import DitAttnError, HeadDrop
from tests._support.compose import forward, same, tiny, tiny_pipeline


def test_parts_of_the_run_leave_out_heads_of_their_own() -> None:
    pipe, call = tiny_pipeline("pixart")
    counts: dict[int, set[int]] = {}
    dit_attn.enable(pipe, HeadDrop(heads=" / *:0", until=(0.5,)))

    def note(call: Any, request: Any, out: torch.Tensor) -> None:
        counts.setdefault(call.clock.step, set()).add(call.q.shape[2])

    with dit_attn.observing(pipe, note):
        pipe(**call, num_inference_steps=4, output_type="latent")
    most = max(counts[0])
    assert counts == {0: {most}, 1: {most}, 2: {most - 1}, 3: {most - 1}}
    assert dit_attn.summary(pipe).reports["head-drop"].dropped == [0, 2]


def test_a_copy_and_a_pickle() -> None:
    model, args = tiny("pixart")
    dit_attn.enable(model, HeadDrop(heads="*:0"))
    found = forward(model, args)
    other = copy.deepcopy(model)
    dit_attn.disable(model)
    assert same(found, forward(other, args))


def test_compiled_transformers_run_it() -> None:
    model, args = tiny("wan")
    dit_attn.enable(model, HeadDrop(heads="*:0"))
    expected = forward(model, args)
    torch.compiler.reset()
    model.compile(backend="eager", fullgraph=True)
    torch.testing.assert_close(forward(model, args), expected, atol=2e-6, rtol=1e-5)
    dit_attn.enable(model, HeadDrop(heads=" / *:0", until=(0.5,)))
    with pytest.raises(DitAttnError, match="inside a compiled transformer"):
        forward(model, args)
