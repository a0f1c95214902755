"""The page of a comparison: true to the figures, complete without network, and usable in a real browser."""

from __future__ import annotations

import json
import math
import re
from html import unescape
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dit_attn.eval.report import compare_page, heatmap, verdict
from dit_attn.eval.report.render import chunks

LABELS = ("dense", "sparse:density=0.5", "<b>odd & name</b>")


def figure(value: float, spread: float = 0.1) -> dict[str, Any]:
    return {"value": value, "ci95": [value - spread, value + spread], "n": 4}


def page(results: dict[str, Any], folder: Path, show: int = 24) -> Path:
    path = folder / "report.html"
    path.write_text(compare_page.page(results, folder, show), encoding="utf-8")
    return path


def maps(density: float, error: float) -> dict[str, Any]:
    """Two layers, three steps; one call was not made."""
    return {
        "layers": ["blocks.0", "blocks.1"], "steps": 3, "rows": 256, "prompt": "a <red> circle", "seed": 1,
        "seconds": 3.0, "density": [[1.0, density, density], [1.0, density, None]],
        "error": [[0.0, error / 2, error / 4], [0.0, error, None]],
    }  # fmt: skip


def row(label: str, speed: float, whole: float, change: float) -> dict[str, Any]:
    verifier = {"whole": figure(whole, 0.0), "change": figure(change), "attributes": figure(whole, 0.0), "by": {}}
    empty = {"psnr": None, "metrics": {}, "seconds": figure(2.0 / speed), "attention_flops": figure(0.5, 0.0),
             "items": 4, "equal": 0, "methods": [{"method": "block-sparse"}], "call": {}}  # fmt: skip
    return {"label": label, "speedup": figure(speed), "ssim": figure(0.9), "verifier": verifier, **empty}


def comparison(folder: Path, suffix: str = ".png") -> dict[str, Any]:
    """Results of two items by three competitors; one file could not be made."""
    takes = []
    for index in range(2):
        for i, label in enumerate(LABELS):
            name, error = f"{i}/{index}{suffix}", "RuntimeError: no memory" if (index, i) == (1, 2) else None
            (folder / str(i)).mkdir(parents=True, exist_ok=True)
            if error is None:
                make(folder / name, 60 * i + 60)
            verdict = {"shape": i == 0, "color": True}
            item = {"variant": label, "index": index, "prompt": "a red circle", "seed": 40 + index, "seconds": 2.0}
            takes.append({**item, "error": error, "file": None if error else name, "verdict": verdict})
    return {
        "model": {"model": "tiny"}, "items": 2, "device": "cpu", "environment": {"hardware": "a CPU"}, "versions": {},
        "commit": "abc", "command": "dit-attn compare --prompt 'a < b'", "takes": takes, "prompts": 1,
        "maps": {LABELS[1]: maps(0.5, 0.1), LABELS[2]: maps(0.25, 0.33)},
        "headline": [row(LABELS[0], 1.0, 1.0, 0.0), row(LABELS[1], 1.6, 0.5, -0.5), row(LABELS[2], 0.7, 1.0, 0.02)],
    }  # fmt: skip


def make(path: Path, gray: int) -> None:
    if path.suffix == ".png":
        Image.new("RGB", (32, 32), (gray, 0, 0)).save(path)
        return
    import imageio

    frames = [np.full((32, 32, 3), gray + 4 * t, dtype=np.uint8) for t in range(16)]
    imageio.mimwrite(path, frames, fps=8, macro_block_size=1)


def text_of(html: str) -> str:
    """The page's text."""
    return re.sub(r"\s+", " ", unescape(re.sub(r"<[^>]+>", "", html)))


def data_of(html: str) -> Any:
    """What the page's script draws."""
    return json.loads(re.search(r'id="data">(.*?)</script>', html, re.S).group(1))  # type: ignore[union-attr]


def test_the_page_says_what_the_figures_say_and_needs_nothing_else(tmp_path: Path) -> None:
    html = page(comparison(tmp_path), tmp_path).read_text()
    text = text_of(html)
    assert "1 files could not be made" in text
    assert "<b>odd" not in html and "&lt;b&gt;odd" in html and "a &lt; b" in html
    assert not re.search(r"(?:src|href)=\"(?!data:)", html) and "http" not in html
    data = data_of(html)
    assert [set(item["files"]) for item in data["items"]] == [set(LABELS), set(LABELS[:2])]
    assert [data["items"][0]["files"][label]["wrong"] for label in LABELS[:2]] == [[], ["shape"]]


def test_the_verdict_stands_first_and_is_that_of_the_rule(tmp_path: Path) -> None:
    results = comparison(tmp_path)
    results["prompts"] = 40
    for one in results["headline"]:
        one["verifier"]["change"]["n"] = one["verifier"]["whole"]["n"] = one["speedup"]["n"] = 40
    html = page(results, tmp_path).read_text()
    rows = results["headline"]
    found = verdict.verdicts(rows, 40)
    assert [one.chip for one in found] == ["no gain", "faster, loses quality"]
    chips = re.findall(r'<span class="chip (\w+)">(.*?)</span>', html)
    assert chips == [(one.kind, one.chip) for one in found]
    text = text_of(html)
    places = [
        text.index(part) for part in (verdict.headline(found, 40), *(one.sentence for one in found), "Dense and method")
    ]
    assert places == sorted(places)
    assert [one["label"] for one in data_of(html)["variants"]] == ["dense", *(one.label for one in found)]
    assert verdict.RULE in text  # folded, for those who want to know


def test_everything_below_the_images_is_folded(tmp_path: Path) -> None:
    html = page(comparison(tmp_path), tmp_path).read_text()
    below = html[html.index('id="stage"') :]
    assert below.count("<table") == 3 and below.count("data-values") == 4 and 'class="intervals"' in below
    for part in ("<table", "data-values", 'class="intervals"', "<dl>", "<pre>"):
        before = html[: html.index(part)]
        assert before.count("<details") > before.count("</details>"), part
    assert " open" not in html


def test_many_methods_are_folded_but_the_best(tmp_path: Path) -> None:
    results = comparison(tmp_path)
    results["headline"] += [{**results["headline"][2], "label": f"method {i}"} for i in range(9)]
    html = page(results, tmp_path).read_text()
    assert "<summary>5 more</summary>" in html and html.count('<span class="chip') == 11


def test_a_label_breaks_between_its_settings_only() -> None:
    assert chunks("call:guidance_scale=1 + softpag:heads=3,u=0.5") == [
        "call:", "guidance_scale=1", " + softpag:", "heads=3,", "u=0.5",
    ]  # fmt: skip
    assert chunks("attention computed, % of dense") == ["attention computed, % of dense"]


def test_the_intervals_are_those_of_the_verdicts_each_on_a_line_of_its_own(tmp_path: Path) -> None:
    results = comparison(tmp_path)
    assert "speed-up 1.60x (no interval)" in page(results, tmp_path).read_text()  # one prompt
    results["prompts"] = 4
    html = page(results, tmp_path).read_text()
    plot = html[html.index('class="intervals"') :]
    assert plot.count('class="spread"') == 4 and plot.count('class="interval-row"') == 2
    places = [float(x) for x in re.findall(r'class="mark" style="left:([\d.]+)%"', plot)]
    assert len(places) == 4 and places[0] == places[2] and places[1] == places[3]  # one line through all rows
    ticks = {text: float(x) for x, text in re.findall(r'<span style="left:([\d.]+)%">(.*?)</span>', plot)}
    assert ticks["1x"] == places[0] and ticks["0"] == places[1]
    speed = verdict.speed_estimate(results["headline"][1], 4)
    assert speed is not None
    ends = f"{math.exp(speed.low):.2f} to {math.exp(speed.high):.2f}"
    assert f"sparse:density=0.5: speed-up 1.60x ({ends})" in unescape(plot)


def test_a_page_that_would_be_too_large_links_to_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compare_page, "LARGEST", 10)
    html = page(comparison(tmp_path), tmp_path, show=1).read_text()
    assert '"src": "0/0.png"' in html and "1 of 2 items are shown" in html


def test_figures_that_do_not_exist_leave_no_hole(tmp_path: Path) -> None:
    results = comparison(tmp_path)
    for one in results["headline"]:
        one["verifier"] = None
    html = page(results, tmp_path).read_text()
    text = text_of(html.split("<script")[0])
    assert "SSIM to dense" in text and "PSNR" not in text and "prompt followed" not in text
    assert "SSIM 0.90 to dense" in text and "change in points" not in text


def test_metrics_of_networks_say_who_judged_how_many_and_why_there_is_none(tmp_path: Path) -> None:
    results = comparison(tmp_path)
    facts = {"label": "fid-world (world-clip, against dense)", "better": "lower"}
    none = {"value": None, "ci95": None, "n": 0, **facts}
    found = [
        {**none, "why": "dense is what the others are compared with"},
        {**figure(3.25), **facts, "caution": "4 images for 96 features: biased"},
        {**none, "n": 1, "why": "fid-world needs at least 2 items"},
    ]
    for one, score in zip(results["headline"], found, strict=True):
        one["metrics"] = {"fid-world": score}
    html = page(results, tmp_path).read_text()
    assert "FID-world to dense <small>lower is better</small>" in html and "3.25 <small>3.15 to 3.35" in html
    text = re.sub(r"<[^>]+>", "", html)
    assert "fid-world (world-clip, against dense), 4 items; 4 images for 96 features: biased." in text
    assert "no figure: fid-world needs at least 2 items." in text and "no figure: dense is what" not in text


def drawn_maps(html: str) -> list[tuple[str, list[list[float | None]], dict[tuple[int, int], str], list[str]]]:
    """(name, values, color by (row, column), column names) of every heat map of a page."""
    found = []
    for svg in re.findall(r"<svg [^>]*data-values.*?</svg>", html, re.S):
        name, columns, values = (
            unescape(re.search(rf'{key}="(.*?)"', svg).group(1))  # type: ignore[union-attr]
            for key in ("aria-label", "data-columns", "data-values")
        )
        colors = {
            (int(y), int(x)): color
            for color, path in re.findall(r'<path fill="(#\w+)" d="(.*?)"', svg)
            for x, y in re.findall(r"M(\d+) (\d+)h1v1h-1z", path)
        }
        found.append((name, json.loads(values), colors, json.loads(columns)))
    return found


def test_maps_share_one_scale_and_say_every_number(tmp_path: Path) -> None:
    html = page(comparison(tmp_path), tmp_path).read_text()
    found = drawn_maps(html)
    names = [name.split(":")[0] for name, *_ in found]
    assert names == [
        "Attention computed, sparse", "Attention computed, <b>odd & name</b>",
        "Error of the result, sparse", "Error of the result, <b>odd & name</b>",
    ]  # fmt: skip
    assert [values for _, values, *_ in found] == [
        [[1.0, 0.5, 0.5], [1.0, 0.5, None]], [[1.0, 0.25, 0.25], [1.0, 0.25, None]],
        [[0.0, 0.05, 0.025], [0.0, 0.1, None]], [[0.0, 0.165, 0.0825], [0.0, 0.33, None]],
    ]  # fmt: skip
    small, large = found[2][2], found[3][2]
    assert small[1, 1] == heatmap.level_color(0.1, 0.0, 0.4) and large[1, 1] == heatmap.level_color(0.33, 0.0, 0.4)
    assert (1, 2) not in small and len(small) == 5  # a call that was not made has no color
    assert "<span>0</span>" in html and "<span>0.4</span>" in html  # 0.4 ends both
    text = unescape(re.sub(r"<[^>]+>", "", html))
    assert "largest 0.33 in blocks.1, step 2" in text and "a <red> circle" in text
    assert "a &lt;red&gt; circle" in html
    assert "3.0 s an item with measuring, 2.0 s without" in html


def test_a_map_that_failed_or_was_not_wanted_is_said_or_left_out(tmp_path: Path) -> None:
    results = comparison(tmp_path)
    results["maps"] = {LABELS[1]: {"failed": "RuntimeError: no memory"}}
    assert "No map of sparse:density=0.5: RuntimeError: no memory." in page(results, tmp_path).read_text()
    results["maps"] = {}
    assert "Layer by step" not in page(results, tmp_path).read_text()


def test_many_steps_share_cells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heatmap, "MOST_CELLS", 4)
    results = comparison(tmp_path)
    results["maps"], results["takes"] = {"a": maps(0.5, 0.1)}, []
    html = page(results, tmp_path).read_text()
    _, values, _, columns = drawn_maps(html)[0]
    assert columns == ["step 1 to step 2", "step 3"] and values[0] == [0.75, 0.5] and "not timed" in html


def test_text_of_a_run_is_never_markup(tmp_path: Path) -> None:
    attack = "</script><script>alert(1)</script><img src=x onerror=alert(2)>'\""
    results = comparison(tmp_path)
    results["command"] = results["model"]["model"] = results["environment"]["hardware"] = attack
    for one in results["takes"]:
        one["prompt"] = attack
    for one in results["maps"].values():
        one["prompt"], one["layers"] = attack, [attack, "blocks.1"]
    html = page(results, tmp_path).read_text()
    assert "<script>alert" not in html and "<img src=x" not in html
    assert len(re.findall(r"<script", html)) == 2 == html.count("</script>")
    data = data_of(html)
    assert data["items"][0]["prompt"] == attack


def test_a_person_can_use_the_page(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    browser.get(page(comparison(tmp_path), tmp_path).as_uri())
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    images = browser.find_elements(By.TAG_NAME, "img")
    assert len(images) == 5 and all("a red circle, seed" in image.get_attribute("alt") for image in images)
    for summary in browser.find_elements(By.CSS_SELECTOR, ".part > summary"):
        summary.click()
    assert len(browser.find_elements(By.CSS_SELECTOR, "#items img")) == 5
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    scrolls = "return [...document.querySelectorAll('.scroll')].every(one => one.scrollWidth <= one.clientWidth)"
    assert browser.execute_script(scrolls)  # tables fit the width; on a phone they are cards
    over = browser.find_element(By.CSS_SELECTOR, "#stage .over")
    before = over.value_of_css_property("clip-path")
    slider = browser.find_element(By.ID, "slider")
    slider.send_keys(Keys.ARROW_LEFT * 10)  # keyboard
    assert over.value_of_css_property("clip-path") != before and slider.get_attribute("value") == "40"
    other, buttons = browser.find_element(By.ID, "other"), browser.find_elements(By.CSS_SELECTOR, "#row button")
    first = other.text
    buttons[1].click()
    assert {first, other.text} == set(LABELS[1:])
    Select(browser.find_element(By.ID, "variant")).select_by_visible_text(LABELS[2])
    assert other.text == LABELS[2]
    Select(browser.find_element(By.ID, "item")).select_by_index(1)
    assert browser.find_element(By.ID, "stage").text == "This item was not made by both."
    map_, cell = browser.find_element(By.CSS_SELECTOR, ".map svg"), browser.find_element(By.ID, "cell")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", map_)
    above = -(map_.size["height"] // 4)  # the middle of the second step of the first layer
    ActionChains(browser).move_to_element_with_offset(map_, 0, above).click().perform()
    assert cell.text == "sparse:density=0.5, blocks.0, step 2: 0.5"
    map_.send_keys(Keys.ARROW_DOWN, Keys.ARROW_RIGHT)
    assert cell.text == "sparse:density=0.5, blocks.1, step 3: no value" and cell.is_displayed()
    assert all(chart.get_attribute("aria-label") for chart in browser.find_elements(By.TAG_NAME, "svg"))
    assert browser.get_log("browser") == []


def test_videos_play_together(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(page(comparison(tmp_path, ".mp4"), tmp_path).as_uri())
    times = "return [...document.querySelectorAll('.pair video')].map(video => video.currentTime)"
    WebDriverWait(browser, 20).until(lambda driver: min(driver.execute_script(times)) > 0.2)
    browser.find_element(By.ID, "play").click()
    shown = browser.execute_script(times)
    assert len(shown) == 5 and max(shown) - min(shown) < 0.7  # within one round of keeping time
    assert browser.execute_script("return [...document.querySelectorAll('video')].every(video => video.paused)")
    assert browser.get_log("browser") == []
