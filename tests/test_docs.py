"""The pages about adding a family and a method say what is true: their code runs, their tables name what there is."""

from __future__ import annotations

import dataclasses
import re
import sys
import textwrap
import types
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.cli import COMMANDS
from dit_attn.processors.attach.families import Family
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.cfg import BATCHED, SEPARATE, CFGRule
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span
from dit_attn.processors.methods import base as methods
from tests._support.compose import forward, same, tiny
from tests._support.recorded_calls import reference, requests

DOCS = Path(__file__).resolve().parents[1] / "docs"


def block(page: str, first: str) -> str:
    """The Python block of a page that begins with ``first``, without its indentation."""
    found = re.findall(r"^( *)```python\n(.*?)^ *```", (DOCS / page).read_text(), re.DOTALL | re.MULTILINE)
    return next(text for text in (textwrap.dedent(body) for _, body in found) if text.startswith(first))


@pytest.fixture
def first_frame(monkeypatch: Any) -> Any:
    """The class of the page, registered for one test only."""
    monkeypatch.setattr(methods, "_REGISTRY", dict(methods._REGISTRY))
    module = types.ModuleType("dit_attn.processors.first_frame")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(compile(block("add_a_method.md", '"""Every block'), "add_a_method.md", "exec"), module.__dict__)
    return module.FirstFrame  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["wan", "cogvideox"])
def test_the_method_of_the_page_runs_and_equals_its_mask(first_frame: Any, name: str) -> None:
    model, args = tiny(name)
    stock = forward(model, args)
    dit_attn.enable(model, first_frame(q_block=32, kv_block=32, dense_steps=0))
    with requests() as seen:
        out = forward(model, args)
    assert len(seen) == len(dit_attn.summary(model).layers) and not same(out, stock)
    for call, request, result in seen:
        torch.testing.assert_close(result.double(), reference(call, request), atol=2e-5, rtol=1e-4)
        assert request.layout is not None and 0.0 < request.layout.density < 1.0
    dit_attn.disable(model)
    assert same(stock, forward(model, args))


def test_the_method_of_the_page_is_known_by_its_slug_and_checks_its_settings(first_frame: Any) -> None:
    assert dit_attn.Method.from_dict({"method": "first-frame", "text": False}) == first_frame(text=False)
    with pytest.raises(dit_attn.DitAttnError, match=r"first-frame\.text must be true or false, got 3"):
        first_frame(text=3)


def test_the_family_of_the_page_is_a_row(monkeypatch: Any) -> None:
    names = {"Family": Family, "TokenLayout": TokenLayout, "Span": Span, "visual_span": visual_span}
    names |= {"SEPARATE": SEPARATE, "BATCHED": BATCHED, "Guidance": CFGRule}
    code = block("add_a_family.md", "def _my_model").replace("\nFamily(", "\nrow = Family(")
    exec(compile(code, "add_a_family.md", "exec"), names)
    row: Any = names["row"]
    layout = row.layout(SimpleNamespace(patch_size=2), {"hidden_states": torch.empty(1, 4, 3, 8, 10)})
    tokens = layout.resolve(7 + 3 * 4 * 5)
    assert [(span.kind, span.length) for span in tokens.spans] == [("text", 7), ("video", 60)]


def test_every_field_of_a_family_and_part_of_a_request_is_on_its_page() -> None:
    family, method = ((DOCS / name).read_text() for name in ("add_a_family.md", "add_a_method.md"))
    assert not [field.name for field in dataclasses.fields(Family) if f"{field.name}=" not in family]
    told = re.findall(r"`(?:call|request)?\.?(\w+)", method)
    internal = {"mask", "scale", "causal", "declined", "max_error"}
    fields = {field.name for kind in (AttentionCall, Request) for field in dataclasses.fields(kind)}
    assert not {name for name in fields - internal if name not in told and f"call.{name}" not in method}


def test_every_command_is_in_the_table_of_commands() -> None:
    rows = re.findall(r"^\| `([a-z-]+)` \|", (DOCS / "cli.md").read_text(), re.MULTILINE)
    assert not [name for name in COMMANDS if name not in rows]
