"""``dit-attn inspect`` from the command line: its files, what it prints, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dit_attn.cli import runner
from dit_attn.eval.report.density_advice import density_advice
from dit_attn.pipelines.inspect.inspection import Inspection
from tests.cli.conftest import FAST

PROMPT = "a large red circle at the left on white"


@pytest.fixture
def look(cli: Any) -> Any:
    """``look(...)`` is `inspect` on the embedded image model, as small and fast as it goes."""
    return lambda *words: cli("inspect", "--model", "tiny-image", "--prompt", PROMPT, *FAST, *words)


def picture(folder: Path) -> np.ndarray:
    return np.asarray(Image.open(next(folder.glob("*.png"))))


def test_it_writes_the_item_the_numbers_and_the_page_and_says_what_watching_cost(look: Any, tmp_path: Path) -> None:
    done = look("--output", "out", "--rows", "16", "--steps", "2")
    assert done.code == 0, done.err
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"inspect.safetensors", "inspect.json", "inspect.html"} < names and len(names) == 5
    assert "Measuring cost" in done.out and "the same result bit for bit" in done.out
    assert "Block density for mass 0.9" in done.out and "out/inspect.html" in done.out
    found = Inspection.load(tmp_path / "out")
    meta = found.meta
    assert (meta["prompt"], meta["noise_seed"], meta["rows"], meta["model"]) == (PROMPT, 42, 16, "tiny-image")
    assert meta["command"].startswith("dit-attn inspect") and meta["versions"]["torch"] and meta["commit"]
    assert meta["axes"]["step"] == ["step 1", "step 2"] and meta["methods"] == []
    assert (tmp_path / "out" / meta["file"]).is_file()
    page = (tmp_path / "out" / "inspect.html").read_text()
    advice = density_advice(meta, found.tensors)
    assert advice is not None and advice.sentence in done.out and advice.sentence in page
    assert 'src="data:image/png;base64,' in page  # the item
    assert "tiny-image: what its attention does" in page and meta["command"].split()[0] in page


def test_the_item_is_that_of_generate(look: Any, image: Any, tmp_path: Path) -> None:
    assert look("--output", "watched", "--no-overhead").code == 0
    assert image("--prompt", PROMPT, "--output", "plain").code == 0
    assert np.array_equal(picture(tmp_path / "watched"), picture(tmp_path / "plain"))
    assert Inspection.load(tmp_path / "watched").meta["timing"]["overhead"] is None


def test_a_run_under_a_method_is_inspected_as_it_is(look: Any, tmp_path: Path) -> None:
    words = ("--method", "block-sparse", "--set", "density=0.25", "--set", "dense_steps=0", "--height", "128")
    done = look(*words, "--width", "128", "--output", "out", "--no-overhead")
    assert done.code == 0, done.err
    meta = Inspection.load(tmp_path / "out").meta
    assert [method["method"] for method in meta["methods"]] == ["block-sparse"]
    sidecar = json.loads((tmp_path / "out" / meta["file"]).with_suffix(".json").read_text())
    assert sidecar["summary"]["run_density"] < 0.6
    assert "run with block-sparse" in (tmp_path / "out" / "inspect.html").read_text()


def test_json_is_one_object_with_means_and_no_other_output(look: Any) -> None:
    done = look("--json", "--output", "out", "--no-overhead", "--block", "16", "--rows-seed", "3")
    data = json.loads(done.out)
    assert done.code == 0 and data["folder"] == "out" and data["block"] == 16 and data["seed"] == 3
    assert set(data["means"]) == set(data["statistics"]) and 0 < data["means"]["blocks_90"] <= 1


def test_a_dry_run_prints_the_plan_and_writes_nothing(look: Any, tmp_path: Path) -> None:
    done = look("--dry-run")
    assert done.code == 0 and "outputs/inspect-tiny-image" in done.out and "plain, then measured" in done.out
    data = json.loads(look("--dry-run", "--json", "--no-overhead", "--rows", "8").out)
    assert (data["rows"], data["runs"], data["item"]["prompt"]) == (8, 1, PROMPT)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--rows", "0"), ("between 1 and 4096", "0")),
        (("--rows", "many"), ("a whole number", "many")),
        (("--block", "-1"), ("between 1 and 4096",)),
        (("--prompt", "another"), ("one run", "one --prompt")),
        (("--method", "nope"), ("nope", "block-sparse")),
        (("--set", "density=0.5"), ("density=0.5", "--method")),
        (("--num-frames", "9"), ("num_frames",)),
        (("--output", "a-file"), ("a-file", "give a folder")),
        (("--device", "cuda:99"), ("cuda:99",)),
    ],
)
def test_bad_input_is_refused_in_one_line(look: Any, tmp_path: Path, words: tuple[str, ...], parts: Any) -> None:
    (tmp_path / "a-file").write_text("")
    look(*words).refused(*parts)


def test_no_prompt_and_no_model_are_refused(cli: Any) -> None:
    cli("inspect", "--model", "tiny-image").refused("no prompt", "--prompt")
    cli("inspect", "--prompt", PROMPT).refused("no model")


def test_a_failed_item_is_named_with_exit_code_1(look: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(pipe: Any, job: Any) -> Any:
        raise RuntimeError("no memory left\nmore")

    monkeypatch.setattr(runner, "call_pipeline", fail)
    done = look("--output", "out")
    assert done.code == 1 and done.err.strip().endswith("the item failed: RuntimeError: no memory left")
    assert list((tmp_path / "out").iterdir()) == []


def test_ctrl_c_leaves_nothing_behind(look: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stop(pipe: Any, job: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "call_pipeline", stop)
    done = look("--output", "out")
    assert done.code == 130 and "interrupted" in done.err and list((tmp_path / "out").iterdir()) == []
