"""``dit-attn search`` from the command line: its files, its page, going on after a stop, and what it refuses."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dit_attn.pipelines.head_search import pipeline_runner
from tests.cli.conftest import FAST

QUICK = (*FAST, "--rounds", "1", "--per-round", "1", "--pairs", "2", "--controls", "0", "--objective", "verifier")


@pytest.fixture
def search(cli: Any) -> Any:
    """``search(...)`` on the embedded image model, as small and fast as it goes."""
    return lambda *words: cli("search", "--model", "tiny-image", *words)


class Pictures(HTMLParser):
    """Collects the pictures and figures of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.pictures: list[dict[str, str | None]] = []
        self.drawings: list[dict[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in ("img", "svg"):
            (self.pictures if tag == "img" else self.drawings).append(dict(attrs))


def test_it_writes_heads_and_a_page_and_goes_on_after_a_stop(
    search: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*QUICK, "--batch", "1", "--output", "out")
    stock, calls = pipeline_runner.PipelineRunner.__call__, []

    def counting(*args: Any) -> Any:
        calls.append(args[1])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return stock(*args)

    monkeypatch.setattr(pipeline_runner.PipelineRunner, "__call__", counting)
    stopped = search(*words)
    assert stopped.code == 130 and "--resume" in stopped.err
    assert len((tmp_path / "out" / "evaluations.jsonl").read_text().splitlines()) == 1 + 4
    done = search(*words, "--resume")
    assert done.code == 0, done.err
    assert len(calls) == 5 + 12 * 2 - 4 + 2 + 4  # the rest, no guidance, and the pictures of the page
    found = json.loads((tmp_path / "out" / "heads.json").read_text())
    assert len(found["heads"]) == 1 and found["transformer"] == "PixArtTransformer2DModel"
    assert found["search"]["images"] == {"candidates": 24, "checks": 2} and found["search"]["command"]
    assert "Verdict: not checked." in done.out and "softpag --set heads" not in done.out  # no pair was held out
    page = (tmp_path / "out" / "search.html").read_text()
    seen = Pictures(page)
    assert len(seen.pictures) == 4 and all(one["alt"] and str(one["src"]).startswith("data:") for one in seen.pictures)
    assert len(seen.drawings) == 2 and all(one["aria-label"] and one["role"] == "img" for one in seen.drawings)
    assert not re.search(r"(src|href)=\"https?:", page) and "width=device-width" in page and "$" not in page
    again = search(*words, "--scale", "2", "--resume")
    again.refused("another model, method, prompts or settings")


def test_layers_are_shown_beside_the_heads_in_the_table_and_on_the_page(search: Any, tmp_path: Path) -> None:
    done = search(*QUICK, "--layers", "--pairs", "1", "--held-out", "1", "--output", "out")
    assert done.code == 0, done.err
    found = json.loads((tmp_path / "out" / "heads.json").read_text())
    name = found["search"]["best_layer"]["name"]
    page = (tmp_path / "out" / "search.html").read_text()
    for layer in range(6):
        assert f"\nlayer {layer} " in done.out and f'<th scope="row">layer {layer}</th>' in page
    assert f"heads over {name}, best when searched: " in done.out and f"All heads of {name}, the best layer" in page
    assert len(Pictures(page).pictures) == 3 and f"{name}: " in page  # none, heads, layer


def test_a_dry_run_states_the_cost(search: Any, tmp_path: Path) -> None:
    data = json.loads(search("--dry-run", "--json", "--strategy", "halving", "--pairs", "16", "--rounds", "1").out)
    assert (data["heads"], data["layers"], data["images_of_greedy"]) == (12, 6, 192)
    assert data["share_of_greedy"] < 1 and data["passes"] == round(data["share_of_greedy"] * 192 * 2 * 20)
    assert "transformer passes" in search("--dry-run").out
    more = json.loads(search("--dry-run", "--json", "--layers", "--pairs", "16", "--rounds", "1").out)
    assert more["check_images"] - data["check_images"] == 6 * 16
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--rounds", "5", "--dry-run"), ("5 rounds of 3", "12 heads")),
        (("--rounds", "0"), ("between 1 and",)),
        (("--objective", "beauty"), ("objective", "beauty")),
        (("--strategy", "luck"), ("strategy", "luck")),
        (("--objective", "pickscore"), ("pickscore needs its weights", "--weights DIR")),
        (("--objective", "aesthetic", "--weights", "."), ("--weights-head FILE",)),
        (("--objective", "pickscore", "--weights", "nowhere"), ("--weights nowhere", "no such folder")),
        (("--objective", "style"), ('--style "',)),
        (("--objective", "verifier", "--prompt", "a cat"), ("cannot be verified", "a cat")),
        (("--objective", "fid-world", "--prompt", "a cat", "--prompt", "a dog"), ("--reference DIR",)),
        (("--objective", "verifier", "--strategy", "gradient", "--rounds", "1"), ("can be differentiated",)),
        (("--pairs", "3", "--prompt", "a"), ("need 3 prompts", "there are 1")),
        (("--held-out", "1", "--prompt", "a"), ("there are 1",)),
        (("--u", "0"), ("--u must be above 0",)),
        (("--scale", "0"), ("--scale must be above 0",)),
        (("--scale", "-1"), ("between 0 and",)),
        (("--search-steps", "30"), ("more than the 20 --steps",)),
        (("--prompts", "nowhere.txt"), ("cannot read --prompts",)),
    ],
)
def test_bad_input_is_one_line(search: Any, words: tuple[str, ...], parts: tuple[str, ...]) -> None:
    search(*words).refused(*parts)


def test_a_model_that_is_not_embedded_needs_prompts(cli: Any, folder_model: Path) -> None:
    cli("search", "--model", str(folder_model)).refused("no prompt; give --prompt TEXT")
