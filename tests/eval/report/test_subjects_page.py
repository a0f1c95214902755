"""The page of subjects: boxes where they are, the leakage in percent, text that is escaped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from dit_attn.eval.report import subjects_page

SIDE: dict[str, Any] = {
    "prompt": "a <b>red</b> cube",
    "file": "0.png",
    "methods": [
        {"method": "isolation", "subjects": [{"piece": "cube", "box": [0.1, 0.2, 0.5, 0.8]}, {"piece": "ball"}]},
        {"method": "saas"},
    ],
    "boxes": [("cube", [0.1, 0.2, 0.5, 0.8])],
    "summary": {
        "reports": {
            "isolation": {
                "pieces": ["cube", "ball"],
                "found": [{"piece": "ball", "quality": 0.9, "used": True, "box": [0.5, 0.0, 1.0, 1.0]}],
                "word_sums": [[0.2, 0.0], [0.1, 0.4]],
                "region_sums": [],
                "counts": [2, 0],
            },
            "saas": {
                "traces": [
                    {
                        "piece": "cube",
                        "steps": [0, 1],
                        "shares": [0.1, 0.3],
                        "rivals": [0.4],
                        "factors": [2.0],
                        "wanted": [3.0],
                        "quality": [],
                        "box": None,
                    },
                ]
            },
        }
    },
}


def test_boxes_are_where_they_were_given_or_found() -> None:
    boxes = subjects_page.boxes(SIDE, SIDE["summary"]["reports"])
    expected = [("cube", 10.0, 20.0, 40.0, 60.0), ("ball", 50.0, 0.0, 50.0, 100.0)]
    assert boxes == [subjects_page.Box(*each) for each in expected]


def test_tables_are_means_in_percent() -> None:
    leakage, pieces = subjects_page.tables(SIDE["summary"]["reports"])
    assert [row.cells for row in leakage.rows] == [["10.00 %", "0.00 %"], ["5.00 %", "20.00 %"]]
    assert pieces.rows[0].cells == ["0.2", "0.4", "2", "0"]
    assert subjects_page.tables({}) == []


def test_pieces_of_saas_are_shown_by_their_regions_where_no_subject_has_a_box() -> None:
    trace = {"piece": "ball", "box": [0.0, 0.0, 0.5, 0.5]}
    boxes = subjects_page.boxes({"methods": [{"method": "saas"}]}, {"saas": {"traces": [trace]}})
    assert boxes == [subjects_page.Box("ball", 0.0, 0.0, 50.0, 50.0)]


def test_the_leakage_is_a_map_and_what_saas_measured_a_plot() -> None:
    (words,) = subjects_page.maps(SIDE["summary"]["reports"])
    assert words.title == "leakage to words" and json.loads(words.data["values"]) == [[0.1, 0.0], [0.05, 0.2]]
    plot = subjects_page.plot(SIDE["summary"]["reports"]["saas"]["traces"], "share", "shares", "rivals")
    assert [line.kind for line in plot.lines] == ["share", "rival"] and len(plot.points) == 2
    assert plot.points[1].title == "cube, step 1: 0.3" and plot.y_range[1] > 0.4


def test_the_page_is_one_file_with_escaped_text(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "0.png")
    text = subjects_page.page(tmp_path, [SIDE], "subjects", "dit-attn generate", [("model", "tiny")])
    assert "a &lt;b&gt;red&lt;/b&gt; cube" in text and "left:10.0%" in text and "data:image/png" in text
    assert "leakage to words" in text and "factor of the next step" in text and 'class="share"' in text
    assert "20.00 %" in text and "http" not in text.replace("http://www.w3.org", "")
