"""The report of a guidance method: what it perturbed, what that cost, and how strong its update was."""

from __future__ import annotations

from typing import Any

import pytest

import dit_attn
from dit_attn.processors.attach.guidance_summary import GuidanceSummary, _counted
from tests._support.compose import tiny
from tests._support.fake_pipeline import STEPS, fake

WHAT = "softpag on layer 3 (blocks.3.attn1), all 2 heads"


def found(**changes: Any) -> GuidanceSummary:
    """Eight guided steps."""
    given = {"evaluations": 8, "steps": 8, "reused": 0.5, "parallel": -0.03, "orthogonal": 4.33, "relative": 0.3}
    return GuidanceSummary(**{**given, "perturbed": (WHAT,), **changes})


def test_the_lines_say_what_was_perturbed_what_it_cost_and_how_strong_it_was() -> None:
    assert found().rows(8) == [
        ("guidance", f"{WHAT}, 8 of 8 steps"),
        ("cost", "one extra pass a step; 50.0 % of the blocks reused from the plain passes"),
        ("update", "equivalent guidance scale -0.03; orthogonal component 4.33 |cond - uncond|"),
    ]
    assert str(found()).splitlines()[0] == f"guidance         {WHAT}"
    few = dict(found(evaluations=3, reused=0.0).rows(20))
    assert few["guidance"].endswith("8 of 20 steps") and few["cost"] == "3 extra passes"
    assert dict(found(steps=20, evaluations=20).rows(20))["cost"].startswith("one extra pass a step")


def test_an_update_without_an_unconditional_branch_is_compared_with_the_prediction() -> None:
    rows = dict(found(parallel=None, orthogonal=None).rows(8))
    assert rows["update"] == "0.30 |cond| (no unconditional branch to compare with)"


def test_where_no_step_was_guided_nothing_is_said_of_cost_and_strength() -> None:
    nothing = found(evaluations=0, steps=0, reused=0.0, parallel=None, orthogonal=None, relative=None)
    assert nothing.rows(20) == [("guidance", f"{WHAT}, 0 of 20 steps")]
    assert nothing.rows(0) == [("guidance", WHAT)]  # before a run


@pytest.mark.parametrize(
    ("method", "text"),
    [
        (dit_attn.SoftPAG(heads="0:0,1;1:0,1"), "softpag on layers 0, 1, all 2 heads"),
        (dit_attn.SoftPAG(heads="1:1"), "softpag on layer 1 (blocks.1.attn1), head 1"),
        (dit_attn.SLG(layers="1"), "slg skips blocks.1"),
        (dit_attn.STG(layers="1"), "stg on layer 1 (blocks.1.attn1), all 2 heads"),
        (dit_attn.SoftPAG(), "softpag on layer 1 (blocks.1.attn1), all 2 heads (the default, none were named)"),
        (dit_attn.SLG(), "slg skips blocks.1 (the default, none were named)"),
    ],
)
def test_the_layers_and_heads_that_guidance_perturbs_are_named(method: dit_attn.Method, text: str) -> None:
    model, _ = tiny("wan")
    dit_attn.enable(model, method)
    assert f"guidance         {text}\n" in str(dit_attn.summary(model))


@pytest.mark.parametrize(
    ("numbers", "text"),
    [([3], "layer 3"), ([0, 1], "layers 0, 1"), ([0, 1, 2, 3, 5, 7, 8], "layers 0-3, 5, 7, 8")],
)
def test_many_layers_are_named_as_ranges(numbers: list[int], text: str) -> None:
    assert _counted("layer", numbers) == text


def test_the_passes_of_a_run_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = fake(monkeypatch, dit_attn.SoftPAG(heads="1", stop=0.5), "separate", 3.0)
    pipe()
    text = str(dit_attn.summary(pipe))
    assert f"{STEPS // 2} of {STEPS} steps" in text and f"cost             {STEPS // 2} extra passes" in text
    assert "update           equivalent guidance scale" in text
