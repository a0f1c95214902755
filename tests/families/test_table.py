"""The tests of a family are found by its name."""

from __future__ import annotations

import re

import pytest

from dit_attn.processors.attach.families import Family, families
from tests.families import table


def file_of(name: str) -> str:
    """The test module of a family: its name with underscores."""
    return f"test_{re.sub('[-.]', '_', name)}"


@pytest.mark.parametrize("row", [row for row in families() if row.layers or row.cross_layers], ids=lambda row: row.name)
def test_every_family_has_a_test_file_of_its_name(row: Family) -> None:
    assert (table.ROOT / "tests/families" / f"{file_of(row.name)}.py").is_file()


def test_the_cases_of_a_family_stand_in_its_file() -> None:
    for name, cases in table.tested().items():
        assert {case.__module__.rpartition(".")[2] for case in cases} == {file_of(name)}
