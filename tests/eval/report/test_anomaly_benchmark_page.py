"""The page of the benchmark of image-mask pairs, of the record that ships."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dit_attn.eval.report.anomaly_benchmark_page import page

RECORD = Path(__file__).resolve().parents[3] / "benchmarks/anomaly/tiny-inspect_benchmark_quick.json"


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The page's file."""
    path = tmp_path_factory.mktemp("page") / "index.html"
    path.write_text(page(json.loads(RECORD.read_text())), encoding="utf-8")
    return path


def test_the_page_shows_every_arm_with_intervals_below_its_scores(written):
    text = written.read_text(encoding="utf-8")
    for arm in ("none", "cutpaste", "crop-paste", "perlin", "generated"):
        assert f">{arm}</" in text
    assert "td small { display: block; }" in text and text.count("<small>") > 40


def test_the_page_does_not_scroll_sideways_nor_do_its_tables_on_a_desk(written, browser):
    browser.get(written.as_uri())
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    found = browser.execute_script(
        "return [...document.querySelectorAll('.scroll')].map(box => [box.scrollWidth, box.clientWidth])"
    )
    assert found
    if browser.execute_script("return innerWidth") >= 1280:
        assert all(inner <= outer for inner, outer in found), found
