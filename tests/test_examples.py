"""The examples run as they are on tiny random models: they write their output, attend sparsely and refuse mistakes."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import diffusers
import imageio.v3 as iio
import numpy as np
import pytest

import dit_attn
from tests._support import example_notebook

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "examples"
VIDEO, IMAGE = (13, 192, 256, 3), (512, 512, 3)
SCRIPTS = {  # what --tiny writes, and the default method
    "wan_text_to_video": (VIDEO, "re-ttention"),
    "flux_text_to_image": (IMAGE, "re-ttention"),
    "hunyuan_video": (VIDEO, "rectified-spaattn"),
    "wan_two_experts": (VIDEO, "rectified-spaattn"),
    "own_denoising_loop": (VIDEO, "re-ttention"),
}


@pytest.fixture(scope="module", autouse=True)
def libraries() -> None:
    """Load the pipelines before a test captures its output: libraries keep the stream that they find first."""
    for name in ("WanPipeline", "FluxPipeline", "HunyuanVideoPipeline"):
        assert getattr(diffusers, name)


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """Run a script in this process: its exit code, what it printed, its output file, the summaries it asked for."""
    summaries: list[Any] = []
    stock = dit_attn.summary

    def summary(target: Any) -> Any:
        summaries.append(stock(target))
        return summaries[-1]

    monkeypatch.setattr(dit_attn, "summary", summary)
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setitem(sys.modules, "tiny", None)  # put back, or taken out again, after the test
    del sys.modules["tiny"]

    def run(name: str, *options: str, output: Path | None = None) -> SimpleNamespace:
        summaries.clear()
        output = output or tmp_path / f"{name}{'.png' if SCRIPTS[name][0] == IMAGE else '.mp4'}"
        monkeypatch.setattr(sys, "argv", [f"{name}.py", "--output", str(output), *options])
        code = 0
        try:
            runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        except SystemExit as stop:
            code = stop.code
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err, output=output, summaries=list(summaries))

    return run


@pytest.mark.parametrize("name", SCRIPTS)
def test_writes_its_output_and_attends_sparsely(script: Any, name: str) -> None:
    run = script(name, "--tiny")
    assert run.code == 0
    written = np.asarray(iio.imread(run.output))
    shape, slug = SCRIPTS[name]
    assert written.shape == shape and written.std() > 1.0
    (summary,) = run.summaries
    assert [method["method"] for method in summary.methods] == [slug]
    assert summary.steps == 8 and summary.run_density < 0.95
    assert all(layer.density is not None for layer in summary.layers)
    before, after = run.out.index("visual tokens"), run.out.index(str(summary))  # explain, then summary
    assert before < after < run.out.index(str(run.output))


@pytest.mark.parametrize("name", ["flux_text_to_image", "own_denoising_loop"])
@pytest.mark.parametrize("slug", ["block-sparse", "softpag"])
def test_takes_any_method(script: Any, name: str, slug: str) -> None:
    run = script(name, "--tiny", "--method", slug)
    assert run.code == 0 and run.output.is_file()
    assert [method["method"] for method in run.summaries[0].methods] == [slug]


def test_own_loop_makes_the_video_of_the_pipeline(script: Any) -> None:
    stock, own = script("wan_text_to_video", "--tiny"), script("own_denoising_loop", "--tiny")
    assert np.array_equal(iio.imread(stock.output), iio.imread(own.output))
    (expected,), (found,) = stock.summaries, own.summaries
    assert (found.runs, found.steps, found.calls) == (1, 8, expected.calls)
    assert [layer.density for layer in found.layers] == [layer.density for layer in expected.layers]


def test_fine_tuning_writes_what_enable_takes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", ["finetune_sla.py", "--tiny", "--output", str(tmp_path)])
    runpy.run_path(str(EXAMPLES / "finetune_sla.py"), run_name="__main__")
    assert {"method", "transformer", "checkpoint.pt"} <= {path.name for path in tmp_path.iterdir()}
    assert "sla" in capsys.readouterr().out
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["finetune_sla.py"])
    with pytest.raises(SystemExit, match="no CUDA GPU here"):
        runpy.run_path(str(EXAMPLES / "finetune_sla.py"), run_name="__main__")


def test_pairs_are_made_of_folders(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ["--train-steps", "2", "--steps", "2", "--count", "2"]
    monkeypatch.setattr(sys, "argv", ["anomaly_pairs.py", "--tiny", "--output", str(tmp_path), *few])
    runpy.run_path(str(EXAMPLES / "anomaly_pairs.py"), run_name="__main__")
    assert f"pairs in {tmp_path / 'accepted'}" in capsys.readouterr().out
    assert {"manifest.jsonl", "summary.json", "concept"} <= {path.name for path in tmp_path.iterdir()}
    monkeypatch.setattr(sys, "argv", ["anomaly_pairs.py"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(EXAMPLES / "anomaly_pairs.py"), run_name="__main__")
    assert stop.value.code == 2 and "give --normal, --defects and --masks" in capsys.readouterr().err


def test_two_experts_with_one_method_share_a_schedule(script: Any) -> None:
    (summary,) = script("wan_two_experts", "--tiny").summaries
    used = {layer.name.split(".")[0] for layer in summary.layers if layer.calls}
    assert used == {"transformer", "transformer_2"}


def test_two_experts_with_a_method_each(script: Any) -> None:
    run = script("wan_two_experts", "--tiny", "--method-2", "block-sparse")
    assert [summary.methods[0]["method"] for summary in run.summaries] == ["rectified-spaattn", "block-sparse"]
    first, second = run.summaries
    assert second.steps == 8  # of the full run, although the second expert makes only the last of them
    assert first.calls + second.calls == 8 * 2 * 2  # steps, guidance branches, layers
    assert first.run_density < 1.0 and second.run_density < 1.0


def test_one_expert_may_stay_dense(script: Any) -> None:
    run = script("wan_two_experts", "--tiny", "--method", "none", "--method-2", "block-sparse")
    (summary,) = run.summaries
    assert "transformer:\nstock" in run.out and summary.run_density < 1.0
    neither = script("wan_two_experts", "--tiny", "--method", "none")
    assert neither.code == 2 and "give --method-2 a method" in one_line(neither)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_mistake_costs_one_line_and_exit_code_2(
    script: Any, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert "no CUDA GPU here" in one_line(script(name))  # cuda is the default, nothing is downloaded first
    assert "Did you mean 're-ttention'" in one_line(script(name, "--tiny", "--method", "re-tention"))
    (tmp_path / "file").touch()
    for place in (tmp_path / "absent" / "x.mp4", tmp_path / "file" / "x.mp4", tmp_path):
        assert "cannot be written" in one_line(script(name, "--tiny", output=place))
    (tmp_path / "empty").mkdir()
    for place in ("empty", "absent"):
        assert str(tmp_path / place) in one_line(script(name, "--model", str(tmp_path / place), "--device", "cpu"))


def test_runs_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(EXAMPLES / "wan_text_to_video.py"), "--tiny"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["wan.mp4"]


def test_the_page_names_every_example() -> None:
    page = (EXAMPLES / "README.md").read_text()
    named = set(re.findall(r"\]\(([^)#/]+)\)", page))
    assert named == {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".ipynb")}
    assert {path.stem for path in EXAMPLES.glob("*.py")} == {*SCRIPTS, "finetune_sla", "anomaly_pairs", "tiny"}


def test_the_notebook_runs_and_shows_what_it_says() -> None:
    stored = example_notebook.read()
    short = example_notebook.read()
    for cell in short.cells:
        cell.source = re.sub(r'("num_inference_steps": )\d+', r"\g<1>4", cell.source)  # what is shown stays the same
    with tempfile.TemporaryDirectory() as folder:  # sockets need a shorter path than pytest's
        fresh = example_notebook.execute(short, Path(folder))
    assert [kinds(cell) for cell in fresh.cells] == [kinds(cell) for cell in stored.cells]
    text = "".join(output.get("text", "") for cell in fresh.cells for output in cell.get("outputs", []))
    assert text.count("attention calls") == 2  # a summary of images, one of videos
    assert "block-sparse, density 0.25" in text and "SoftPAG" in text
    same = next(cell for cell in fresh.cells if "np.array_equal" in cell.source)
    assert same.outputs[-1]["data"]["text/plain"] == "True"


def test_the_stored_notebook_reads_well() -> None:
    notebook = example_notebook.read()
    assert example_notebook.NOTEBOOK.stat().st_size < 1 << 20
    assert not [cell.source for cell in notebook.cells if cell.cell_type == "code" and not cell.source.strip()]
    assert sum("image" in kinds(cell) for cell in notebook.cells) == 4
    prose = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    for path in re.findall(r"\]\((?!http)([^)#]+)", prose):
        assert (EXAMPLES / path).exists()


def kinds(cell: Any) -> list[str]:
    """What a cell shows: ``text``, ``value`` or ``image``; warnings of libraries do not count."""
    shown = [output for output in cell.get("outputs", []) if output.get("name") != "stderr"]
    each = ["image" if "image/png" in out.get("data", {}) else "value" if "data" in out else "text" for out in shown]
    return sorted(set(each))  # the kernel may print in one piece or several


def one_line(run: SimpleNamespace) -> str:
    """What a script that refused said, which must be one line."""
    said = run.err.splitlines()
    assert run.code == 2 and len(said) == 1 and said[0].startswith("error: "), (run.code, run.err)
    assert not run.summaries
    return said[0]
