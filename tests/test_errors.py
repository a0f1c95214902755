"""Values in messages are cut short, whatever they are."""

from __future__ import annotations

from typing import Any

import pytest

from dit_attn.errors import cut, reason, shorten, unknown


class Broken:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def nested(levels: int) -> Any:
    """A list of 9 ** levels values that takes next to no memory."""
    found: Any = "x"
    for _ in range(levels):
        found = [found] * 9
    return found


def deep(levels: int) -> Any:
    found: Any = 1
    for _ in range(levels):
        found = [found]
    return found


@pytest.mark.parametrize(
    "value",
    [nested(30), deep(100_000), "x" * 10**6, 10**5000, dict.fromkeys(range(99), "y" * 99), Broken(), b"z" * 9999],
    ids=["wide", "deep", "text", "number", "mapping", "broken", "bytes"],
)
def test_a_value_is_never_written_out_in_full(value: Any) -> None:
    assert len(shorten(value)) <= 100
    assert len(str(unknown("flag", value, ["one", "two"]))) < 300


@pytest.mark.parametrize("value", ["a red circle", 3, 0.25, None, [1, 2], {"a": 1}, "it's"])
def test_a_short_value_is_its_repr(value: Any) -> None:
    assert shorten(value) == repr(value)


def test_a_text_is_cut_in_its_middle() -> None:
    assert cut("abcdefghij", 10) == "abcdefghij"
    assert cut("a" * 50 + "z" * 50, 12) == "aaaaaaaa...z" and len(reason(ValueError("x" * 10**6))) <= 300
