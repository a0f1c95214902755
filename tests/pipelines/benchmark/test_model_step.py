"""One step of a model, dense beside methods: the step is a sparse one, the counts are the session's, ratios add up."""

from __future__ import annotations

import gc
import math
import weakref
from typing import Any, cast

import pytest
import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

import dit_attn
from dit_attn.errors import DitAttnError
from dit_attn.models.architectures import architecture
from dit_attn.pipelines.benchmark import attention_call, model_step, peak_memory
from dit_attn.pipelines.benchmark.attention_call import dense_order, fastest_dense
from dit_attn.pipelines.benchmark.frozen_step import STEPS, HeldPipeline, watched
from dit_attn.pipelines.benchmark.model_step import competitor, measure
from dit_attn.pipelines.benchmark.step_table import Part, Step, Times, attention_row, dense_row, step_row
from dit_attn.processors.methods.base import Method
from dit_attn.processors.methods.sparse import SparseMethod

CPU = torch.device("cpu")


def reader(slug: str, **settings) -> SparseMethod:
    found = Method.from_dict({"method": slug, "q_block": 32, "kv_block": 32, **settings})
    assert isinstance(found, SparseMethod)
    return found


@pytest.fixture(scope="module")
def wan():
    row = architecture("wan2.1-1.3b").sized(3, 1).with_tokens(512)
    return row.build(CPU, torch.float32), row.call(CPU, torch.float32), math.prod(row.grid)


# -- which step is timed ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [0.0, 0.3, 40, 0.98])
@pytest.mark.parametrize("slug", ["block-sparse", "rectified-spaattn", "re-ttention"])
def test_the_clock_is_held_at_a_step_the_method_runs(wan, slug, first) -> None:
    model, inputs, _ = wan
    if slug == "re-ttention" and first == 0.98:
        first = 0.96  # it needs two steps
    one = competitor(slug, [reader(slug, density=0.25, dense_steps=first)])
    held = HeldPipeline(model, inputs, CPU)
    with torch.no_grad(), dit_attn.enabled(held, one.method) as session:
        for phase in one.phases:
            held.hold(phase.step)
            before = dit_attn.summary(held).sparse_calls
            held.step()
            assert dit_attn.summary(held).sparse_calls == before + 3 and not dit_attn.summary(held).fallbacks
            assert (session.clock.step, session.clock.total) == (phase.step, STEPS)


def test_a_refresh_costs_more_than_dense_and_the_step_after_it_reads_the_mask_only(wan) -> None:
    model, inputs, _ = wan
    one = competitor("re-ttention", [reader("re-ttention", density=0.25, period=4)])
    assert [phase.name for phase in one.phases] == ["refresh", "sparse"] and not one.method.to_dict()["stagger"]
    found = measure(model, inputs, [one], 1, CPU)
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
    found = measure(model, inputs, [competitor("a", [reader("re-ttention", period=1)])], 1, CPU)
    assert [row["phase"] for row in found["rows"]] == ["refresh"]


# -- what is counted -------------------------------------------------------------------------------------------------


def test_rows_say_what_the_session_counted(wan) -> None:
    model, inputs, tokens = wan
    method = reader("block-sparse", density=0.25, keep=(), dense_layers=(0,))
    found = measure(model, inputs, [competitor("bs", [method])], 2, CPU)
    (row,) = found["rows"]
    held = HeldPipeline(model, inputs, CPU)
    with torch.no_grad(), dit_attn.enabled(held, method):
        held.hold(row["step"])
        held.step()
        summary = dit_attn.summary(held)
    assert (row["calls"], row["sparse_calls"]) == (summary.calls, summary.sparse_calls) == (3, 2)
    assert row["density"] == pytest.approx(summary.density)
    assert row["step_density"] == pytest.approx(summary.run_density)
    assert row["fallbacks"] == {"dense layer": 1}
    assert found["attention"]["shape"] == [1, tokens, 1, 128] and found["dense"]["attention_calls"] == 3
    assert 0.0 < found["dense"]["attention_share"] <= 1.0
    assert row["ratio"]["min"] <= row["ratio"]["median"] <= row["ratio"]["max"]


def test_a_layer_the_method_keeps_dense_is_not_the_one_that_is_timed(wan) -> None:
    model, inputs, _ = wan
    method = reader("block-sparse", density=0.25, dense_layers=(1,))  # the middle one of three
    found = measure(model, inputs, [competitor("bs", [method])], 1, CPU)
    assert found["rows"][0]["attention"]["density"] < 0.5


@pytest.mark.parametrize("name", ["hunyuan-video", "cogvideox-5b", "flux", "pixart-sigma"])
def test_every_family_is_measured_with_its_text_and_masks(name) -> None:
    row = architecture(name).sized(2, 1).with_tokens(512)
    model = row.build(CPU, torch.float32)
    found = measure(
        model, row.call(CPU, torch.float32), [competitor("bs", [reader("block-sparse", density=0.25)])], 1, CPU
    )
    joint = row.text if name != "pixart-sigma" else 0
    assert found["attention"]["shape"] == [1, math.prod(row.grid) + joint, 1, row.head_dim]
    assert found["attention"]["calls_of_a_step"] == 2
    assert found["rows"][0]["sparse_calls"] == 2 and found["rows"][0]["density"] < 0.9


def test_the_call_that_was_timed_by_itself_takes_no_memory_from_the_steps(wan, monkeypatch) -> None:
    model, inputs, _ = wan
    seen = []
    describe, steps = model_step.described, model_step.step_times

    def described(call, count):
        seen.append(weakref.ref(call.q))
        return describe(call, count)

    def step_times(*args):
        assert seen[0]() is None
        return steps(*args)

    monkeypatch.setattr(model_step, "described", described)
    monkeypatch.setattr(model_step, "step_times", step_times)
    measure(model, inputs, [competitor("bs", [reader("block-sparse")])], 1, CPU)
    assert len(seen) == 1


def test_dense_kernels_are_tried_in_the_order_given() -> None:
    x = torch.randn(1, 1, 8, 8)
    with fastest_dense(["flash", "efficient"]):
        assert _cur_sdpa_kernel_backends(with_priority=True)[:2] == [
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
        ]
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
    before = _cur_sdpa_kernel_backends(with_priority=True)
    with fastest_dense([]):
        assert _cur_sdpa_kernel_backends(with_priority=True) == before
    assert dense_order(cast(Any, None), CPU) == []


def test_the_model_is_stock_again_afterwards(wan) -> None:
    model, inputs, _ = wan
    kinds = [type(module.processor) for module in model.modules() if hasattr(module, "processor")]
    measure(model, inputs, [competitor("bs", [reader("block-sparse")])], 1, CPU)
    assert [type(module.processor) for module in model.modules() if hasattr(module, "processor")] == kinds
    assert not model._forward_pre_hooks


def test_only_methods_that_let_data_decide_depend_on_the_weights(wan) -> None:
    model, inputs, _ = wan
    ones = [
        competitor("by density", [reader("rectified-spaattn", density=0.25)]),
        competitor("by mass", [reader("rectified-spaattn", top_p=0.9)]),
    ]
    found = measure(model, inputs, ones, 1, CPU)
    assert [row["depends_on_weights"] for row in found["rows"]] == [False, True]


# -- what cannot be measured -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("methods", "parts"),
    [
        ([], ("nothing", "one method")),
        ([reader("block-sparse"), reader("re-ttention")], ("block-sparse + re-ttention",)),
        ([reader("block-sparse", density=1.0)], ("keeps everything", "density")),
        ([reader("block-sparse", dense_steps=1.0)], ("no sparse step", "dense_steps")),
        ([reader("re-ttention", dense_steps=49)], ("no sparse step", "dense_steps")),
    ],
)
def test_a_method_without_a_sparse_step_is_refused(methods, parts) -> None:
    with pytest.raises(DitAttnError) as caught:
        competitor("mine", methods)
    assert all(part in str(caught.value) for part in ("--method mine", *parts))


def test_a_sequence_too_short_for_any_method_is_refused_with_the_reason() -> None:
    row = architecture("wan2.1-1.3b").sized(1, 1).with_tokens(84)
    model = row.build(CPU, torch.float32)
    with pytest.raises(DitAttnError, match="no attention call that a method can take: sequence under 256 tokens"):
        measure(model, row.call(CPU, torch.float32), [competitor("bs", [reader("block-sparse")])], 1, CPU)


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory.\nmore"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
    ids=["accelerator", "cpu"],
)
def test_too_little_memory_during_a_step_is_one_line(wan, monkeypatch, error) -> None:
    model, inputs, _ = wan

    def fail(self: HeldPipeline) -> None:
        raise error

    monkeypatch.setattr(HeldPipeline, "step", fail)
    with pytest.raises(DitAttnError, match=r"too little memory for a step .*memory") as caught:
        measure(model, inputs, [], 1, CPU)
    assert "\n" not in str(caught.value)


def test_a_kernel_that_fails_is_named_and_other_errors_are_not_hidden(wan, monkeypatch) -> None:
    model, inputs, _ = wan
    ones = [competitor("mine", [reader("block-sparse")])]

    def fail(*args, **kwargs):
        raise NotImplementedError("no such tile")

    with monkeypatch.context() as patch:
        patch.setattr(attention_call.executor, "run", fail)
        with pytest.raises(DitAttnError, match="--method mine cannot run here: kernel failed: no such tile"):
            measure(model, inputs, ones, 1, CPU)
    with pytest.raises(RuntimeError, match="shape"):
        measure(model, {**inputs, "encoder_hidden_states": torch.zeros(1, 4, 7)}, ones, 1, CPU)


# -- figures ---------------------------------------------------------------------------------------------------------


def test_ratios_are_taken_within_rounds() -> None:
    dense = Step(Times([1.0, 10.0, 100.0], [1.0, 1.0, 1.0]))
    mine = Step(Times([0.5, 5.0, 60.0], [0.25, 0.25, 0.25]), calls=4, sparse_calls=2, kept=0.5)
    row = step_row(mine, dense, attention_share=0.8)
    assert row["ratio"] == {"median": 0.5, "min": 0.5, "max": 0.6} and row["speedup"] == 2.0
    assert row["speedup_cpu"] == 4.0
    assert row["density"] == 0.25 and row["step_density"] == (0.5 + 2) / 4
    assert row["ceiling"] == pytest.approx(1 / (0.2 + 0.8 * 0.625))


@pytest.mark.parametrize(("run", "met"), [(0.39, True), (0.45, False)])
def test_the_target_is_six_tenths_of_one_over_density_with_choosing_counted(run, met) -> None:
    part = Part(Times([0.02], [0.02]), Times([run], [run]), share=0.25)
    row = attention_row(part, Part(run=Times([1.0], [1.0])), sparse=True)
    assert row["target"] == pytest.approx(2.4) and row["met"] is met and row["met_cpu"] is met
    assert row["speedup"] == pytest.approx(1 / (run + 0.02)) and row["plan_share"] == pytest.approx(0.02 / (run + 0.02))
    assert row["efficiency"] == pytest.approx(row["speedup"] * 0.25)


def test_processor_time_has_no_figures_where_an_accelerator_works() -> None:
    dense, mine = Step(Times([1.0], [0.0])), Step(Times([0.5], [0.0]), calls=1, sparse_calls=1, kept=0.5)
    row = step_row(mine, dense, 0.5)
    assert row["speedup"] == 2.0 and (row["speedup_cpu"], row["ratio_cpu"], row["cpu_seconds"]) == (None, None, None)
    part = attention_row(Part(Times([0.1], [0.0]), Times([0.4], [0.0]), 0.5), Part(run=Times([1.0], [0.0])), True)
    assert part["met"] is True and (part["speedup_cpu"], part["met_cpu"]) == (None, None)
    assert dense_row(dense, Part(run=Times([0.25], [0.0])), 2)["attention_share"] == 0.5


def test_the_peak_is_that_of_the_work_since_the_reset() -> None:
    if peak_memory.read(CPU) is None:
        pytest.skip("this machine does not tell the peak of a process")
    torch.ones(64, 2**20).sum()
    gc.collect()  # what earlier tests left behind must not be freed between the two readings
    peak_memory.reset(CPU)
    before = peak_memory.read(CPU)
    block = torch.ones(96, 2**20)
    after = peak_memory.read(CPU)
    assert before is not None and after is not None and after - before > 0.9 * block.nbytes
    del block
    assert "process" in peak_memory.label(CPU)


def test_a_watched_call_counts_its_own_work() -> None:
    wall, cpu = watched(lambda: sum(range(2_000_000)), CPU)
    assert wall > 0.0 and cpu > 0.0
