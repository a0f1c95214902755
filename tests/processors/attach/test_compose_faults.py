"""What a run leaves behind: a request that broke it, memory that ran out, the first of two transformers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import models
from dit_attn.processors.attach import attach
from dit_attn.processors.core import executor
from tests._support.compose import pipeline_run, same, tiny_pipeline

BLOCKS: dict[str, Any] = {"q_block": 32, "kv_block": 32, "density": 0.25, "dense_steps": 0}
METHODS = [dit_attn.BlockSparse(**BLOCKS), dit_attn.ReTtention(**BLOCKS)]
CALL = {**models.call_defaults("tiny-image"), "height": 64, "width": 64, "num_inference_steps": 3}


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = models.load("tiny-image")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, **changes: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    found: torch.Tensor = pipe("a circle", generator=generator, output_type="latent", **{**CALL, **changes}).images
    return found


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.slug)
def test_a_request_of_nan_does_not_disable_a_layer_for_the_next(pipe: Any, method: Any) -> None:
    with dit_attn.enabled(pipe, method):
        clean = latents(pipe)
        calls = dit_attn.summary(pipe).sparse_calls
        with pytest.warns(UserWarning, match="NaN or infinity"):
            latents(pipe, latents=torch.full_like(clean, float("nan")))
        assert same(clean, latents(pipe))
        report = dit_attn.summary(pipe)
        assert report.sparse_calls == calls > 0 and "kernel gave NaN or infinity" not in report.fallbacks


def test_memory_that_runs_out_in_one_call_makes_its_layer_dense_for_that_run(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    with dit_attn.enabled(pipe, METHODS[0]):
        clean = latents(pipe)
        calls = dit_attn.summary(pipe).sparse_calls
        left = [2]

        def full(*args: Any) -> torch.Tensor:
            left[0] -= 1
            if left[0] == 0:
                raise torch.OutOfMemoryError("tried to allocate 2 GiB")
            return real(*args)

        real = executor.run
        monkeypatch.setattr(executor, "run", full)
        with pytest.warns(UserWarning, match="kernel failed: OutOfMemoryError"):
            latents(pipe)
        report = dit_attn.summary(pipe)
        assert report.sparse_calls == calls - CALL["num_inference_steps"]  # one layer, from its first step on
        assert same(clean, latents(pipe)) and dit_attn.summary(pipe).sparse_calls == calls


def test_a_guidance_update_of_exactly_0_is_warned_about(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = type(pipe.transformer)
    forward, calls, kept = kind.forward, [0], [torch.empty(0)]

    def cached(self: Any, *args: Any, **kwargs: Any) -> Any:  # every second call gives the result of the one before
        calls[0] += 1
        out = forward(self, *args, **kwargs)
        if calls[0] % 2:
            kept[0] = out[0]
        return (kept[0],)

    with dit_attn.enabled(pipe, dit_attn.SoftPAG(heads="3", scale=2.0)):
        latents(pipe, guidance_scale=1.0)
        assert dit_attn.summary(pipe).warnings == ()
        monkeypatch.setattr(kind, "forward", cached)
        latents(pipe, guidance_scale=1.0)
        assert "update was exactly 0 at 3 of 3 guided steps" in dit_attn.summary(pipe).warnings[0]


def stored_bytes(session: Any) -> int:
    """Bytes of what methods store for the layers, and of the guidance update."""
    found = [state.rest.values.nbytes + state.rho.nbytes for layer in session.layers for state in layer.state.values()]
    update = session.guider.update if session.guider is not None else None
    return sum(found) + sum(leaf.nbytes for leaf in (*update.delta, *update.cond)) if update else sum(found)


def test_the_first_of_two_transformers_frees_its_state_when_the_second_has_its_turn() -> None:
    pipe, kwargs = tiny_pipeline("wan")
    pipe.register_modules(transformer_2=copy.deepcopy(pipe.transformer))
    pipe.register_to_config(boundary_ratio=0.5)
    method = dit_attn.ReTtention(density=0.5, q_block=16, kv_block=16, dense_steps=0, period=8, stagger=False)
    dit_attn.enable(pipe, method, dit_attn.SoftPAG(heads="1", scale=2.0))
    first, second = (attach.session_of(model) for model in (pipe.transformer, pipe.transformer_2))
    assert first is not None and second is not None
    during: list[tuple[str, int]] = []
    for name, session in (("first", first), ("second", second)):
        session.model.register_forward_hook(lambda *_, name=name: during.append((name, stored_bytes(first))))
    with torch.no_grad():
        pipeline_run(pipe, kwargs, steps=6)
    assert {name for name, _ in during} == {"first", "second"}
    assert all(size > 0 for name, size in during if name == "first")
    assert all(size == 0 for name, size in during if name == "second")
