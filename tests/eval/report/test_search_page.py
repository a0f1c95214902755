"""The page of a search for heads, made from a recorded search: true to it, and usable in a real browser."""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dit_attn.eval.report.digits import write_figure
from dit_attn.eval.report.search_page import page
from dit_attn.eval.report.search_verdict import search_verdict

RECORD = Path(__file__).parents[3] / "benchmarks/guidance/tiny-joint_search.json"


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return json.loads(RECORD.read_text())


def grid(frames: int = 1) -> list[dict[str, Any]]:
    """Two pairs; the second has an image that is not finite."""
    noise = np.random.default_rng(0)
    images = {name: noise.integers(0, 255, (frames, 32, 32, 3), dtype=np.uint8) for name in ("none", "round 1")}
    return [
        {"prompt": "a <red> circle", "seed": 7, "images": images},
        {"prompt": "a blue cross", "seed": 8, "images": {**images, "round 1": None}},
    ]


def test_every_head_and_every_score_of_the_record_is_on_the_page(found: dict[str, Any]) -> None:
    text = page(found, grid())
    for layer, head, u in found["heads"]:
        assert (
            f'<th scope="row">{layer}</th><td data-head="head">{head}</td><td data-head="strength u">{u:g}</td>' in text
        )
    for checks in found["checks"].values():
        for one in checks.values():
            value, spread = write_figure(one["score"])
            assert f'<td data-head="score">{value} <small>{spread}</small></td>' in text
    assert "a &lt;red&gt; circle" in text and "<red>" not in text and "<i>not finite</i>" in text
    for number, one in enumerate(found["rounds"], 1):
        titles = [f"Round {number}, screening: score on {name}" for name in one["screened"]]
        assert titles and all(title in text for title in titles)
    assert "http" not in unescape(text).replace("http://www.w3.org", "")  # complete without network


def test_the_verdict_stands_first_then_images_and_heads(found: dict[str, Any]) -> None:
    verdict = search_verdict(found)
    text = unescape(page(found, grid()))
    parts = (
        f'<span class="chip {verdict.kind}">{verdict.chip}</span>',
        verdict.sentence,
        "<img",
        "<h2>Heads</h2>",
        "<details",
    )
    places = [text.index(part) for part in parts]
    assert places == sorted(places)


def test_one_head_is_one_head_and_versions_stand_there_once(found: dict[str, Any]) -> None:
    one = {**found, "heads": found["heads"][:1]}
    text = page(one, grid())
    assert "The 1 head lies in 1 of 6 layers." in text
    assert text.count(f"<dd>{found['search']['versions']['diffusers']}</dd>") == 1


def test_a_gain_over_two_pairs_is_noise_however_narrow_its_interval(found: dict[str, Any]) -> None:
    one = json.loads(json.dumps(found))
    for checks in one["checks"].values():
        for each in checks.values():
            each["gain"] = each["gain"] and {"value": 0.5, "ci95": [0.4, 0.6], "n": 2}
    assert "raise the score by 0.50 over no guidance, within the noise." in page(one, grid())


def test_videos_move(found: dict[str, Any]) -> None:
    assert "data:image/gif;base64," in page(found, grid(frames=3)) and "data:image/png" in page(found, grid())


def test_a_person_can_use_the_page(browser: Any, tmp_path: Path, found: dict[str, Any]) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    path = tmp_path / "search.html"
    path.write_text(page(found, grid()), encoding="utf-8")
    browser.get(path.as_uri())
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    assert all(one.get_attribute("aria-label") for one in browser.find_elements(By.TAG_NAME, "svg"))
    loaded = "return [...document.images].every(one => one.complete && one.naturalWidth > 0)"
    assert browser.execute_script(loaded) and len(browser.find_elements(By.TAG_NAME, "img")) == 3
    for summary in browser.find_elements(By.CSS_SELECTOR, ".part > summary"):
        summary.click()
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    map_, cell = browser.find_element(By.CSS_SELECTOR, ".map svg"), browser.find_element(By.ID, "cell")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", map_)
    scores = {(layer, head): score for layer, head, score in found["rounds"][0]["scores"]}
    layers = list(found["layers"])
    map_.send_keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    title, shown = cell.text.split(", ", 1)
    assert title == "Round 1: score of the set with each head" and shown.startswith(f"{layers[1]}, head 1: ")
    value = scores.get((layers[1], 1))
    assert shown.endswith("no value") if value is None else float(shown.rsplit(" ", 1)[1]) == float(f"{value:.3g}")
    assert browser.get_log("browser") == []
