"""The layers that a family row names are found, and what a model does not have is refused in one line."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch

import dit_attn
from dit_attn.processors.attach import sites
from dit_attn.processors.attach.families import family_of
from dit_attn.processors.methods.base import Method
from tests._support.compose import tiny

WAN = ["blocks.0.attn1", "blocks.1.attn1"]


@dataclass(frozen=True)
class OfText(Method):
    """A method of the attention to the text."""

    sites: ClassVar[tuple[str, ...]] = ("text",)


@dataclass(frozen=True)
class OfCross(Method):
    """A method of cross attention."""

    sites: ClassVar[tuple[str, ...]] = ("cross",)


def test_a_model_whose_layers_were_renamed_is_refused() -> None:
    model, _ = tiny("wan")
    row = family_of(model)
    assert sites.eligible_layers(model, row) == WAN
    model.blocks[0].self_attention = model.blocks[0].attn1  # type: ignore[index,union-attr]
    for block in model.blocks:  # type: ignore[union-attr]
        del block.attn1
    with pytest.raises(
        dit_attn.DitAttnError, match=r"no attention layer of WanTransformer3DModel matches blocks\.\*\.attn1"
    ):
        sites.eligible_layers(model, row)


def test_cross_attention_layers_are_those_of_the_row_and_joint_models_have_none() -> None:
    wan, sd3 = tiny("wan")[0], tiny("sd3")[0]
    assert sites.cross_layers(wan, family_of(wan)) == ["blocks.0.attn2", "blocks.1.attn2"]
    assert sites.cross_layers(sd3, family_of(sd3)) == []


@pytest.mark.parametrize(
    ("methods", "observed", "wan", "sd3"),
    [
        ((), (), {"self"}, {"self"}),
        ((OfText(),), (), {"cross"}, {"self"}),
        ((dit_attn.BlockSparse(), OfText()), (), {"self", "cross"}, {"self"}),
        ((), ("image",), {"image"}, {"image"}),
        ((dit_attn.BlockSparse(),), ("cross",), {"self", "cross"}, None),
        ((OfCross(),), (), {"cross"}, None),
    ],
)
def test_the_kinds_of_calls_are_what_methods_and_observers_want(
    methods: tuple[Method, ...], observed: tuple[str, ...], wan: set[str], sd3: set[str] | None
) -> None:
    assert sites.wanted_kinds(tiny("wan")[0], methods, observed) == wan
    model = tiny("sd3")[0]
    if sd3 is not None:
        assert sites.wanted_kinds(model, methods, observed) == sd3
        return
    with pytest.raises(dit_attn.DitAttnError, match="needs cross attention, and SD3Transformer2DModel has none"):
        sites.wanted_kinds(model, methods, observed)


@pytest.mark.parametrize("given", [("crosss",), "cross"])
def test_unknown_sites_are_refused_with_those_there_are(given: Any) -> None:
    model = tiny("wan")[0]
    with pytest.raises(dit_attn.DitAttnError, match="the observer: sites must be a tuple of self, cross, image, text"):
        sites.checked_kinds(model, family_of(model), given, "the observer")


def test_layers_without_softmax_attention_are_refused_with_their_names() -> None:
    model = tiny("wan")[0]
    sites.check_taps(model, WAN)
    model.get_submodule(WAN[1]).processor = torch.nn.Identity()
    with pytest.raises(dit_attn.DitAttnError, match=r"1 layers of WanTransformer3DModel .*Identity: blocks\.1"):
        sites.check_taps(model, WAN)
