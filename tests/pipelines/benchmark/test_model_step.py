"""Timing one step of a model: kinds of steps, counts of the session, and what cannot be measured."""

from __future__ import annotations

import math
import weakref

import pytest
import torch

import dit_attn
from dit_attn.errors import DitAttnError
from dit_attn.models.architectures import architecture
from dit_attn.pipelines.benchmark import attention_call, model_step
from dit_attn.pipelines.benchmark.frozen_step import FrozenPipeline, make_competitor
from dit_attn.pipelines.benchmark.model_step import measure_step
from tests.pipelines.benchmark.conftest import CPU, sparse_method

# -- kinds of steps ------------------------------------------------------------------------------------------------


def test_a_refresh_costs_more_than_dense_and_the_step_after_it_computes_the_mask_only(wan) -> None:
    model, inputs, _ = wan
    one = make_competitor("re-ttention", [sparse_method("re-ttention", density=0.25, period=4)])
    assert [phase.name for phase in one.phases] == ["refresh", "sparse"] and not one.method.to_dict()["stagger"]
    found = measure_step(model, inputs, [one], 1, CPU)
    refresh, sparse, mean = found["rows"]
    assert refresh["density"] == pytest.approx(1.0 + sparse["density"])
    assert 0.2 < sparse["density"] < 0.4
    assert mean["density"] == pytest.approx((refresh["density"] + 3 * sparse["density"]) / 4)
    assert mean["seconds"]["median"] == pytest.approx(
        (refresh["seconds"]["median"] + 3 * sparse["seconds"]["median"]) / 4
    )
    assert mean["attention"] is None and refresh["attention"]["target"] is None
    for row in (refresh, sparse):  # the call by itself is the call of the step
        assert row["attention"]["density"] == pytest.approx(row["density"])


def test_refreshing_at_every_step_has_one_kind_of_step(wan) -> None:
    model, inputs, _ = wan
    found = measure_step(model, inputs, [make_competitor("a", [sparse_method("re-ttention", period=1)])], 1, CPU)
    assert [row["phase"] for row in found["rows"]] == ["refresh"]


# -- what is counted -------------------------------------------------------------------------------------------------


def test_rows_say_what_the_session_counted(wan) -> None:
    model, inputs, tokens = wan
    method = sparse_method("block-sparse", density=0.25, keep=(), dense_layers=(0,))
    found = measure_step(model, inputs, [make_competitor("bs", [method])], 2, CPU)
    (row,) = found["rows"]
    frozen = FrozenPipeline(model, inputs, CPU)
    with torch.no_grad(), dit_attn.enabled(frozen, method):
        frozen.set_step(row["step"])
        frozen.run_step()
        summary = dit_attn.summary(frozen)
    assert (row["calls"], row["sparse_calls"]) == (summary.calls, summary.sparse_calls) == (3, 2)
    assert row["density"] == pytest.approx(summary.density)
    assert row["step_density"] == pytest.approx(summary.run_density)
    assert row["fallbacks"] == {"dense layer": 1}
    assert found["attention"]["shape"] == [1, tokens, 1, 128] and found["dense"]["attention_calls"] == 3
    assert 0.0 < found["dense"]["attention_share"] <= 1.0
    assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]


def test_a_layer_the_method_keeps_dense_is_not_the_one_that_is_timed(wan) -> None:
    model, inputs, _ = wan
    method = sparse_method("block-sparse", density=0.25, dense_layers=(1,))  # the middle one of three
    found = measure_step(model, inputs, [make_competitor("bs", [method])], 1, CPU)
    assert found["rows"][0]["attention"]["density"] < 0.5


@pytest.mark.parametrize("name", ["hunyuan-video", "cogvideox-5b", "flux", "pixart-sigma"])
def test_every_family_is_measured_with_its_text_and_masks(name) -> None:
    row = architecture(name).sized(2, 1).with_tokens(512)
    model = row.build(CPU, torch.float32)
    found = measure_step(
        model,
        row.call(CPU, torch.float32),
        [make_competitor("bs", [sparse_method("block-sparse", density=0.25)])],
        1,
        CPU,
    )
    joint = row.text if name != "pixart-sigma" else 0
    assert found["attention"]["shape"] == [1, math.prod(row.grid) + joint, 1, row.head_dim]
    assert found["attention"]["calls_of_a_step"] == 2
    assert found["attention"]["sparse_kernel"] == "gather"
    assert found["rows"][0]["sparse_calls"] == 2 and found["rows"][0]["density"] < 0.9


def test_the_call_that_was_timed_by_itself_takes_no_memory_from_the_steps(wan, monkeypatch) -> None:
    model, inputs, _ = wan
    seen = []
    describe, steps = model_step.describe_call, model_step.time_steps

    def described(call, count):
        seen.append(weakref.ref(call.q))
        return describe(call, count)

    def time_steps(*args):
        assert seen[0]() is None
        return steps(*args)

    monkeypatch.setattr(model_step, "describe_call", described)
    monkeypatch.setattr(model_step, "time_steps", time_steps)
    measure_step(model, inputs, [make_competitor("bs", [sparse_method("block-sparse")])], 1, CPU)
    assert len(seen) == 1


def test_the_model_is_stock_again_afterwards(wan) -> None:
    model, inputs, _ = wan
    kinds = [type(module.processor) for module in model.modules() if hasattr(module, "processor")]
    measure_step(model, inputs, [make_competitor("bs", [sparse_method("block-sparse")])], 1, CPU)
    assert [type(module.processor) for module in model.modules() if hasattr(module, "processor")] == kinds
    assert not model._forward_pre_hooks


def test_only_methods_that_let_data_decide_depend_on_the_weights(wan) -> None:
    model, inputs, _ = wan
    ones = [
        make_competitor("by density", [sparse_method("rectified-spaattn", density=0.25)]),
        make_competitor("by mass", [sparse_method("rectified-spaattn", top_p=0.9)]),
    ]
    found = measure_step(model, inputs, ones, 1, CPU)
    assert [row["depends_on_weights"] for row in found["rows"]] == [False, True]


# -- what cannot be measured -----------------------------------------------------------------------------------------


def test_a_sequence_too_short_for_any_method_is_refused_with_the_reason() -> None:
    row = architecture("wan2.1-1.3b").sized(1, 1).with_tokens(84)
    model = row.build(CPU, torch.float32)
    with pytest.raises(DitAttnError, match="no attention call that a method can take: sequence under 256 tokens"):
        measure_step(
            model, row.call(CPU, torch.float32), [make_competitor("bs", [sparse_method("block-sparse")])], 1, CPU
        )


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory.\nmore"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["accelerator", "cpu"],
)
def test_too_little_memory_during_a_step_is_one_line(wan, monkeypatch, error) -> None:
    model, inputs, _ = wan

    def fail(self: FrozenPipeline) -> None:
        raise error

    monkeypatch.setattr(FrozenPipeline, "run_step", fail)
    with pytest.raises(DitAttnError, match=r"too little memory for a step .*memory") as caught:
        measure_step(model, inputs, [], 1, CPU)
    assert "\n" not in str(caught.value)


def test_a_kernel_that_fails_is_named_and_other_errors_are_not_hidden(wan, monkeypatch) -> None:
    model, inputs, _ = wan
    ones = [make_competitor("mine", [sparse_method("block-sparse")])]

    def fail(*args, **kwargs):
        raise NotImplementedError("no such tile")

    with monkeypatch.context() as patch:
        patch.setattr(attention_call.executor, "run", fail)
        with pytest.raises(DitAttnError, match="--method mine cannot run here: kernel failed: no such tile"):
            measure_step(model, inputs, ones, 1, CPU)
    with pytest.raises(RuntimeError, match="shape"):
        measure_step(model, {**inputs, "encoder_hidden_states": torch.zeros(1, 4, 7)}, ones, 1, CPU)
