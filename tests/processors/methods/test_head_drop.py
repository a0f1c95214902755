"""HeadDrop: against gates of 0, with other methods, its file, bad settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import DitAttnError, HeadDrop
from tests._support.compose import SPARSE, forward, same, tiny
from tests._support.gated_heads import gated, saved_drop

NAMES = ("pixart", "sd3", "wan", "flux")


@pytest.mark.parametrize("name", NAMES)
def test_a_head_left_out_is_a_head_of_zeros(name: str) -> None:
    model, args = tiny(name)
    stock, expected = forward(model, args), gated(model, args)
    session = dit_attn.enable(model, HeadDrop(heads="*:0"))
    torch.testing.assert_close(forward(model, args), expected, atol=2e-6, rtol=1e-5)
    assert not same(stock, expected)
    report = dit_attn.summary(model).reports["head-drop"]
    assert report.dropped == [len(session.layers)] and "heads left out" in str(dit_attn.summary(model))
    dit_attn.disable(model)
    assert same(stock, forward(model, args))


@pytest.mark.parametrize("name", NAMES)
def test_nothing_left_out_is_bit_equal_to_stock(name: str) -> None:
    model, args = tiny(name)
    stock = forward(model, args)
    dit_attn.enable(model, HeadDrop())
    assert same(stock, forward(model, args))


def test_it_goes_with_sparse_attention_and_guidance_and_not_with_moh() -> None:
    model, args = tiny("pixart")
    dit_attn.enable(model, HeadDrop(heads="*:0"), SPARSE)
    forward(model, args)
    assert dit_attn.summary(model).sparse_calls == 2
    with pytest.raises(DitAttnError, match="has no head 1"):
        dit_attn.enable(model, HeadDrop(heads="*:0"), dit_attn.SoftPAG(heads="0:1"))
    with pytest.raises(DitAttnError, match="cannot run together"):
        dit_attn.enable(model, HeadDrop(heads="*:0"), dit_attn.MoH())


def test_the_method_is_saved_with_its_refit_and_comes_back(tmp_path: Path) -> None:
    model, args = tiny("pixart")
    session = dit_attn.enable(model, str(saved_drop(model, args, tmp_path)))
    expected = forward(model, args)
    session.save_pretrained(tmp_path / "again")
    dit_attn.disable(model)
    dit_attn.enable(model, str(tmp_path / "again"))
    assert same(expected, forward(model, args))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": "*:0 / *:1"}, "2 parts and until"),
        ({"heads": "*:0", "until": (0.5,)}, "1 parts and until"),
        ({"heads": "a:0 / a:1 / a:2", "until": (0.5, 0.5)}, "ascending fractions"),
        ({"heads": "L0H0@0.5"}, "leave out the strengths"),
        ({"heads": "nonsense::"}, "cannot be parsed"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DitAttnError, match=message):
        HeadDrop(**settings)


@pytest.mark.parametrize(
    ("heads", "message"), [("0", "leaves no head of"), ("0:99", "has no head 99"), ("blocks.77", "layer")]
)
def test_heads_that_the_model_does_not_have_are_refused_before_anything_is_changed(heads: str, message: str) -> None:
    model, args = tiny("pixart")
    stock = forward(model, args)
    for ask in (dit_attn.enable, dit_attn.explain):
        with pytest.raises(DitAttnError, match=message):
            ask(model, HeadDrop(heads=heads))
    assert same(stock, forward(model, args))
