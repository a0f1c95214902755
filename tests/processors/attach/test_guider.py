"""Guidance of a run whose predictions are known: what the scheduler gets, how often the model runs, how far it goes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dit_attn
from dit_attn.pipelines.compare.match_strength import match_guidance_scale
from dit_attn.processors.attach import attach
from dit_attn.processors.methods.perturbed_guidance import SCHEDULES
from tests._support import fake_pipeline
from tests._support.fake_pipeline import STEPS, C, P, U, expected, fake

# -- what the scheduler gets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batched", [False, True], ids=["second call", "one call"])
@pytest.mark.parametrize("way", ["shift", "cond", "step"])
@pytest.mark.parametrize("scale", [1.0, 1.5, 7.0])
@pytest.mark.parametrize("style", ["separate", "batched"])
def test_the_scheduler_gets_the_formula(
    monkeypatch: pytest.MonkeyPatch, style: str, scale: float, way: str, batched: bool
) -> None:
    pipe = fake(monkeypatch, dit_attn.SoftPAG(heads="1", scale=2.0, inject=way, batched=batched), style, scale)
    for _ in range(2):
        for got in pipe():
            torch.testing.assert_close(got, expected(style, scale) + 2.0 * (C - P), atol=2e-5, rtol=1e-5)
    assert "step" not in vars(pipe.scheduler)


def test_a_scale_that_changes_and_three_branches_need_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = fake(monkeypatch, dit_attn.SoftPAG(heads="1", scale=2.0), "batched", lambda step: 2.0 + step)
    for step, got in enumerate(pipe()):
        torch.testing.assert_close(got, expected("batched", 2.0 + step) + 2.0 * (C - P), atol=5e-5, rtol=1e-5)
    pipe = fake(monkeypatch, dit_attn.SoftPAG(heads="1", scale=2.0), "three-way", 2.5)
    for got in pipe():
        torch.testing.assert_close(got, expected("three-way", 2.5) + 2.0 * (C - P), atol=2e-5, rtol=1e-5)
    assert set(pipe.transformer.asked) == {("cond", "uncond", "image"), ("perturbed",)}


def test_dividing_by_a_scale_nobody_tells_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = fake(monkeypatch, dit_attn.SoftPAG(heads="1", inject="cond"), "batched", lambda step: 2.0)
    with pytest.raises(dit_attn.DitAttnError, match="does not say its guidance scale"):
        pipe()


@settings(max_examples=30, deadline=None)
@given(w=st.floats(0.0, 20.0), scale=st.floats(1.01, 12.0), style=st.sampled_from(["separate", "batched"]))
def test_the_push_is_linear_in_the_scale_and_blind_to_that_of_cfg(w: float, scale: float, style: str) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        got = fake(monkeypatch, dit_attn.SoftPAG(heads="1", scale=w), style, scale)()[0]
    torch.testing.assert_close(got - expected(style, scale), w * (C - P), atol=2e-3, rtol=1e-3)


# -- when and how often the model runs --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "nothing", [{"scale": 0.0}, {"u": 0.0}, {"start": 0.99}, {"heads": "1:0@0"}], ids=lambda n: next(iter(n))
)
def test_without_a_push_nothing_is_called_more_often_and_no_bit_changes(
    monkeypatch: pytest.MonkeyPatch, nothing: dict[str, Any]
) -> None:
    for style, calls in (("separate", 2 * STEPS), ("batched", STEPS)):
        pipe = fake(monkeypatch, dit_attn.SoftPAG(**{"heads": "1", **nothing}), style, 3.0)
        for got in pipe():
            assert torch.equal(got, U + 3.0 * (C - U))
        assert len(pipe.transformer.asked) == calls


@pytest.mark.parametrize(
    ("style", "scale", "batched", "calls"),
    [
        ("separate", 1.0, False, [("cond",), ("perturbed",)]),
        ("separate", 3.0, False, [("cond",), ("perturbed",), ("uncond",)]),
        ("batched", 3.0, False, [("uncond", "cond"), ("perturbed",)]),
        ("separate", 1.0, True, [("cond", "perturbed")]),
        ("separate", 3.0, True, [("cond", "perturbed"), ("uncond",)]),
        ("batched", 3.0, True, [("uncond", "cond", "perturbed")]),
    ],
)
def test_calls_of_a_step(
    monkeypatch: pytest.MonkeyPatch, style: str, scale: float, batched: bool, calls: list[tuple[str, ...]]
) -> None:
    pipe = fake(monkeypatch, dit_attn.SoftPAG(heads="1", batched=batched), style, scale)
    pipe()
    assert pipe.transformer.asked == calls * STEPS
    guidance = dit_attn.summary(pipe).guidance
    assert guidance is not None and guidance.evaluations == guidance.steps == STEPS


@pytest.mark.parametrize("schedule", sorted(SCHEDULES))
@pytest.mark.parametrize(("start", "stop"), [(0.0, 1.0), (0.25, 0.75), (0.5, 1.0), (0.01, 0.2)])
@pytest.mark.parametrize("interval", [1, 3])
def test_window_interval_and_schedule(
    monkeypatch: pytest.MonkeyPatch, start: float, stop: float, interval: int, schedule: str
) -> None:
    method = dit_attn.SoftPAG(heads="1", scale=2.0, start=start, stop=stop, interval=interval, schedule=schedule)
    pipe = fake(monkeypatch, method, "separate", 3.0)
    guided = [step for step in range(STEPS) if start <= step / STEPS < stop]
    for step, got in enumerate(pipe()):
        falls = SCHEDULES[schedule]((step / STEPS - start) / (stop - start)) if step in guided else 0.0
        torch.testing.assert_close(got, U + 3.0 * (C - U) + 2.0 * falls * (C - P), atol=2e-5, rtol=1e-5)
    evaluated = pipe.transformer.asked.count(("perturbed",))
    assert evaluated == len(guided[::interval])
    guidance = dit_attn.summary(pipe).guidance
    assert guidance is not None and (guidance.evaluations, guidance.steps) == (evaluated, len(guided))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_type_of_the_prediction_stays(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    for way in ("shift", "step"):
        pipe = fake(monkeypatch, dit_attn.SoftPAG(heads="1", inject=way), "separate", 3.0, dtype=dtype)
        got = pipe()[0]
        assert got.dtype == dtype
        if dtype == torch.float64:  # nothing passes through float32
            exact = (x.double() for x in (C, U, P))
            c, u, p = exact
            torch.testing.assert_close(got, u + 3.0 * (c - u) + 3.0 * (c - p), atol=1e-13, rtol=1e-13)


# -- how strong it is -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", ["separate", "batched"])
@pytest.mark.parametrize("way", ["shift", "cond", "step"])
def test_the_meter_splits_the_push_along_and_across_that_of_cfg(
    monkeypatch: pytest.MonkeyPatch, style: str, way: str
) -> None:
    pipe = fake(monkeypatch, dit_attn.SoftPAG(heads="1", scale=2.0, inject=way), style, 3.0)
    pipe()
    push, direction = 2.0 * (C - P).flatten(), (C - U).flatten()
    along = float(push @ direction / direction.square().sum())
    rest = float((push - along * direction).norm() / direction.norm())
    found = dit_attn.summary(pipe).guidance
    assert found is not None
    assert found.parallel == pytest.approx(along, rel=1e-4)
    assert found.orthogonal == pytest.approx(rest, rel=1e-4)
    assert found.relative == pytest.approx(float(push.norm() / C.norm()), rel=1e-4)
    assert f"guidance scale {along:+.2f}" in str(dit_attn.summary(pipe))


def test_the_meter_needs_an_unconditional_branch(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = fake(monkeypatch, dit_attn.SoftPAG(heads="1"), "separate", 1.0)
    pipe()
    found = dit_attn.summary(pipe).guidance
    assert found is not None and found.parallel is None and found.relative is not None
    assert "no unconditional branch to compare with" in str(found)


def test_a_push_along_cfg_is_matched_by_the_scale_that_makes_the_same_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_pipeline, "P", C - 0.4 * (C - U))  # so that w (c - p) = 0.4 w (c - u)
    method = dit_attn.SoftPAG(heads="1", scale=2.0)
    pipe = fake(monkeypatch, method, "separate", 3.0)
    guided = pipe()[0]
    found = match_guidance_scale(pipe, [method], lambda changes, index: pipe(**changes) and None, [3.0, 3.0])
    assert found.argument == "guidance_scale" and found.scale == pytest.approx(3.8, abs=1e-3)
    assert found.orthogonal < 1e-3
    dit_attn.enable(pipe)
    torch.testing.assert_close(pipe(guidance_scale=found.scale)[0], guided, atol=5e-3, rtol=1e-3)


def test_no_push_at_all_is_matched_by_the_run_s_own_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    method = dit_attn.SoftPAG(heads="1", scale=0.0)
    pipe = fake(monkeypatch, method, "separate", 3.0)
    found = match_guidance_scale(pipe, [method], lambda changes, index: pipe(**changes) and None, [3.0])
    assert (found.scale, found.parallel, found.orthogonal) == (3.0, 0.0, 0.0)


def test_a_push_of_a_quarter_of_the_steps_is_matched_by_a_quarter_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fake_pipeline, "P", C - 0.4 * (C - U))
    method = dit_attn.SoftPAG(heads="1", scale=2.0, start=0.5, stop=0.75)
    pipe = fake(monkeypatch, method, "separate", 3.0)
    found = match_guidance_scale(pipe, [method], lambda changes, index: pipe(**changes) and None, [3.0])
    assert found.parallel == pytest.approx(0.2, abs=1e-3) and found.scale == pytest.approx(3.2, abs=1e-3)


# -- parts ------------------------------------------------------------------------------------------------------------


def test_a_pipeline_that_perturbs_a_branch_of_its_own_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: Any = fake(monkeypatch, dit_attn.SoftPAG(heads="1"), "separate", 3.0)
    pipe.do_perturbed_attention_guidance = True
    with pytest.raises(dit_attn.DitAttnError, match="FakePipe runs a perturbed branch of its own; call it with"):
        pipe()


def test_an_update_at_the_step_needs_a_pipeline_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = fake(monkeypatch, dit_attn.SoftPAG(heads="1"), "separate", 3.0)
    dit_attn.enable(pipe.transformer, dit_attn.SoftPAG(heads="1", scale=2.0, inject="step"))
    for got in pipe():  # found although the method was enabled on the transformer
        torch.testing.assert_close(got, expected("separate", 3.0) + 2.0 * (C - P), atol=2e-5, rtol=1e-5)
    with pytest.raises(dit_attn.DitAttnError, match="in a loop use inject='shift'"):
        pipe._predict(pipe.scheduler.timesteps[0], 3.0)


@pytest.mark.parametrize(
    ("guided_by", "added_at"),
    [(None, "shift"), ("ClassifierFreeGuidance", "shift"), ("AdaptiveProjectedGuidance", "step")],
)
def test_the_update_is_added_behind_rules_of_guidance_that_are_not_affine(
    monkeypatch: pytest.MonkeyPatch, guided_by: str | None, added_at: str
) -> None:
    pipe: Any = fake(monkeypatch, dit_attn.SoftPAG(heads="1"), "separate", 3.0)
    pipe.guider = None if guided_by is None else type(guided_by, (), {})()
    (predicted,) = pipe(predict=0)
    shifted = not torch.allclose(predicted, expected("separate", 3.0), atol=1e-4)
    assert shifted == (added_at == "shift")
    assert (type(vars(pipe.scheduler).get("step")).__name__ == "StepHook") == (added_at == "step")


def test_a_new_run_forgets_the_update_of_one_that_was_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe: Any = fake(monkeypatch, dit_attn.SoftPAG(heads="1", inject="step", start=0.5), "separate", 3.0)
    later = pipe()
    pipe(predict=0)
    half = len(pipe.scheduler.timesteps) // 2
    pipe.scheduler.step_index = half
    pipe(predict=half)  # and no step follows
    assert type(vars(pipe.scheduler)["step"]).__name__ == "StepHook"
    again = pipe()
    assert all(torch.equal(a, b) for a, b in zip(again, later, strict=True)) and "step" not in vars(pipe.scheduler)


def test_copies_of_a_guider_share_the_plan_and_nothing_of_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = fake(monkeypatch, dit_attn.SoftPAG(heads="1"), "separate", 3.0)
    pipe()
    session = attach.session_of(pipe.transformer)
    assert session is not None and session.guider is not None
    copied = session.guider.copy_for(session)
    assert copied.plan is session.guider.plan and copied.blocks == ["blocks.0", "blocks.1"]
    assert (copied.evaluations, copied.update, copied.handle, copied.strength.steps) == (0, None, None, 0)
    assert session.guider.evaluations == STEPS and session.guider.update is not None
