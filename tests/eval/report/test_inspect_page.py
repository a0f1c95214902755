"""The page of an inspection: true to the tensors, complete without network, and usable in a real browser."""

from __future__ import annotations

import json
import re
from html import escape, unescape
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_attn.eval import attention_stats as stats
from dit_attn.eval.report.density_advice import density_advice
from dit_attn.eval.report.inspect_page import page

NAMES = (*stats.STATISTICS, "mass.text", "mass.video")


def inspection(branches: tuple[str, ...] = ("cond", "uncond"), grid: tuple[int, ...] | None = (3, 4, 4)) -> Any:
    """Facts and tensors of two layers, three steps and two heads; one call was not made."""
    torch.manual_seed(0)
    tensors = {name: torch.rand(len(branches), 2, 3, 2) for name in NAMES}
    for tensor in tensors.values():
        tensor[0, 1, 2] = torch.nan
    parts = (("text", 0, 16, None), ("video", 16, 64, grid))
    spans = [dict(zip(("kind", "start", "stop", "grid"), part)) for part in parts]
    uniform = {"dt": 0.5, "dh": 1.25, "dw": 1.25}
    return {
        "model": "tiny <b>", "prompt": "a <red> circle", "noise_seed": 3, "rows": 64, "block": 64, "seed": 0,
        "calls": 12, "skipped": {"causal attention": 2}, "command": "dit-attn inspect --prompt 'a < b'",
        "axes": {"branch": list(branches), "layer": ["blocks.0", "blocks.<1>"],
                 "step": [f"step {i}" for i in (1, 2, 3)], "head": ["head 1", "head 2"]},
        "sequences": [{"seq_len": 64, "spans": spans, "grid": grid, "uniform_distance": uniform if grid else None}],
        "timing": {"plain_seconds": 2.0, "observed_seconds": 2.5, "watching_seconds": 0.4, "overhead": 0.25,
                   "unchanged": True},
    }, tensors  # fmt: skip


def words(html: str) -> str:
    """The page's text."""
    return unescape(re.sub(r"<[^>]+>", "", html))


def test_the_page_says_what_the_figures_say_and_needs_nothing_else() -> None:
    meta, tensors = inspection()
    html = page(meta, tensors)
    text = words(html)
    assert f"in {100 * float(tensors['blocks_90'].nanmean()):.0f} % of the 64-token key blocks" in text
    assert "Measuring cost 25 % (2.5 s against 2.0 s plain) and left the same result bit for bit." in text
    assert "2 of 12 calls were not measured: causal attention." in text
    assert f"The prompt's tokens get {100 * float(tensors['mass.text'].nanmean()):.0f} % of the mass." in text
    assert "Uniform attention would give 0.333." in text and "Uniform attention would give 0.25." in text
    assert "<red>" not in html and "<b>:" not in html and "a &lt; b" in html
    assert not re.search(r"(?:src|href)=\"(?!data:|#)", html) and "http" not in html


def test_the_density_to_set_stands_first_and_every_layer_has_its_own() -> None:
    meta, tensors = inspection()
    html = page(meta, tensors)
    advice = density_advice(meta, tensors)
    text = words(html)
    assert advice is not None and text.index(advice.sentence) < text.index(advice.detail) < text.index("softmax mass")
    bars = re.findall(r'<span class="name">(.*?)</span>.*?width:(\d+)%.*?<span class="amount">([\d.]+)</span>', html)
    wanted = [(escape(name), f"{100 * x:.0f}", f"{x:.2f}") for name, x in advice.layers.items()]
    assert bars == wanted


def test_the_item_is_on_the_page(tmp_path: Path) -> None:
    meta, tensors = inspection()
    assert "<video" not in page(meta, tensors, tmp_path) and "<img" not in page(meta, tensors)
    (tmp_path / "item.mp4").write_bytes(b"film")
    meta["file"] = "../somewhere/item.mp4"  # only the name counts
    html = page(meta, tensors, tmp_path)
    assert 'src="data:video/mp4;base64,ZmlsbQ=="' in html and "a &lt;red&gt; circle, seed 3" in html
    (tmp_path / "item.png").write_bytes(b"image")
    assert "data:image/png;base64,aW1hZ2U=" in page({**meta, "file": "item.png"}, tensors, tmp_path)


def test_the_versions_stand_there_once_and_folded() -> None:
    meta, tensors = inspection()
    meta |= {"environment": {"torch": "9.8.7", "hardware": "a CPU"}, "versions": {"torch": "9.8.7", "diffusers": "6"}}
    html = page(meta, tensors)
    assert html.count("9.8.7") == 1 and html.index("<summary>How it was made") < html.index("9.8.7")


def test_every_statistic_has_a_sentence_and_a_map_for_each_branch_and_the_heads() -> None:
    meta, tensors = inspection()
    html = page(meta, tensors)
    for name in NAMES:
        about = stats.describe(name)
        assert words(html).count(about.reading) == 1, name
        labels = re.findall(rf'aria-label="{re.escape(about.title)}, layer by ([^:]*):', html)
        assert labels == ["step, with the prompt", "step, without the prompt", "head"], name


def test_maps_hold_the_means_of_the_tensors() -> None:
    meta, tensors = inspection()
    html = unescape(page(meta, tensors))
    found = [json.loads(text) for text in re.findall(r'data-values="(\[\[.*?\]\])"', html)]
    first, second, heads = found[:3]
    wanted = tensors["keys_90"]
    torch.testing.assert_close(torch.tensor(second), wanted[1].mean(-1), atol=1e-3, rtol=5e-3)
    assert first[1][2] is None and first[0][0] == pytest.approx(float(wanted[0, 0, 0].mean()), rel=5e-3)
    torch.testing.assert_close(torch.tensor(heads), wanted.nanmean((0, 2)), atol=1e-3, rtol=5e-3)


def test_a_run_without_guidance_grid_or_plain_run_leaves_no_hole() -> None:
    meta, tensors = inspection(("cond",), None)
    meta["timing"] |= {"plain_seconds": None, "overhead": None, "unchanged": None}
    meta["sequences"] = []
    small = {name: tensors[name] for name in NAMES if name not in ("dt", "dh", "dw", "same_frame", "mass.text")}
    html = page(meta, small)
    assert "own frame" not in html and "there is no text mass" in html and "parts unknown" in html
    assert "layer by step:" in html and "with the prompt" not in html
    assert "The measured run took 2.5 s, 0.4 s of it in the measurements." in html


def test_a_page_of_a_large_model_stays_small() -> None:
    meta, _ = inspection()
    sizes = {"layer": 40, "step": 50, "head": 40}
    meta["axes"] |= {axis: [f"{axis} {i + 1}" for i in range(size)] for axis, size in sizes.items()}
    tensors = {name: torch.rand(2, 40, 50, 40) for name in NAMES}
    assert len(page(meta, tensors)) < 5 << 20


def test_a_person_can_use_the_page(browser: Any, tmp_path: Path) -> None:
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

    meta, tensors = inspection()
    path = tmp_path / "inspect.html"
    path.write_text(page(meta, tensors), encoding="utf-8")
    browser.get(path.as_uri())
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollHeight <= 3 * innerHeight")
    for summary in browser.find_elements(By.CSS_SELECTOR, ".part > summary"):
        summary.click()
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    drawings = browser.find_elements(By.TAG_NAME, "svg")
    assert len(drawings) == 1 + 3 * len(NAMES) and all(one.get_attribute("aria-label") for one in drawings)
    map_, cell = drawings[1], browser.find_element(By.ID, "cell")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", map_)
    below = map_.size["height"] // 4  # the middle of the second step of the second layer
    ActionChains(browser).move_to_element_with_offset(map_, 0, below).click().perform()
    title, value = "Density for mass 0.9, layer by step, with the prompt", float(tensors["keys_90"][0, 1, 1].mean())
    assert cell.text == f"{title}, blocks.<1>, step 2: {float(f'{value:.3g}'):g}"
    map_.send_keys(Keys.ARROW_RIGHT)
    assert cell.text.endswith("blocks.<1>, step 3: no value")
    map_.send_keys(Keys.ARROW_UP * 3)
    assert "blocks.0, step 3: 0." in cell.text and cell.is_displayed()
    assert browser.get_log("browser") == []
