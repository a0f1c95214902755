"""Copies and files: a copied pipeline has sessions of its own, a saved model is a stock model."""

from __future__ import annotations

import copy
import io

import torch

import dit_attn
from dit_attn.processors.attach import attach, attention_processor
from tests._support.compose import SPARSE, WARM, forward, pipeline_run, same, tiny, tiny_pipeline


def test_a_copied_pipeline_keeps_its_method_and_its_own_clock() -> None:
    pipe, kwargs = tiny_pipeline("wan")
    session = dit_attn.enable(pipe, WARM)
    clone = copy.deepcopy(pipe)
    clone.set_progress_bar_config(disable=True)
    other = attach.session_of(clone.transformer)
    assert other is not None and other is not session and other.owner is clone and other.model is clone.transformer
    with torch.no_grad():
        expected = pipeline_run(pipe, kwargs, steps=2)
        assert same(expected, pipeline_run(clone, kwargs, steps=2))
    assert (session.clock.run, other.clock.run) == (1, 1)
    dit_attn.disable(clone)
    assert attach.session_of(pipe.transformer) is session


def test_two_pipelines_in_one_process_do_not_mix() -> None:
    pipes = [tiny_pipeline(name) for name in ("wan", "flux")]
    with torch.no_grad():
        plain = [pipeline_run(pipe, kwargs, steps=2) for pipe, kwargs in pipes]
        dit_attn.enable(pipes[0][0], SPARSE)
        assert not same(plain[0], pipeline_run(*pipes[0], steps=2))
        assert same(plain[1], pipeline_run(*pipes[1], steps=2))


def test_a_pickled_model_comes_back_as_stock() -> None:
    model, args = tiny("wan")
    plain = forward(model, args)
    dit_attn.enable(model, SPARSE)
    sparse = forward(model, args)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert attach.session_of(loaded) is None
    assert not [m for m in loaded.modules() if attention_processor.is_wrapped(getattr(m, "processor", None))]
    with loaded.cache_context("cond"):
        assert same(plain, forward(loaded, args))
    dit_attn.enable(loaded, SPARSE)
    assert same(sparse, forward(loaded, args))
    dit_attn.disable(loaded)
    assert same(plain, forward(loaded, args)) and same(sparse, forward(model, args))
