"""What the README claims is what the tests and the recorded files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dit_attn.processors.attach.families import families
from tests.families.table import BEGIN, END, table, tested

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_family_table_is_the_one_the_tests_make() -> None:
    shown = README[README.index(BEGIN) + len(BEGIN) : README.index(END)].strip()
    assert shown == table(), "run: python -m tests.families.table"


def test_every_family_that_is_offered_is_tested() -> None:
    cases = tested()
    assert not [row.name for row in families() if not row.refused and row.name not in cases]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))))
def test_linked_files_exist(path: str) -> None:
    assert (ROOT / path).exists()
