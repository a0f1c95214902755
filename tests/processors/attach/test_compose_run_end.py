"""The end of a run, however it ends: what methods stored is freed, the scheduler is stock again."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import models
from dit_attn.processors.attach import attach
from tests._support.outputs import same

CALL: dict[str, Any] = {
    **models.call_defaults("tiny-video"), "height": 32, "width": 32, "num_frames": 3, "num_inference_steps": 4,
}  # fmt: skip
METHODS = (
    dit_attn.ReTtention(density=0.5, q_block=16, kv_block=16, dense_steps=0, period=8, stagger=False),
    dit_attn.SoftPAG(heads="3", scale=1.0, inject="step"),
)
LOGGED = 4096  # bytes of the numbers that `summary` reports


class Broken(Exception):
    """Raised in the middle of a run."""


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = models.load("tiny-video")
    pipe.set_progress_bar_config(disable=True)
    with dit_attn.enabled(pipe, *METHODS):
        run(pipe)  # layouts are cached for the next run
    return pipe


def run(pipe: Any, **changes: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    call = {**CALL, "output_type": "latent", "return_dict": False, **changes}
    return pipe("a circle", generator=generator, **call)[0]


def live_bytes() -> int:
    """Bytes of all tensors that anything holds."""
    gc.collect()
    found = (x for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter))
    tensors = [x for x in found if x.layout == torch.strided]  # sparse ones of other tests have no storage
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


def stored(pipe: Any) -> int:
    """What the methods hold of the run: entries of the layers' state, an update, a recorded input."""
    session = attach.session_of(pipe.transformer)
    assert session is not None and session.guider is not None
    guider = session.guider
    return (sum(len(layer.state) for layer in session.layers) + len(guider._updates) + (guider.prefix is not None)) + (
        guider._state is not None
    )


def interrupt(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
    pipe._interrupt = step == 1
    return {}


def fail(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
    if step == 2:
        raise Broken
    return {}


@pytest.mark.parametrize("way", ["finished", "interrupted", "callback", "transformer"])
def test_memory_is_free_when_a_run_is_over(pipe: Any, way: str) -> None:
    run(pipe)
    before = live_bytes()
    session = dit_attn.enable(pipe, *METHODS)
    during, calls = [], [0]

    def watch(*_: Any) -> None:
        during.append(stored(pipe))
        calls[0] += 1
        if way == "transformer" and calls[0] == 6:
            raise Broken

    handle = session.module(session.layers[-1]).register_forward_hook(watch)
    callback = {"interrupted": interrupt, "callback": fail}.get(way)
    try:
        run(pipe, callback_on_step_end=callback)
    except Broken:
        assert way in ("callback", "transformer")
    handle.remove()
    assert len(during) > 4 and max(during) > len(session.layers)
    assert stored(pipe) == 0 and "step" not in vars(pipe.scheduler)
    assert live_bytes() - before < LOGGED
    assert dit_attn.summary(pipe).steps >= 2  # what happened is still known
    dit_attn.disable(pipe)


def test_memory_is_free_before_the_result_is_decoded(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dit_attn.enable(pipe, *METHODS)
    decode, found = pipe.vae.decode, []
    monkeypatch.setattr(pipe.vae, "decode", lambda *args, **kw: (found.append(stored(pipe)), decode(*args, **kw))[1])
    run(pipe, output_type="pt")
    assert found == [0]
    dit_attn.disable(pipe)


def test_a_failed_run_leaves_a_scheduler_that_was_swapped_stock(pipe: Any) -> None:
    stock = run(pipe)
    dit_attn.enable(pipe, *METHODS)
    expected = run(pipe)
    before, calls = pipe.scheduler, [0]

    def break_uncond(*_: Any) -> None:
        calls[0] += 1
        if calls[0] == 3:  # cond, perturbed, uncond: the update waits for the scheduler
            assert "step" in vars(before)
            raise Broken

    handle = pipe.transformer.blocks[-1].register_forward_pre_hook(break_uncond)
    with pytest.raises(Broken):
        run(pipe)
    handle.remove()
    assert "step" not in vars(before)
    pipe.scheduler = type(before).from_config(before.config)
    assert same(run(pipe), expected)
    dit_attn.disable(pipe)
    pipe.scheduler = before
    assert same(run(pipe), stock)


@pytest.mark.parametrize("inject", ["shift", "cond", "step"])
def test_guidance_that_is_changed_in_a_callback_leaves_a_stock_pipeline(pipe: Any, inject: str) -> None:
    stock = run(pipe)

    def change(pipe: Any, step: int, *_: Any) -> dict[str, Any]:
        pipe._guidance_scale = {1: 1.5, 2: 1.0}.get(step, pipe._guidance_scale)
        return {}

    found = []
    for way in ("shift", inject):
        dit_attn.enable(pipe, dit_attn.SoftPAG(heads="3", scale=1.0, inject=way))
        found.append(run(pipe, callback_on_step_end=change, guidance_scale=3.0))
        dit_attn.disable(pipe)
    torch.testing.assert_close(*found, atol=1e-4, rtol=1e-4)
    assert "step" not in vars(pipe.scheduler) and same(run(pipe), stock)


def test_a_loop_that_an_exception_leaves_frees_its_state(pipe: Any) -> None:
    transformer = pipe.transformer
    dit_attn.enable(transformer, METHODS[0], dit_attn.SoftPAG(heads="3", scale=1.0))
    inputs = {
        "hidden_states": torch.randn(1, transformer.config.in_channels, 3, 16, 16),
        "encoder_hidden_states": torch.randn(1, 16, transformer.config.text_dim),
    }

    def call(step: int) -> None:
        with torch.no_grad(), dit_attn.run_context(transformer, step=step, steps=4, branch="cond"):
            transformer(**inputs, timestep=torch.tensor([900 - step]))
            if step == 1:
                raise Broken

    call(0)
    assert stored(pipe) > 0
    with pytest.raises(Broken):
        call(1)
    assert stored(pipe) == 0
    dit_attn.disable(transformer)
