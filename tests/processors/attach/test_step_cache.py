"""Perturbed passes beside step caches that replace a transformer's forward."""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import MethodType
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import models
from dit_attn.processors.attach.step_cache import LayerCalls, ModuleState, has_foreign_forward, is_cache_dit
from dit_attn.processors.core.layer import Layer
from tests._support.compose import same, tiny

CALL = {**models.call_defaults("tiny-image"), "height": 64, "width": 64, "num_inference_steps": 6}
CALL["guidance_scale"] = 1.0
FULL, CACHED = (0, 2, 4), (1, 3, 5)  # steps that the caches below compute and answer


class Counting:
    """TeaCache's way: counts its calls on the transformer, and answers every second one by the residual of the last."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.stock = forward

    def replacement(self) -> Callable[..., Any]:
        stock = self.stock

        def cached(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            vars(self).setdefault("memory", {"count": 0})
            count = self.memory["count"]
            self.memory["count"] = count + 1
            if count % 2:
                return (hidden_states + self.residual,)
            out = stock(self, hidden_states, *args, **kwargs)
            self.residual = out[0] - hidden_states
            return out

        return cached


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = models.load("tiny-image")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def cache(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    kind = type(pipe.transformer)
    monkeypatch.setattr(kind, "forward", Counting(kind.forward).replacement())
    yield
    dit_attn.disable(pipe)
    vars(pipe.transformer).pop("memory", None)
    vars(pipe.transformer).pop("residual", None)


def run(pipe: Any) -> torch.Tensor:
    pipe.transformer.__dict__.pop("memory", None)
    generator = torch.Generator().manual_seed(0)
    return pipe("a circle", generator=generator, output_type="latent", return_dict=False, **CALL)[0]


# -- TeaCache's way ---------------------------------------------------------------------------------------------------


def test_methods_keep_the_decisions_of_a_cache_that_replaces_the_forward(pipe: Any, cache: None) -> None:
    alone = run(pipe)
    dit_attn.enable(pipe)
    assert same(run(pipe), alone)
    dit_attn.enable(pipe, dit_attn.BlockSparse(density=0.4, dense_steps=0, q_block=16, kv_block=16))
    assert not same(run(pipe), alone)
    report = dit_attn.summary(pipe)
    assert report.sparse_calls == report.calls == len(FULL) * len(report.layers)


@pytest.mark.parametrize("batched", [False, True], ids=["second call", "one call"])
def test_a_perturbed_pass_takes_the_decision_of_its_plain_pass_and_leaves_no_trace(
    pipe: Any, cache: None, batched: bool
) -> None:
    alone = run(pipe)
    dit_attn.enable(pipe, dit_attn.SoftPAG(heads="3", scale=1e-20, batched=batched))  # too small to change a bit
    assert same(run(pipe), alone)
    report = dit_attn.summary(pipe)
    assert report.guidance is not None and report.guidance.evaluations == len(FULL)
    assert report.guidance.steps == len(FULL) + len(CACHED) and pipe.transformer.memory == {"count": 6}
    assert f"a step cache answered {len(CACHED)} of 6 passes" in report.warnings[0]


def test_updates_are_exact_where_the_cache_computes(pipe: Any, cache: None) -> None:
    updates: dict[str, list[torch.Tensor]] = {"plain": [], "guided": []}
    handle = pipe.transformer.register_forward_hook(lambda *args: updates["plain"].append(args[-1][0].double()))
    dit_attn.enable(pipe, dit_attn.SoftPAG(heads="3", scale=2.0))
    after = pipe.transformer.register_forward_hook(lambda *args: updates["guided"].append(args[-1][0].double()))
    run(pipe)
    handle.remove()
    after.remove()
    found = [guided - plain for plain, guided in zip(updates["plain"], updates["guided"])]
    for step in CACHED:
        torch.testing.assert_close(found[step], found[step - 1], atol=1e-5, rtol=1e-4)
    for step in FULL[1:]:
        assert not torch.allclose(found[step], found[step - 1], atol=1e-3)


@pytest.mark.parametrize("interval", [2, 3])
def test_an_update_that_is_due_at_a_cached_step_is_computed_at_the_next_full_one(
    pipe: Any, cache: None, interval: int
) -> None:
    dit_attn.enable(pipe, dit_attn.SoftPAG(heads="3", scale=2.0, interval=interval))
    run(pipe)
    report = dit_attn.summary(pipe).guidance
    assert report is not None and report.evaluations == {2: 3, 3: 2}[interval]  # at 0, 2, 4, and at 0, 4


def test_a_cache_whose_state_is_out_of_sight_is_refused(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind, count, kept = type(pipe.transformer), [0], [torch.empty(0)]
    stock = kind.forward

    def cached(self: Any, *args: Any, **kwargs: Any) -> Any:
        count[0] += 1
        if count[0] % 2:
            kept[0] = stock(self, *args, **kwargs)[0]
        return (kept[0],)

    monkeypatch.setattr(kind, "forward", cached)
    refused = r"a step cache answered the perturbed pass of softpag; .* disable the cache"
    with dit_attn.enabled(pipe, dit_attn.SoftPAG(heads="3")), pytest.raises(dit_attn.DitAttnError, match=refused):
        run(pipe)


# -- parts ------------------------------------------------------------------------------------------------------------


def test_a_forward_that_other_code_has_replaced_is_told_from_wrapped_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny("flux")
    kind = type(model)
    assert not has_foreign_forward(model)  # under a decorator of diffusers
    stock = model.forward

    def other(self: Any, *args: Any, **kwargs: Any) -> Any:
        return stock(*args, **kwargs)

    for forward in (MethodType(other, model), functools.wraps(stock)(functools.partial(other, model)), lambda: None):
        model.forward = forward  # type: ignore[method-assign]
        assert has_foreign_forward(model)
    del model.forward
    monkeypatch.setattr(kind, "forward", functools.wraps(kind.forward)(other))
    assert has_foreign_forward(model)


def test_offload_hooks_are_no_foreign_forward() -> None:
    from accelerate.hooks import ModelHook, add_hook_to_module

    model, _ = tiny("wan")
    add_hook_to_module(model, ModelHook())
    assert not has_foreign_forward(model)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)  # type: ignore[operator]
    assert not has_foreign_forward(model) and not is_cache_dit(model)


def test_a_state_is_restored_in_place_whatever_was_changed_added_or_deleted() -> None:
    module = torch.nn.Linear(2, 2)
    inner: list[int] = [1]
    tensor = torch.zeros(1)
    module.memory, module.gone, module.kept = {"inner": inner, "tensor": tensor}, 1, {2}  # type: ignore[assignment]
    before = ModuleState(module)
    memory: Any = module.memory
    memory["new"] = 1
    memory["tensor"] = torch.ones(1)
    inner.append(2)
    module.added = 1  # type: ignore[assignment]
    del module.gone
    module.kept.clear()  # type: ignore[operator]
    weight = module.weight
    before.restore()
    assert module.memory is memory and memory == {"inner": inner, "tensor": tensor} and inner == [1]
    assert module.gone == 1 and module.kept == {2} and not hasattr(module, "added") and module.weight is weight


def test_a_layer_that_was_called_before_and_is_not_called_now_was_answered_for() -> None:
    layers = [Layer("a", 0), Layer("b", 1), Layer("never", 2)]
    first = LayerCalls(layers)
    for layer in layers[:2]:
        layer.stats.calls += 1
    assert first.called == {"a", "b"} and not first.answered
    second = LayerCalls(layers)
    layers[0].stats.calls += 1
    assert second.called == {"a"} and second.answered
    layers[1].stats.calls += 1
    assert not second.answered
