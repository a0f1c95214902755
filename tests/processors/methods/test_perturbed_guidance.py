"""Settings of the guidance methods: what is refused, how they are written, and what survives a file."""

from __future__ import annotations

from typing import Any

import pytest

import dit_attn
from dit_attn.processors.methods.base import Method
from tests._support.pipeline_runs import hooks
from tests.families.test_wan import TestWan as WanCase

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
    (dit_attn.SLG, {"layers": "9-7"}, "layers '9-7' is no list of positions"),
    (dit_attn.SLG, {"layers": "-3"}, "is no list of positions"),
    (dit_attn.SLG, {"layers": "0-999999999"}, "is no list of positions"),
    (dit_attn.SLG, {"layers": None}, "is no list of positions"),
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
