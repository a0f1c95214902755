"""Guidance of a run whose predictions are known: what the scheduler gets, how often the model runs, how far it goes."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import dit_attn
from dit_attn.pipelines.compare.match_strength import match_guidance_scale
from dit_attn.processors.attach import attach, guider
from dit_attn.processors.core import cfg
from dit_attn.processors.methods.base import Method
from dit_attn.processors.methods.perturbed_guidance import SCHEDULES
from tests._support.pipeline_runs import hooks
from tests.families.test_wan import TestWan as WanCase

C, U, P = (torch.randn(1, 4, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3))
STEPS = 8


class FakeTransformer(torch.nn.Module):
    """Predicts C, U or P, whatever it is given; P where its one attention layer runs perturbed."""

    config = SimpleNamespace(in_channels=4)

    def __init__(self) -> None:
        super().__init__()
        self.blocks = torch.nn.ModuleList([torch.nn.Module() for _ in range(2)])
        for block in self.blocks:
            block.attn1 = torch.nn.Module()
            block.attn1.heads = 4
        self.asked: list[tuple[str, ...]] = []

    def forward(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, encoder_hidden_states: torch.Tensor | None = None
    ) -> tuple[torch.Tensor]:
        session = attach.session_of(self)
        assert session is not None
        names = session.rows_by_branch()
        self.asked.append(names)
        known = {"cond": C, "uncond": U, "perturbed": P, "image": 0.5 * U + 0.25 * C}
        return (torch.cat([known[name] for name in names]).to(hidden_states.dtype),)


class FakeScheduler:
    """Remembers the predictions it is handed."""

    def __init__(self) -> None:
        self.timesteps = torch.linspace(900.0, 100.0, STEPS)
        self.got: list[torch.Tensor] = []
        self.step_index: int | None = None

    def begin(self) -> None:
        self.timesteps, self.got, self.step_index = self.timesteps.clone(), [], 0

    def step(self, model_output: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
        self.got.append(model_output)
        assert self.step_index is not None
        self.step_index += 1
        return model_output


class FakePipe:
    """Runs classifier-free guidance the way a style says, at ``_guidance_scale``."""

    def __init__(self, style: str, scale: Any, dtype: torch.dtype = torch.float32) -> None:
        self.style, self.scale, self.dtype = style, scale, dtype
        self._guidance_scale = scale if isinstance(scale, float) else None
        self.scheduler, self.transformer = FakeScheduler(), FakeTransformer()
        self.guides = self.scale != 1.0

    @property
    def do_classifier_free_guidance(self) -> bool:
        return self.guides

    def __call__(self, guidance_scale: float | None = None) -> list[torch.Tensor]:
        if guidance_scale is not None:
            self.scale = self._guidance_scale = guidance_scale
            self.guides = guidance_scale != 1.0
        self.scheduler.begin()
        for index, timestep in enumerate(self.scheduler.timesteps):
            scale = self.scale(index) if callable(self.scale) else self.scale
            prediction = self._predict(timestep, scale)
            self.scheduler.step(prediction)
        return self.scheduler.got

    def _predict(self, timestep: torch.Tensor, scale: Any) -> torch.Tensor:
        x = torch.zeros(1, 4, 3, dtype=self.dtype)
        if not self.guides:
            return self.transformer(x, timestep.expand(1))[0]
        if self.style == "separate":
            cond = self.transformer(x, timestep.expand(1))[0]
            uncond = self.transformer(x, timestep.expand(1))[0]
        elif self.style == "three-way":
            out = self.transformer(x.expand(3, -1, -1), timestep.expand(3))[0]
            cond, uncond, image = out.chunk(3)
            return uncond + 1.6 * (image - uncond) + scale * (cond - image)
        else:
            uncond, cond = self.transformer(x.expand(2, -1, -1), timestep.expand(2))[0].chunk(2)
        return uncond + scale * (cond - uncond)


STYLES = {
    "separate": cfg.SEPARATE,
    "batched": cfg.BATCHED,
    "three-way": cfg.CFGRule("batched", ("cond", "uncond"), ("cond", "uncond", "image")),
}


def fake(monkeypatch: pytest.MonkeyPatch, method: Method, style: str, scale: Any, **more: Any) -> FakePipe:
    """A fake pipeline with a method on it; its family row is made up, all else is the real machinery."""
    pipe = FakePipe(style, scale, **more)
    row = dataclasses.replace(attach.family_of(WanCase().model()), cfg=STYLES[style])
    monkeypatch.setattr(attach, "family_of", lambda model: row)
    monkeypatch.setattr(attach, "eligible_layers", lambda *_: ["blocks.0.attn1", "blocks.1.attn1"])
    monkeypatch.setattr(attach, "tap_of", lambda *_: "torch")
    monkeypatch.setattr(attach, "session_processors", lambda *_: {})
    monkeypatch.setattr(attach, "rewrap", lambda *_: None)
    for block in pipe.transformer.blocks:
        block.attn1.processor = None
    dit_attn.enable(pipe, method)
    return pipe


def expected(style: str, scale: float) -> torch.Tensor:
    if scale == 1.0:
        return C
    if style == "three-way":
        image = 0.5 * U + 0.25 * C
        return U + 1.6 * (image - U) + scale * (C - image)
    return U + scale * (C - U)


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
    monkeypatch.setitem(globals(), "P", C - 0.4 * (C - U))  # so that w (c - p) = 0.4 w (c - u)
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


@pytest.mark.parametrize(
    ("rule", "told", "scale"),
    [
        (cfg.SEPARATE, 1.0, 1.0), (cfg.SEPARATE, 3.0, 3.0),
        (cfg.CFGRule("batched", ("cond", "uncond"), scale_offset=1.0, off=0.0), 0.0, 1.0),  # Z-Image
        (cfg.CFGRule("batched", ("cond", "uncond"), scale_offset=1.0, off=0.0), 0.5, 1.5),
        (cfg.CFGRule("separate", ("cond", "uncond"), scale_offset=1.0), 1.0, 1.0),  # Cosmos
        (cfg.CFGRule("separate", ("cond", "uncond"), scale_offset=1.0), 2.0, 3.0),
    ],
)  # fmt: skip
def test_scales_of_pipelines_that_add_one(rule: cfg.CFGRule, told: float, scale: float) -> None:
    assert rule.scale_of(told) == scale and rule.argument_for(scale) == told
    assert rule.scale_of(rule.barely) == pytest.approx(rule.off + rule.scale_offset, abs=1e-3)


def test_a_scale_a_pipeline_cannot_guide_with_becomes_the_nearest_one() -> None:
    cosmos = cfg.CFGRule("separate", ("cond", "uncond"), scale_offset=1.0)
    assert cosmos.argument_for(1.2) == 1.0 and cosmos.argument_for(1.8) == cosmos.barely


def test_a_push_of_a_quarter_of_the_steps_is_matched_by_a_quarter_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "P", C - 0.4 * (C - U))
    method = dit_attn.SoftPAG(heads="1", scale=2.0, start=0.5, stop=0.75)
    pipe = fake(monkeypatch, method, "separate", 3.0)
    found = match_guidance_scale(pipe, [method], lambda changes, index: pipe(**changes) and None, [3.0])
    assert found.parallel == pytest.approx(0.2, abs=1e-3) and found.scale == pytest.approx(3.2, abs=1e-3)


def test_a_learned_variance_does_not_count() -> None:
    torch.manual_seed(0)
    guide = SimpleNamespace(session=SimpleNamespace(model=SimpleNamespace(config=SimpleNamespace(in_channels=4))))
    x = torch.randn(2, 8, 3, 5)
    assert torch.equal(guider.PerturbedGuider._predicted(guide, x), x[:, :4].flatten())  # type: ignore[arg-type]
    assert torch.equal(guider.PerturbedGuider._predicted(guide, x[:, :4]), x[:, :4].flatten())  # type: ignore[arg-type]


def test_guidance_that_was_asked_for_and_did_not_happen_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = fake(monkeypatch, dit_attn.SoftPAG(heads="1"), "separate", 3.0)
    pipe()
    assert dit_attn.summary(pipe).warnings == ()
    pipe.guides = False  # as a pipeline that was given no negative prompt
    pipe()
    (warning,) = dit_attn.summary(pipe).warnings
    assert "guidance_scale 3 had no effect" in warning and warning in str(dit_attn.summary(pipe))


# -- settings ---------------------------------------------------------------------------------------------------------

BAD = [
    (dit_attn.SoftPAG, {"scale": -1.0}, "softpag.scale must be at least 0"),
    (dit_attn.SoftPAG, {"scale": float("inf")}, "softpag.scale must be finite"),
    (dit_attn.SoftPAG, {"u": 1.1}, "softpag.u must be between 0"),
    (dit_attn.SoftPAG, {"joint": "both"}, "ii-logit-mask"),
    (dit_attn.SoftPAG, {"target": "blurred-query"}, "mean-query"),
    (dit_attn.SoftPAG, {"interval": 0}, "softpag.interval must be at least 1"),
    (dit_attn.SoftPAG, {"interval": 1.5}, "softpag.interval must be a whole number"),
    (dit_attn.SoftPAG, {"start": 0.5, "stop": 0.5}, "no step would be guided"),
    (dit_attn.SEG, {"sigma": -1.0}, "seg.sigma must be at least 0"),
    (dit_attn.SLG, {"layers": "9-7"}, "layers '9-7' cannot be read"),
    (dit_attn.SLG, {"layers": "-3"}, "cannot be read"),
    (dit_attn.SLG, {"layers": "0-999999999"}, "cannot be read"),
    (dit_attn.SLG, {"layers": None}, "cannot be read"),
    (dit_attn.SLG, {"batched": True}, "drop batched"),
    (dit_attn.STG, {"batched": True, "mode": "residual"}, "drop batched"),
    (dit_attn.STG, {"mode": "both"}, "residual"),
]


@pytest.mark.parametrize(("cls", "values", "told"), BAD, ids=lambda value: str(value)[:40])
def test_settings_out_of_range_are_refused_with_the_reason(cls: Any, values: dict[str, Any], told: str) -> None:
    with pytest.raises(dit_attn.DitAttnError, match=told.replace("(", r"\(")):
        cls(**values)


@pytest.mark.parametrize(("written", "kept"), [("7-9", "7,8,9"), ([7, 8, 9], "7,8,9"), (7, "7"), ("1,1,0-1", "1,0")])
def test_layers_to_skip_are_written_one_way(written: Any, kept: str) -> None:
    assert dit_attn.SLG(layers=written).layers == kept


def test_settings_survive_a_file(tmp_path: Any) -> None:
    for method in (
        dit_attn.SoftPAG(heads={(3, 0): 0.5}, joint="ii-logit-mask", schedule="cosine"),  # type: ignore[arg-type]
        dit_attn.SEG(sigma=2.0), dit_attn.SLG(layers="0-1"), dit_attn.STG(mode="residual"),
    ):  # fmt: skip
        method.save_pretrained(tmp_path)
        assert Method.from_pretrained(tmp_path) == method
        assert eval(repr(method), vars(dit_attn)) == method


def test_two_guidance_methods_and_a_wrong_layer_are_refused_before_anything_changes() -> None:
    model = WanCase().model()
    for wanted, told in (
        ((dit_attn.SoftPAG(), dit_attn.SLG()), "cannot run together"),
        ((dit_attn.SoftPAG(heads="99"),), "no layer 99"),
        ((dit_attn.SoftPAG(heads="0:99"),), "has no head 99"),
        ((dit_attn.SLG(layers="99"),), "no block 99"),
        ((dit_attn.STG(layers="99"),), "no block 99"),
    ):
        with pytest.raises(dit_attn.DitAttnError, match=told):
            dit_attn.enable(model, *wanted)
        assert hooks(model) == []
