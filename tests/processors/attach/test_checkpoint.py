"""Gradient checkpointing and fine-tuning through enabled methods."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import dit_attn
from dit_attn.processors.attach.checkpoint import CheckpointHook
from tests._support.compose import SPARSE, same, tiny

BLOCKS: dict[str, Any] = {"q_block": 16, "kv_block": 16}
RECTIFIED = dit_attn.RectifiedSpaAttn(density=0.5, dense_steps=0, **BLOCKS)
TRAINED = [SPARSE, RECTIFIED, dit_attn.BlockSparse(top_p=0.5, dense_steps=0, max_error=10.0, **BLOCKS)]
TIMES = (900, 800, 950, 700)


def trained(name: str = "wan", checkpointing: bool = True, **options: Any) -> tuple[Any, dict[str, Any]]:
    model, inputs = tiny(name)
    model.train()
    if checkpointing:
        model.enable_gradient_checkpointing(**options)
    return model, inputs


def loss_at(model: Any, inputs: dict[str, Any], time: int) -> torch.Tensor:
    arguments = copy.deepcopy(inputs)
    arguments["timestep"] = torch.full_like(arguments["timestep"], time)
    return model(**arguments, return_dict=False)[0].square().mean()


def gradients(model: Any) -> list[torch.Tensor]:
    found = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    model.zero_grad()
    return found


def equal(first: list[torch.Tensor], second: list[torch.Tensor]) -> bool:
    return len(first) == len(second) > 0 and all(same(a, b) for a, b in zip(first, second))


def reentrant(function: Any, *args: Any) -> Any:
    return checkpoint(function.__call__, *args, use_reentrant=True)


@pytest.mark.parametrize("name", ["wan", "flux", "pixart"])
@pytest.mark.parametrize("method", TRAINED, ids=["block-sparse", "rectified", "top-p"])
def test_checkpointed_gradients_are_those_of_the_same_run_without(name: str, method: Any) -> None:
    found, reports = [], []
    for checkpointing in (False, True):
        model, inputs = trained(name, checkpointing)
        dit_attn.enable(model, method)
        steps = []
        for time in TIMES:
            loss_at(model, inputs, time).backward()
            steps.append(gradients(model))
        found.append(steps)
        reports.append(dit_attn.summary(model))
    assert all(equal(plain, again) for plain, again in zip(*found, strict=True))
    assert reports[0].sparse_calls == reports[1].sparse_calls > 0
    for name in ("calls", "runs", "steps"):
        assert getattr(reports[0], name) == getattr(reports[1], name)
    assert reports[0].fallbacks == reports[1].fallbacks and reports[0].density == reports[1].density


@pytest.mark.parametrize("method", TRAINED[:2], ids=["block-sparse", "rectified"])
def test_reentrant_checkpoints_give_the_same_gradients(method: Any) -> None:
    found = []
    for options in ({}, {"gradient_checkpointing_func": reentrant}):
        model, inputs = trained(**options)
        dit_attn.enable(model, method)
        loss_at(model, {**inputs, "hidden_states": inputs["hidden_states"].requires_grad_()}, 500).backward()
        found.append(gradients(model))
        assert dit_attn.summary(model).sparse_calls == dit_attn.summary(model).calls == 2
    for plain, again in zip(*found, strict=True):  # stock sums in another order too
        torch.testing.assert_close(plain, again, rtol=1e-4, atol=1e-7)


def test_a_block_is_computed_again_as_at_its_own_step() -> None:
    method = dit_attn.BlockSparse(density=0.5, q_block=32, kv_block=32, dense_steps=1)
    found = []
    for checkpointing in (False, True):
        model, inputs = trained(checkpointing=checkpointing)
        dit_attn.enable(model, method)
        # The first call is dense, the second sparse; both are still to be computed again when backward begins.
        (loss_at(model, inputs, 900) + 2.0 * loss_at(model, inputs, 800)).backward()
        found.append(gradients(model))
        assert 0 < dit_attn.summary(model).sparse_calls < dit_attn.summary(model).calls
    assert equal(*found)


def test_backward_twice_computes_the_same_twice() -> None:
    model, inputs = trained()
    dit_attn.enable(model, SPARSE)
    loss = loss_at(model, inputs, 500)
    loss.backward(retain_graph=True)
    once = gradients(model)
    loss.backward()
    assert equal(once, gradients(model))


def test_without_a_method_checkpointed_gradients_are_stock() -> None:
    model, inputs = trained()
    loss_at(model, inputs, 500).backward()
    stock = gradients(model)
    dit_attn.enable(model)
    loss_at(model, inputs, 500).backward()
    assert equal(stock, gradients(model))
    dit_attn.disable(model)
    assert not isinstance(model._gradient_checkpointing_func, CheckpointHook)
    loss_at(model, inputs, 500).backward()
    assert equal(stock, gradients(model))


def test_observers_see_each_call_once() -> None:
    model, inputs = trained()
    dit_attn.enable(model, SPARSE)
    seen: list[str] = []
    with dit_attn.observing(model, lambda call, request, out: seen.append(call.layer.name)):
        loss_at(model, inputs, 500).backward()
    assert len(seen) == len(set(seen)) > 0


def test_a_copied_model_checkpoints_with_its_own_session() -> None:
    model, inputs = trained()
    dit_attn.enable(model, SPARSE)
    loss_at(model, inputs, 900).backward()
    expected = gradients(model)
    clone = copy.deepcopy(model)
    assert clone._gradient_checkpointing_func.session is not model._gradient_checkpointing_func.session
    loss_at(clone, inputs, 900).backward()
    assert equal(expected, gradients(clone))


def test_a_failing_kernel_fails_again_and_the_gradients_are_stock(monkeypatch: pytest.MonkeyPatch) -> None:
    from dit_attn.processors.core import executor

    def broken(*args: Any, **kwargs: Any) -> torch.Tensor:
        raise RuntimeError("no kernel")

    model, inputs = trained()
    loss_at(model, inputs, 500).backward()
    stock = gradients(model)
    dit_attn.enable(model, SPARSE)
    monkeypatch.setattr(executor, "sparse_attention", broken)
    with pytest.warns(UserWarning, match="kernel failed"):
        loss_at(model, inputs, 500).backward()
    assert equal(stock, gradients(model)) and dit_attn.summary(model).sparse_calls == 0


def test_checkpointing_that_cannot_be_followed_is_refused_in_one_line() -> None:
    for name in ("wan", "pixart"):
        model, inputs = trained(name, checkpointing=False)
        blocks = model.blocks if name == "wan" else model.transformer_blocks
        for block in blocks:
            block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)
        loss_at(model, inputs, 500).backward()
        stock = gradients(model)
        dit_attn.enable(model, SPARSE)
        with pytest.raises(dit_attn.DitAttnError, match=r"enable_gradient_checkpointing\(\)"):
            loss_at(model, inputs, 500).backward()
        model.zero_grad()
        dit_attn.enable(model)
        loss_at(model, inputs, 500).backward()
        assert equal(stock, gradients(model))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_re_ttention_is_refused_when_it_is_differentiated(checkpointing: bool) -> None:
    model, inputs = trained(checkpointing=checkpointing)
    dit_attn.enable(model, dit_attn.ReTtention(density=0.5, dense_steps=0, **BLOCKS))
    with pytest.raises(dit_attn.DitAttnError, match="re-ttention cannot be trained"):
        loss_at(model, inputs, 500).backward()
    with torch.inference_mode():
        loss_at(model, inputs, 400)
    assert dit_attn.summary(model).sparse_calls


def test_validation_in_inference_mode_does_not_disturb_training() -> None:
    for method in TRAINED:
        model, inputs = trained()
        dit_attn.enable(model, method)
        loss_at(model, inputs, 500).backward()
        expected = gradients(model)
        with torch.inference_mode():
            loss_at(model, inputs, 900)
        loss_at(model, inputs, 500).backward()
        assert equal(expected, gradients(model))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    "method",
    [dit_attn.SoftPAG(heads="1"), dit_attn.SEG(), dit_attn.SLG(start=0.0, stop=1.0), dit_attn.STG()],
    ids=lambda method: method.slug,
)
def test_guidance_stands_aside_in_training_and_says_so(method: Any, checkpointing: bool) -> None:
    model, inputs = trained(checkpointing=checkpointing)
    loss_at(model, inputs, 500).backward()
    stock = gradients(model)
    dit_attn.enable(model, method)
    loss_at(model, inputs, 500).backward()
    assert equal(stock, gradients(model))
    assert "guidance stood aside in 1 training calls; call eval() to sample" in dit_attn.summary(model).warnings
    with torch.no_grad():  # sampling in training mode is guided
        guided = loss_at(model, inputs, 900)
        dit_attn.disable(model)
        assert not same(guided, loss_at(model, inputs, 900))


def test_guidance_with_checkpointing_outside_training_mode_is_refused() -> None:
    model, inputs = trained()
    model.eval()
    dit_attn.enable(model, dit_attn.SoftPAG(heads="1"))
    with pytest.raises(dit_attn.DitAttnError, match="cannot be combined with gradient checkpointing"):
        loss_at(model, inputs, 500)
    model.disable_gradient_checkpointing()
    loss_at(model, inputs, 500).backward()
    assert equal(gradients(model), gradients(model)) is False and dit_attn.summary(model).guidance is not None
