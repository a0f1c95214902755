"""Rules of classifier-free guidance: between the argument of a pipeline and the scale s of ``u + s (c - u)``."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dit_attn.processors.core import cfg

# Usual pipelines, Z-Image and Cosmos.
RULES = (cfg.SEPARATE, cfg.CFGRule("batched", ("cond", "uncond"), scale_offset=1.0, off=0.0),
         cfg.CFGRule("separate", ("cond", "uncond"), scale_offset=1.0))  # fmt: skip


@pytest.mark.parametrize(
    ("rule", "argument", "scale"),
    [
        (cfg.SEPARATE, 1.0, 1.0), (cfg.SEPARATE, 3.0, 3.0),
        (cfg.CFGRule("batched", ("cond", "uncond"), scale_offset=1.0, off=0.0), 0.0, 1.0),  # Z-Image
        (cfg.CFGRule("batched", ("cond", "uncond"), scale_offset=1.0, off=0.0), 0.5, 1.5),
        (cfg.CFGRule("separate", ("cond", "uncond"), scale_offset=1.0), 1.0, 1.0),  # Cosmos
        (cfg.CFGRule("separate", ("cond", "uncond"), scale_offset=1.0), 2.0, 3.0),
    ],
)  # fmt: skip
def test_scales_of_pipelines_that_add_one(rule: cfg.CFGRule, argument: float, scale: float) -> None:
    assert rule.scale_of(argument) == scale and rule.argument_for(scale) == argument
    assert rule.scale_of(rule.barely) == pytest.approx(rule.off + rule.scale_offset, abs=1e-3)


def test_a_scale_a_pipeline_cannot_guide_with_becomes_the_nearest_one() -> None:
    cosmos = cfg.CFGRule("separate", ("cond", "uncond"), scale_offset=1.0)
    assert cosmos.argument_for(1.2) == 1.0 and cosmos.argument_for(1.8) == cosmos.barely


@given(rule=st.sampled_from(RULES), scale=st.floats(0.0, 30.0))
def test_the_argument_for_a_scale_guides_with_that_scale_or_the_nearest_possible_one(
    rule: cfg.CFGRule, scale: float
) -> None:
    least = rule.off + rule.scale_offset  # scales in (1, least] cannot be reached
    reached = rule.scale_of(rule.argument_for(scale))
    if scale > least + 1e-3:
        assert reached == pytest.approx(scale)
    else:
        assert abs(reached - scale) <= min(abs(1.0 - scale), abs(least - scale)) + 2e-4


@given(rule=st.sampled_from(RULES), argument=st.floats(-5.0, 30.0))
def test_arguments_up_to_the_threshold_mean_no_guidance(rule: cfg.CFGRule, argument: float) -> None:
    assume(argument != rule.off)
    assert (rule.scale_of(argument) == 1.0) == (argument < rule.off or argument + rule.scale_offset == 1.0)
    assert rule.scale_of(rule.off) == 1.0


def test_the_usual_rules() -> None:
    assert (cfg.SEPARATE.style, cfg.SEPARATE.order) == ("separate", ("cond", "uncond"))
    assert (cfg.BATCHED.style, cfg.BATCHED.order) == ("batched", ("uncond", "cond"))
    assert cfg.RESCALABLE.order == cfg.BATCHED.order and cfg.RESCALABLE.rescaled_by == ("guidance_rescale",)
