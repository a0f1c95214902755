"""Error control: the density that an error asks for, exact limits, runs that repeat, and what is counted."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import BlockSparse, DitAttnError, RectifiedSpaAttn, models
from dit_attn.processors.core.call import Request
from dit_attn.processors.core.clock import RunPosition
from dit_attn.processors.methods import error_control
from dit_attn.processors.methods.error_control import LayerControl, ladder_of, pick_rung
from tests._support.compose import forward, same, tiny
from tests._support.core_calls import TEXT, VISUAL, Dispatched, host_run, random_args

BLOCKS: dict[str, Any] = {"q_block": 32, "kv_block": 32, "dense_steps": 0}
CALL = {**models.call_defaults("tiny-image"), "height": 64, "width": 64, "num_inference_steps": 6}
LADDER = ladder_of(0.1)


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = models.load("tiny-image")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any, *prompts: str, **changes: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    call = {**CALL, "generator": generator, "output_type": "latent", **changes}
    out: torch.Tensor = pipe(list(prompts) or "a circle", **call).images
    return out


# -- which density ----------------------------------------------------------------------------------------------------


def test_the_ladder_rises_by_one_factor_from_the_least_density_to_1() -> None:
    assert list(LADDER) == pytest.approx([0.1, 0.1585, 0.2512, 0.3981, 0.631, 1.0], abs=1e-4)
    assert ladder_of(0.3)[0] == 0.3 and ladder_of(0.3)[-1] == 1.0
    assert ladder_of(0.9) == (0.9, 1.0) and ladder_of(1e-6)[-2] < 0.1


def test_the_lowest_rung_with_an_allowed_error_is_taken() -> None:
    errors = dict(enumerate((0.5, 0.3, 0.2, 0.1, 0.05)))
    allowed = [density**0.5 for density in LADDER]
    assert pick_rung(LADDER, 0, errors, 0.5 / allowed[0]) == 0
    assert pick_rung(LADDER, 0, errors, 0.2 / allowed[2]) == 2
    assert pick_rung(LADDER, 0, errors, 0.049 / allowed[4]) == pick_rung(LADDER, 5, errors, 0.0) == 5
    assert pick_rung(LADDER, 0, {0: float("nan"), 1: float("nan")}, 1e9) == 5


def test_a_layer_goes_back_to_a_lower_density_only_with_a_margin() -> None:
    bound = 0.2 / LADDER[2] ** 0.5
    errors = {2: 0.19, 3: 0.1}
    assert pick_rung(LADDER, 2, errors, bound) == 2  # it stays
    assert pick_rung(LADDER, 3, errors, bound) == 3  # it does not come back
    assert pick_rung(LADDER, 3, {2: 0.16, 3: 0.1}, bound) == 2
    assert pick_rung(LADDER, 3, {2: 0.01, 3: 0.01}, bound) == 2  # nothing is known of those below


def test_two_measured_rungs_say_how_fast_the_error_falls() -> None:
    odds = [1.0 / density - 1.0 for density in LADDER[:-1]]
    errors = {place: 0.1 * odds[place] ** 0.8 for place in (0, 1)}
    for rung in (2, 3, 4):
        bound = 1.001 * 0.1 * odds[rung] ** 0.8 / LADDER[rung] ** 0.5
        assert pick_rung(LADDER, 1, errors, bound) == rung
        assert pick_rung(LADDER, 1, errors, bound / 1.002) == rung + 1
    assert pick_rung(LADDER, 0, {0: 0.0}, 0.1) == 0


def test_what_is_watched_is_the_present_rung_and_the_one_below() -> None:
    watched = [LayerControl(LADDER, rung).watched for rung in range(6)]
    assert watched == [(0,), (0, 1), (1, 2), (2, 3), (3, 4), (3, 4)]


# -- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [BlockSparse, RectifiedSpaAttn])
def test_a_bound_of_0_is_stock_and_one_without_end_is_the_fixed_density(pipe: Any, cls: Any) -> None:
    dit_attn.disable(pipe)
    stock = latents(pipe)
    with dit_attn.enabled(pipe, cls(density=0.25, **BLOCKS)):
        fixed = latents(pipe)
        share = dit_attn.summary(pipe).run_density
    with dit_attn.enabled(pipe, cls(density=0.25, target_error=0.0, **BLOCKS)):
        assert torch.equal(latents(pipe), stock)
        summary = dit_attn.summary(pipe)
        assert (summary.sparse_calls, summary.run_density, summary.measuring_share) == (0, 1.0, 0.0)
        assert summary.fallbacks == {"target_error needs density 1": summary.calls}
    for bound in (1e9, float("inf")):
        with dit_attn.enabled(pipe, cls(density=0.25, target_error=bound, **BLOCKS)):
            assert torch.equal(latents(pipe), fixed)
            summary = dit_attn.summary(pipe)
            assert summary.run_density == pytest.approx(share + summary.measuring_share)
            assert 0.0 < summary.measuring_share < 0.2
    assert torch.equal(latents(pipe), stock)


def test_a_run_repeats_bit_for_bit_and_is_counted_anew(pipe: Any) -> None:
    found = []
    with dit_attn.enabled(pipe, RectifiedSpaAttn(density=0.125, target_error=0.2, **BLOCKS)):
        for _ in range(2):
            out = latents(pipe, "a circle", "two red squares")
            summary = dit_attn.summary(pipe)
            found.append((out, summary.to_dict()["reports"], summary.worst_error, summary.measuring_share))
            assert "measurements" in str(summary) and "target_error 0.2: density" in str(summary)
            assert summary.run_density == pytest.approx(
                (summary.sparse_calls * (summary.density or 0.0) + summary.calls - summary.sparse_calls) / summary.calls
                + summary.measuring_share
            )
    assert torch.equal(found[0][0], found[1][0]) and found[0][1:] == found[1][1:]
    report = found[0][1]["rectified-spaattn"]
    layers = report["layers"].values()
    assert all(layer["calls"] == 6 and layer["low"] <= layer["mean"] <= layer["high"] for layer in layers)
    assert min(layer["low"] for layer in layers) < max(layer["high"] for layer in layers)
    assert len(report["by_step"]) == 6


def test_the_first_step_keeps_the_bound_and_layers_measure_in_turns(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[tuple[int, int, tuple[int, ...]]] = []
    stock = error_control._measure

    def watch(method: Any, control: Any, rungs: Any, call: Any, request: Any) -> None:
        measured.append((call.clock.step, call.layer.index, tuple(rungs)))
        stock(method, control, rungs, call, request)

    monkeypatch.setattr(error_control, "_measure", watch)
    method = RectifiedSpaAttn(density=0.125, target_error=0.2, **BLOCKS)
    with dit_attn.enabled(pipe, method):
        latents(pipe)
    first = [item for item in measured if item[0] == 0]
    assert [index for _, index, _ in first] == list(range(6)) and {len(rungs) for *_, rungs in first} == {5}
    later = {step: [index for at, index, _ in measured if at == step] for step in range(1, 6)}
    assert later == {1: [1, 3, 5], 2: [0, 2, 4], 3: [1, 3, 5], 4: [0, 2, 4], 5: []}
    with dit_attn.enabled(pipe, method):
        latents(pipe, num_inference_steps=1)
        errors = [layer.error for layer in dit_attn.summary(pipe).layers if layer.sparse_calls]
    assert errors and max(errors) <= 0.2  # type: ignore[type-var]  # measured where sparse


def test_the_number_that_was_measured_at_a_step_counts_from_the_next_on() -> None:
    control = LayerControl(LADDER, rung=0)

    class Later:
        def read(self) -> list[float]:
            return [0.5, 0.4]

    control.rung, control.pending = 1, ((0, 1), Later())  # type: ignore[assignment]
    assert control.settle(0.4) == {0: 0.5, 1: 0.4} and control.rung > 1
    assert control.settle(0.4) == {}


def test_branches_that_come_one_by_one_have_densities_of_their_own() -> None:
    method = RectifiedSpaAttn(density=0.125, target_error=0.3, **BLOCKS)
    run, layer = host_run([method])
    args = random_args(TEXT + VISUAL)
    alike, apart = (replace(args, q=factor * args.q) for factor in (0.05, 6.0))  # flat and peaked attention
    used: dict[str, list[float]] = {"cond": [], "uncond": []}
    for step in range(4):
        for branch, args in (("uncond", alike), ("cond", apart)):
            run.clock.place(RunPosition(step, 4, (branch,)), 900.0 - step)
            run.begin_call(2)
            done = Dispatched(run, layer, args)
            layout = done.request.layout
            used[branch].append(1.0 if layout is None else layout.density)
    controls = {key[1]: state for key, state in layer.state.items() if key[0] is LayerControl}
    assert set(controls) == {("uncond", "uncond"), ("cond", "cond")}
    assert used["uncond"][0] < 0.3 < min(used["cond"])


def test_compiled_models_decide_as_eager_ones_do() -> None:
    torch._dynamo.reset()
    model, args = tiny("wan")
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    method = BlockSparse(density=0.125, target_error=0.4, **BLOCKS)
    outs, reports = [], []
    for one in (model, compiled):
        dit_attn.enable(model, method)
        outs.append([forward(one, args, timestep=torch.tensor([time, time])) for time in (900, 600, 300)])
        reports.append(dit_attn.summary(model).to_dict()["reports"])
    assert all(map(same, *outs)) and reports[0] == reports[1]
    assert reports[0]["block-sparse"]["layers"]
    torch._dynamo.reset()


# -- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings, name",
    [
        ({"selector": "measured"}, "selector measured"),
        ({"density": (0.2, 0.3)}, "densities of single heads"),
        ({"densities": (0.2, 0.3)}, "densities"),
        ({"threshold": -3.0}, "threshold"),
        ({"top_p": 0.9}, "top_p"),
    ],
)
def test_other_settings_that_decide_the_density_are_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(DitAttnError, match=f"target_error decides the density of every layer; leave out {name}"):
        BlockSparse(target_error=0.1, **settings)
    with pytest.raises(DitAttnError, match=r"target_error.*at least 0"):
        BlockSparse(target_error=-0.1)


def test_a_kernel_that_fails_on_the_sampled_rows_leaves_the_call_dense(
    pipe: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*given: Any) -> torch.Tensor:
        raise NotImplementedError("no such tile")

    stock = latents(pipe, "red")
    dit_attn.enable(pipe, BlockSparse(density=0.25, target_error=0.1, dense_steps=0))
    monkeypatch.setattr("dit_attn.processors.methods.error_control.sampled_errors", fail)
    assert torch.equal(latents(pipe, "red"), stock)
    reasons = dit_attn.summary(pipe).fallbacks
    assert list(reasons) == ["kernel failed: NotImplementedError: no such tile"], reasons
    dit_attn.disable(pipe)


def test_a_sequence_that_is_split_stays_dense_and_training_is_refused(pipe: Any) -> None:
    method = BlockSparse(density=0.25, target_error=0.2, **BLOCKS)
    run, layer = host_run([method])
    args = random_args(TEXT + VISUAL)
    with pytest.raises(DitAttnError, match="cannot be trained"):
        Dispatched(run, layer, replace(args, q=args.q.clone().requires_grad_()))
    call = Dispatched(run, layer, args).call
    assert call is not None
    method.request(replace(call, shard=(0, 2)), request := Request())
    assert request.declined == ["error control of a sequence that is split over devices"] and not request.sparse
    found = dit_attn.explain(pipe, method)
    assert found.density is None and found.fallbacks[-1] == (
        "density: decided by the data (target_error 0.2, from 25.0 % up)"
    )
