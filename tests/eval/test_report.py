"""The page of a comparison: true to the figures, complete without network, and usable in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dit_attn.eval import report

LABELS = ("dense", "sparse:density=0.5", "<b>odd & name</b>")
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")


def figure(value: float, spread: float = 0.1) -> dict[str, Any]:
    return {"value": value, "ci95": [value - spread, value + spread], "n": 4}


def row(label: str, speed: float, whole: float, change: float) -> dict[str, Any]:
    verifier = {"whole": figure(whole, 0.0), "change": figure(change), "attributes": figure(whole, 0.0), "by": {}}
    empty = {"psnr": None, "seconds": figure(2.0 / speed), "attention_flops": figure(0.5, 0.0)}
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
            verdict = {"shape": i == 0, "colour": True}
            item = {"variant": label, "index": index, "prompt": "a red circle", "seed": 40 + index}
            takes.append({**item, "error": error, "file": None if error else name, "verdict": verdict})
    return {
        "model": {"model": "tiny"}, "items": 2, "device": "cpu", "environment": {"hardware": "a CPU"}, "versions": {},
        "commit": "abc", "command": "dit-attn compare --prompt 'a < b'", "takes": takes,
        "headline": [row(LABELS[0], 1.0, 1.0, 0.0), row(LABELS[1], 1.6, 0.5, -0.5), row(LABELS[2], 0.7, 1.0, 0.02)],
    }  # fmt: skip


def make(path: Path, grey: int) -> None:
    if path.suffix == ".png":
        Image.new("RGB", (32, 32), (grey, 0, 0)).save(path)
        return
    import imageio

    frames = [np.full((32, 32, 3), grey + 4 * t, dtype=np.uint8) for t in range(16)]
    imageio.mimwrite(path, frames, fps=8, macro_block_size=1)


def test_the_page_says_what_the_figures_say_and_needs_nothing_else(tmp_path: Path) -> None:
    page = report.write_report(comparison(tmp_path), tmp_path).read_text()
    text = re.sub(r"<[^>]+>", "", page)
    assert "sparse:density=0.5 is 1.60x as fast as dense, computes 50% of the attention" in text
    assert "meets the prompt 50 points less often than dense." in text
    assert "slower than dense (0.70x)" in text and "2 points more often than dense (within the noise)" in text
    assert "1 files could not be made" in text
    assert "<b>odd" not in page and "&lt;b&gt;odd &amp; name" in page and "a &lt; b" in page
    assert not re.search(r"(?:src|href)=\"(?!data:)", page) and "http" not in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S).group(1))  # type: ignore[union-attr]
    assert [set(item["files"]) for item in data["items"]] == [set(LABELS), set(LABELS[:2])]
    assert [data["items"][0]["files"][label]["wrong"] for label in LABELS[:2]] == [[], ["shape"]]


def test_a_page_that_would_be_too_large_links_to_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "LARGEST", 10)
    page = report.write_report(comparison(tmp_path), tmp_path, show=1).read_text()
    assert '"src": "0/0.png"' in page and "1 of 2 items are shown" in page


def test_figures_that_do_not_exist_leave_no_hole(tmp_path: Path) -> None:
    results = comparison(tmp_path)
    for one in results["headline"]:
        one["verifier"] = None
    page = report.write_report(results, tmp_path).read_text()
    assert "SSIM to dense" in page and "prompt met" not in page and "PSNR" not in page
    assert "a similarity (SSIM) of 0.900 to dense" in page


@pytest.fixture(params=((1280, 900), (390, 844)), ids=("desktop", "phone"))
def browser(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A headless Chromium at two widths."""
    webdriver = pytest.importorskip("selenium.webdriver")
    if BROWSER is None or DRIVER is None:
        pytest.skip("no chromium and chromedriver on this machine")
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.add_experimental_option("mobileEmulation", {"deviceMetrics": dict(zip(("width", "height"), request.param))})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


def test_a_person_can_use_the_page(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys
    from selenium.webdriver.support.ui import Select

    browser.get(report.write_report(comparison(tmp_path), tmp_path).as_uri())
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    pictures = browser.find_elements(By.TAG_NAME, "img")
    assert len(pictures) == 7 and all("a red circle, seed" in picture.get_attribute("alt") for picture in pictures)
    over = browser.find_element(By.CSS_SELECTOR, "#stage .over")
    before = over.value_of_css_property("clip-path")
    slider = browser.find_element(By.ID, "slider")
    slider.send_keys(Keys.ARROW_LEFT * 10)  # keyboard
    assert over.value_of_css_property("clip-path") != before and slider.get_attribute("value") == "40"
    Select(browser.find_element(By.ID, "variant")).select_by_visible_text(LABELS[2])
    assert browser.find_element(By.ID, "other").text == LABELS[2]
    Select(browser.find_element(By.ID, "item")).select_by_index(1)
    assert browser.find_element(By.ID, "stage").text == "This item was not made by both."
    assert browser.get_log("browser") == []


def test_clips_play_together(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser.get(report.write_report(comparison(tmp_path, ".mp4"), tmp_path).as_uri())
    times = "return [...document.querySelectorAll('#stage video')].map(clip => clip.currentTime)"
    WebDriverWait(browser, 20).until(lambda driver: min(driver.execute_script(times)) > 0.2)
    browser.find_element(By.ID, "play").click()
    first, second = browser.execute_script(times)
    assert abs(first - second) < 0.7  # within one round of keeping time
    assert browser.execute_script("return [...document.querySelectorAll('video')].every(clip => clip.paused)")
    assert browser.get_log("browser") == []
