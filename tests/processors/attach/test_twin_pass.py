"""The twin pass: one more pass before the plain one, with states of its own, that no clock or step cache notices."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from diffusers import FirstBlockCacheConfig

import dit_attn
from dit_attn.processors.attach import attach
from dit_attn.processors.attach.summary_parts import TwinSummary
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.methods import base
from dit_attn.processors.methods.base import TwinPass
from tests._support.compose import forward, pipeline_run, same, tiny, tiny_pipeline


@dataclass(frozen=True)
class Dual(base.Method):
    """Self attention without half of the keys, whose cross attention is that of a pass with all of them."""

    sites: ClassVar[tuple[str, ...]] = ("self", "cross")
    branches: tuple[str, ...] = ()
    interval: int = 1
    first_layer: int = 0

    def twin(self, clock: Clock, branches: Sequence[str]) -> TwinPass | None:
        """Every ``interval`` steps."""
        return TwinPass(self.branches, self.first_layer) if clock.step % self.interval == 0 else None

    def request(self, call: AttentionCall, request: Request) -> None:
        """Bar keys in the plain pass, replace what the twin pass recorded."""
        if call.kind == "self" and call.pass_name == "plain" and call.layer.index >= self.first_layer:
            request.add_span_bias(call, slice(None), slice(0, call.k.shape[1] // 2), -math.inf)
        if call.kind == "cross" and call.pass_name == "twin":
            request.record_output(lambda out: call.layer.state.update(out=out))
        if call.kind == "cross" and call.pass_name == "plain":
            out = call.layer.state_of("twin").get("out")
            if out is not None and out.shape[0] == len(call.branches):
                request.replace_output(out)


@dataclass(frozen=True)
class Half(base.Method):
    """The plain pass of :class:`Dual`, with outputs of cross attention from outside."""

    sites: ClassVar[tuple[str, ...]] = ("self", "cross")
    outputs: object = None
    first_layer: int = 0

    def request(self, call: AttentionCall, request: Request) -> None:
        """Bar the same keys, and replace."""
        if call.kind == "self" and call.layer.index >= self.first_layer:
            request.add_span_bias(call, slice(None), slice(0, call.k.shape[1] // 2), -math.inf)
        if call.kind == "cross" and self.outputs is not None:
            request.replace_output(self.outputs[call.layer.name])  # type: ignore[index]


def cross_outputs(model: Any, args: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Output of every cross-attention layer of a stock model."""
    found: dict[str, torch.Tensor] = {}
    with dit_attn.observing(model, lambda call, request, out: found.update({call.layer.name: out}), sites=("cross",)):
        forward(model, args)
    return found


def dual_reference(model: Any, args: dict[str, Any], first_layer: int = 0) -> torch.Tensor:
    """The result of two passes run by hand."""
    outputs = cross_outputs(model, args)
    with dit_attn.enabled(model, Half(outputs, first_layer)):
        return forward(model, args)


@pytest.mark.parametrize("name", ["wan", "pixart"])
def test_the_plain_pass_uses_what_the_twin_pass_recorded(name: str) -> None:
    model, args = tiny(name)
    stock, expected = forward(model, args), dual_reference(model, args)
    with dit_attn.enabled(model, Half()):
        alone = forward(model, args)
    session = dit_attn.enable(model, Dual())
    assert same(forward(model, args), expected)
    assert not same(expected, alone) and not same(expected, stock)
    assert session.twin is not None and session.twin.evaluations == 1
    dit_attn.disable(model)
    assert same(forward(model, args), stock)


def test_blocks_before_the_first_that_differs_run_once() -> None:
    model, args = tiny("wan")
    ran: list[int] = []
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: ran.append(i))
        block.attn1.register_forward_pre_hook(lambda *_, i=i: ran.append(10 + i))
    expected = dual_reference(model, args, first_layer=1)
    session = dit_attn.enable(model, Dual(first_layer=1))
    ran.clear()
    first = forward(model, args)
    assert ran.count(10) == 1 and ran.count(11) == 2
    # the first block's cross attention is the twin's in either case: it is the twin's block
    torch.testing.assert_close(first, expected, atol=1e-6, rtol=1e-5)
    assert session.twin is not None and session.twin.reused_blocks == 1
    assert dit_attn.summary(model).twin == TwinSummary(passes=1, reused=1 / len(model.blocks))
    assert all("forward" not in vars(block) for block in model.blocks)


def test_no_block_is_reused_next_to_a_control_branch_that_differs() -> None:
    model, args = tiny("vace")
    expected = dual_reference(model, args, first_layer=1)  # the layer of the branch comes last
    session = dit_attn.enable(model, Dual(first_layer=1))
    first = [args[name] for name in ("hidden_states", "timestep", "encoder_hidden_states")]
    control = [args[name] for name in ("control_hidden_states", "control_hidden_states_scale")]
    with torch.no_grad():
        found = model(*first, None, *control, return_dict=False)[0]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    assert session.twin is not None and (session.twin.evaluations, session.twin.reused_blocks) == (1, 0)
    assert session.twin.blocks == ["blocks.0", "blocks.1"]


def test_a_plain_pass_that_fails_gives_the_blocks_back() -> None:
    model, args = tiny("wan")
    dit_attn.enable(model, Dual(first_layer=1))
    handle = model.norm_out.register_forward_pre_hook(lambda *_: 1 / 0 if "forward" in vars(model.blocks[0]) else None)
    with pytest.raises(ZeroDivisionError):
        forward(model, args)
    handle.remove()
    assert all("forward" not in vars(block) for block in model.blocks)


@pytest.mark.parametrize("name", ["wan", "pixart"])
def test_a_run_has_the_steps_and_branches_it_has_without(name: str) -> None:
    pipe, kwargs = tiny_pipeline(name)
    seen: list[Any] = []

    def note(call: AttentionCall, request: Request, out: torch.Tensor) -> None:
        seen.append((call.pass_name, call.clock.run, call.clock.step, call.clock.total, call.branches))

    session = dit_attn.enable(pipe, Dual(branches=("cond",), interval=2))
    with dit_attn.observing(pipe, note):
        pipeline_run(pipe, kwargs)
    plain = list(dict.fromkeys(item[1:] for item in seen if item[0] == "plain"))
    twins = list(dict.fromkeys(item[1:] for item in seen if item[0] == "twin"))
    assert {item[1] for item in plain} == {0, 1, 2} and {item[0] for item in plain} == {1}
    assert {item[2] for item in plain} == {3}
    assert {item[1] for item in twins} == {0, 2}
    assert {branch for item in twins for branch in item[3]} == {"cond"}
    assert session.twin is not None and session.twin.evaluations == 2


def test_sparse_attention_with_a_history_is_untouched_by_a_twin_pass() -> None:
    pipe, kwargs = tiny_pipeline("wan")
    reader = dit_attn.ReTtention(density=0.3, q_block=32, kv_block=32, dense_steps=0)

    @dataclass(frozen=True)
    class Watcher(base.Method):
        """Asks for a twin pass and for nothing else."""

        def twin(self, clock: Clock, branches: Sequence[str]) -> TwinPass | None:
            """At every call."""
            return TwinPass()

        def request(self, call: AttentionCall, request: Request) -> None:
            """Nothing."""

    dit_attn.enable(pipe, reader)
    alone = pipeline_run(pipe, kwargs)
    dit_attn.enable(pipe, reader, Watcher())
    assert same(pipeline_run(pipe, kwargs), alone)


def test_a_guidance_method_runs_after_both_passes() -> None:
    pipe, kwargs = tiny_pipeline("wan")
    session = dit_attn.enable(pipe, Dual(branches=("cond",)), dit_attn.SoftPAG())
    passes: list[str] = []
    with dit_attn.observing(pipe, lambda call, request, out: passes.append(call.pass_name)):
        pipeline_run(pipe, kwargs, steps=2)
    assert list(dict.fromkeys(passes)) == ["twin", "plain", "perturbed"]
    assert session.guider is not None and session.guider.evaluations == 2


def test_no_step_cache_answers_a_twin_pass_or_is_moved_by_it() -> None:
    pipe, kwargs = tiny_pipeline("wan")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    expected = pipeline_run(pipe, kwargs)
    counts = {"plain": 0, "twin": 0}

    @dataclass(frozen=True)
    class Watcher(base.Method):
        """Counts the attention calls of the passes."""

        def twin(self, clock: Clock, branches: Sequence[str]) -> TwinPass | None:
            """At every call."""
            return TwinPass()

        def request(self, call: AttentionCall, request: Request) -> None:
            """Nothing."""
            counts[call.pass_name] += 1

    session = dit_attn.enable(pipe, Watcher())
    assert same(pipeline_run(pipe, kwargs), expected)
    assert session.twin is not None
    assert counts["twin"] == session.twin.evaluations * session.layer_count > counts["plain"]


def test_copies_run_twin_passes_of_their_own() -> None:
    model, args = tiny("wan")
    session = dit_attn.enable(model, Dual())
    expected = forward(model, args)
    twin = copy.deepcopy(model)
    assert same(forward(twin, args), expected)
    copied = attach.session_of(twin)
    assert copied is not None and copied.twin is not None and copied.twin.session is copied
    assert session.twin is not None and session.twin.evaluations == 1


def test_two_methods_with_twin_passes_are_refused() -> None:
    model, _ = tiny("wan")
    with pytest.raises(dit_attn.DitAttnError, match="both run a twin pass"):
        dit_attn.enable(model, Dual(), Dual(interval=2))
    assert attach.session_of(model) is None


def test_a_transformer_that_is_compiled_as_one_module_is_refused() -> None:
    model, args = tiny("wan")
    dit_attn.enable(model, Dual())
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(dit_attn.DitAttnError, match="compile its blocks alone"):
        forward(compiled, args)
