"""What the README claims is what the tests and the recorded files say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from dit_attn.processors.attach.families import families
from tests._support import result_tables
from tests.families import table as families_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()


def test_family_table_is_the_one_the_tests_make() -> None:
    begin, end = families_table.BEGIN, families_table.END
    shown = README[README.index(begin) + len(begin) : README.index(end)].strip()
    assert shown == families_table.table(), "run: python -m tests.families.table"


def test_every_family_that_is_offered_is_tested() -> None:
    cases = families_table.tested()
    assert not [row.name for row in families() if not row.refused and row.name not in cases]


@pytest.mark.parametrize("page", result_tables.PAGES)
def test_the_comparison_is_what_the_records_say(page: str) -> None:
    expected = result_tables.table(full=result_tables.PAGES[page])
    assert result_tables.shown(page) == expected, "run: python -m tests._support.result_tables"


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))))
def test_linked_files_exist(path: str) -> None:
    assert (ROOT / path).exists()
