"""What a user gives ``enable`` is a method, or one clear line that says what to give."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import BlockSparse, DitAttnError, ReTtention, api
from dit_attn.processors.methods.presets import method_for
from tests._support.compose import tiny


def test_settings_by_keyword_replace_those_of_the_preset(tmp_path: Path) -> None:
    model, _ = tiny("wan")
    session = dit_attn.enable(model, "block-sparse", density=0.5, q_block=32)
    preset: Any = method_for("block-sparse", model)
    assert session.methods == (BlockSparse(**{**preset.__dict__, "density": 0.5, "q_block": 32}),)
    BlockSparse(density=0.2, kv_block=64).save_pretrained(tmp_path)
    with dit_attn.enabled(model, str(tmp_path), density=0.3) as session:
        assert session.methods == (BlockSparse(density=0.3, kv_block=64),)
    api.check(model, "re-ttention", density=0.4)


class UNet2DConditionModel(torch.nn.Module):
    """By its name a UNet of diffusers."""


@pytest.mark.parametrize(
    ("wanted", "settings", "line"),
    [
        (("block-sparse",), {"densty": 0.5}, r"unknown setting of block-sparse 'densty'.* Did you mean 'density'\?"),
        (("block-sparse",), {"density": 2.0}, r"block-sparse\.density must be"),
        (("block-sparse", "softpag"), {"density": 0.5}, r"^density: settings are for one method that is given by name"),
        ((BlockSparse(),), {"density": 0.5}, "several methods are given as instances with theirs"),
        ((), {"density": 0.5}, "settings are for one method"),
        ((ReTtention,), {}, r"ReTtention is a class; give an instance of it: ReTtention\(\)"),
        ((["softpag", "re-ttention"],), {}, "one by one, not as a list"),
        ((5,), {}, "got 5; names: .*block-sparse"),
    ],
)
def test_what_is_no_method_is_one_line(wanted: tuple[Any, ...], settings: dict[str, Any], line: str) -> None:
    model, _ = tiny("wan")
    with pytest.raises(DitAttnError, match=line) as found:
        dit_attn.enable(model, *wanted, **settings)
    assert "\n" not in str(found.value)
    assert not any(type(p).__name__.startswith("DitAttn") for p in model.attn_processors.values())  # type: ignore[operator,union-attr]


def test_a_unet_is_called_a_unet() -> None:
    with pytest.raises(DitAttnError, match="UNet2DConditionModel is a UNet; the methods are for"):
        dit_attn.enable(UNet2DConditionModel(), "block-sparse")


@pytest.mark.parametrize("function", [dit_attn.enable, dit_attn.explain, dit_attn.supported, dit_attn.run_context])
def test_help_shows_an_example(function: Any) -> None:
    assert f"dit_attn.{function.__name__}(" in str(inspect.getdoc(function))


def test_the_types_of_the_public_functions_are_those_of_diffusers_and_load_nothing() -> None:
    for function in (dit_attn.enable, dit_attn.disable, dit_attn.summary, dit_attn.explain):
        assert "DiffusionPipeline | ModelMixin" in str(inspect.signature(function))
    code = "import sys, dit_attn; sys.exit('diffusers' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
