"""Remedies: every reason that the code can give for stock attention has one, and no other's."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from dit_attn.processors.core.remedies import REMEDIES, remedy, with_remedy

ROOT = Path(__file__).parents[3] / "dit_attn" / "processors"
CALLS = ("decline", "_fallback", "_disable_layer", "_lose_track", "NotImplementedError", "set_layout")
FUNCTIONS = re.compile(r"failure_reason|_?unsupported_reason\w*|too_short|read_mask|exception|dense_step")
NAMES = re.compile(r"ONLY_GUIDANCE|UNSEEN|_NOT_FINITE")


def texts(node: ast.AST | None) -> Iterator[str]:
    """The texts that an expression can be, with a 7 for every value in them."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        yield "".join(str(part.value) if isinstance(part, ast.Constant) else "7" for part in node.values)
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)
    elif isinstance(node, ast.BoolOp):
        for value in node.values:
            yield from texts(value)


def reasons() -> Iterator[str]:
    """Reasons in the code: arguments of the calls that count one, and what the functions return that find one."""
    for file in [path for part in ("core", "attach", "methods") for path in sorted((ROOT / part).glob("*.py"))]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "attr", getattr(node.func, "id", ""))
                for argument in node.args if name in CALLS else ():
                    yield from texts(argument)
            elif isinstance(node, ast.FunctionDef) and FUNCTIONS.fullmatch(node.name):
                for inner in ast.walk(node):
                    if isinstance(inner, ast.Return):
                        yield from texts(inner.value)
            elif isinstance(node, ast.Assign) and any(NAMES.fullmatch(ast.unparse(x)) for x in node.targets):
                yield from texts(node.value)


FOUND = sorted(set(reasons()))


def test_the_reasons_of_the_code_are_found() -> None:
    assert len(FOUND) > 25 and {"density 1", "square attention mask", "kernel failed: 7: 7"} <= set(FOUND)


@pytest.mark.parametrize("reason", FOUND)
def test_every_reason_of_the_code_has_a_remedy_in_one_short_line(reason: str) -> None:
    text = remedy(reason)
    assert text is not None, f"core/remedies.py does not know what to do about {reason!r}"
    assert "\n" not in text and len(text) < 110


def test_every_remedy_is_for_a_reason_of_the_code() -> None:
    said = [*FOUND, "kernel failed: OutOfMemoryError: 7"]
    for pattern, text in REMEDIES:
        assert any(re.fullmatch(pattern, reason) and remedy(reason) == text for reason in said), pattern


def test_a_reason_comes_before_its_remedy_and_one_from_elsewhere_stays_alone() -> None:
    assert with_remedy("attention dropout") == "attention dropout; call transformer.eval(), or set the dropout to 0"
    assert with_remedy("dense step") == "dense step" and with_remedy("my own reason") == "my own reason"
    assert remedy("dense step") == "" and remedy("my own reason") is None
    failed = "kernel failed: RuntimeError: a line\nand another"
    assert with_remedy(failed).startswith(f"{failed}; run dit-attn doctor")
