"""A warm start takes over what acts on image tokens, and splits heads; a tail takes over the model's own weights."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from dit_attn import models
from dit_attn.errors import DitAttnError
from dit_attn.models import export, loop, warmstart
from dit_attn.models.recipe import TAILS, NetSize, Stage, recipe


def _run(**changes):
    stages = (Stage(1.0, 32, 1, 16, 1.0),)
    return loop.Run(replace(recipe("tiny-joint"), stages=stages, **changes), seed=0, device=torch.device("cpu"))


def _layers(wide, size, width=24):
    torch.manual_seed(0)
    return torch.nn.Linear(width, wide * size), torch.nn.Linear(width, wide * size)


def _logits(weights, tokens, heads):
    """(heads, S, S) scaled logits of `tokens` (S, D) under ((query weight, bias), (key weight, bias))."""
    q, k = (torch.nn.functional.linear(tokens, *pair).unflatten(1, (heads, -1)).transpose(0, 1) for pair in weights)
    return q @ k.transpose(1, 2) / q.shape[-1] ** 0.5


@torch.no_grad()
def test_as_many_heads_as_before_keep_their_logits():
    query, key = _layers(2, 8)
    tokens = torch.randn(5, 24)
    before = _logits(((query.weight, query.bias), (key.weight, key.bias)), tokens, 2)
    after = _logits(warmstart.split_heads(query, key, 2, 2), tokens, 2)
    assert torch.allclose(before, after, atol=1e-4)


@torch.no_grad()
def test_narrow_heads_keep_the_logits_of_a_wide_head_of_low_rank():
    query, key = _layers(1, 16)
    for layer in (query, key):  # two directions carry everything
        layer.weight[2:] = 0
        layer.bias[2:] = 0
    tokens = torch.randn(5, 24)
    before = _logits(((query.weight, query.bias), (key.weight, key.bias)), tokens, 1)
    after = _logits(warmstart.split_heads(query, key, 1, 4), tokens, 4)
    assert torch.allclose(before.expand(4, 5, 5), after, atol=1e-4)


@torch.no_grad()
def test_parts_of_one_head_differ_beyond_its_leading_directions():
    (query, _), _ = warmstart.split_heads(*_layers(1, 16), 1, 4)
    first, second = query[:4], query[4:8]
    assert torch.equal(first[:2], second[:2])
    assert not torch.allclose(first[2:], second[2:])


@torch.no_grad()
def test_a_warm_start_denoises_before_the_first_step():
    run = _run()
    assert float(loop.loss_of(run.model, run.batch(), 0.05)) < 0.3
    cold = _run(warm_start="")
    assert float(loop.loss_of(cold.model, cold.batch(), 0.05)) > 3


@torch.no_grad()
def test_the_pooled_text_starts_without_influence_and_the_source_stays_whole():
    run = _run()
    time = run.model.transformer.time_text_embed
    level = torch.full((2,), 500.0)
    pooled = torch.randn(2, run.recipe.net.text_width)
    assert torch.equal(time(level, pooled), time(level, torch.zeros_like(pooled)))
    source = models.load("tiny-image")
    for key, value in source.text_encoder.state_dict().items():
        assert torch.equal(run.model.text_encoder_3.state_dict()[key], value), key


def test_another_width_is_refused_in_one_line():
    with pytest.raises(DitAttnError, match="layers of width 128") as error:
        _run(net=NetSize(hidden=64, heads=8))
    assert "\n" not in str(error.value)


def _tail(name):
    return loop.Run(recipe(name, tail=True), seed=0, device=torch.device("cpu"))


def _cold():
    return loop.Run(recipe("tiny-image"), seed=0, device=torch.device("cpu"))


def test_resume_of_a_whole_training_as_a_tail_is_refused_and_the_reverse(tmp_path):
    _cold().save(tmp_path)
    with pytest.raises(DitAttnError, match="belongs to a whole training of 'tiny-image'; leave out --tail"):
        _tail("tiny-image").restore(tmp_path)
    _tail("tiny-image").save(tmp_path)
    with pytest.raises(DitAttnError, match="belongs to a tail of 'tiny-image'; add --tail"):
        _cold().restore(tmp_path)
    _tail("tiny-image").restore(tmp_path)


@pytest.mark.parametrize("name", sorted(TAILS))
def test_a_tail_starts_at_the_shipped_weights_of_every_part(name):
    started, shipped = _tail(name).averaged(), models.load(name)
    for part, module in started.parts.items():
        for key, value in getattr(shipped, part).state_dict().items():
            assert torch.equal(module.state_dict()[key], value), (part, key)


def test_a_tail_records_what_it_went_on_from(tmp_path):
    export.export(_tail("tiny-image"), tmp_path / "out")
    record = json.loads((tmp_path / "out" / "training.json").read_text())
    assert record["went_on_from"] == models.info("tiny-image").training
    assert "went_on_from" not in export.provenance(_cold())
