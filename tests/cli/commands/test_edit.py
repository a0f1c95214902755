"""``dit-attn edit``: images in, changed images out, on tiny random editing pipelines; bad input in one line."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from dit_attn import SaaS, enable, summary
from dit_attn.cli import edit_inputs, jobs, load_pipeline, main, runner
from dit_attn.errors import DitAttnError
from tests._support.edit_pipelines import IMAGE, editing
from tests._support.prompted_pipelines import fill
from tests.families.test_omnigen import TestOmniGen as OmniGenCase

INSTRUCTION = "a red square, and a square"


@pytest.fixture(scope="module")
def omnigen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny OmniGen, as `from_pretrained` takes it."""
    pipe, _ = OmniGenCase().pipeline()
    fill(pipe.transformer)
    folder = tmp_path_factory.mktemp("omnigen")
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "in.png"
    IMAGE.save(path)
    return path


def test_an_image_is_edited_with_and_without_saas_and_the_pieces_are_reported(
    omnigen: Path, image: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    command = ["edit", "--model", str(omnigen), "--image", str(image), "--instruction", INSTRUCTION, "--steps", "2"]
    command += ["--height", "288", "--width", "256", "--output", str(out)]
    settings = "saas:min_quality=0,first_layer=0.0,stop=1.0,rival=reference"
    assert main([*command, "--method", settings]) == 0
    (file,) = out.glob("0000*.png")
    with Image.open(file) as made:
        assert made.size == (256, 288)
    side = json.loads(file.with_suffix(".json").read_text())
    assert side["prompt"] == f"<img><|image_1|></img> {INSTRUCTION}" and side["call"]["input_images"] == [str(image)]
    traces = side["summary"]["reports"]["saas"]["traces"]
    assert [trace["piece"] for trace in traces] == ["a red square", "a square"]
    assert all(trace["rivals"][0] > 0.0 for trace in traces)
    assert "pieces of the prompt, means over the steps" in (out / "subjects.html").read_text()
    assert "lifted" in capsys.readouterr().out
    assert main([*command, "--resume"]) == 0 and len(list(out.glob("*.png"))) == 2  # without a method: another item


def test_a_missing_torchvision_is_named_before_weights_are_loaded(
    omnigen: Path, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(load_pipeline, "load_pipeline", None)
    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "torchvision" else original(name, *rest)
    )
    command = ["edit", "--model", str(omnigen), "--image", str(image), "--instruction", INSTRUCTION]
    assert main([*command, "--output", str(tmp_path / "out")]) == 2
    assert "OmniGenPipeline needs torchvision, which is not installed: pip install" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["kontext", "qwen-image-edit", "qwen-image-edit-plus", "omnigen"])
def test_every_editing_pipeline_gets_its_image_and_follows_it(
    name: str, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, kwargs = editing(name, monkeypatch)
    call = {key: value for key, value in kwargs.items() if key not in ("image", "input_images")}
    other = tmp_path / "other.png"
    Image.new("RGB", IMAGE.size, "red").save(other)
    seen = []
    for path in (image, other):
        job = jobs.Job(0, "a red cube, and a green tree", 0, {**call, "image": str(path), "num_inference_steps": 2})
        job = edit_inputs.for_pipeline(job, type(pipe))
        enable(pipe, SaaS(observe=True, first_layer=0.0, stop=1.0, rival="reference"))
        seen.append(runner.call_pipeline(pipe, job)[0].frames)
        assert [trace.piece for trace in summary(pipe).reports["saas"].traces] == ["a red cube", "a green tree"]
    assert (seen[0] != seen[1]).any()


@pytest.mark.parametrize("name", ["qwen-image-edit-plus", "omnigen"])
def test_a_pipeline_that_takes_several_images_follows_each(
    name: str, image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe, kwargs = editing(name, monkeypatch)
    call = {key: value for key, value in kwargs.items() if key not in ("image", "input_images")}
    paths = [tmp_path / "red.png", tmp_path / "green.png"]
    for path in paths:
        Image.new("RGB", IMAGE.size, path.stem).save(path)
    seen = []
    for second in paths:
        given = {**call, "image": [str(image), str(second)], "num_inference_steps": 2}
        job = edit_inputs.for_pipeline(jobs.Job(0, "a red cube", 0, given), type(pipe))
        seen.append(runner.call_pipeline(pipe, job)[0].frames)
    assert (seen[0] != seen[1]).any()


def test_a_list_of_images_is_for_pipelines_that_read_it_as_one_prompt_s() -> None:
    import diffusers

    assert all(hasattr(diffusers, name) for name in edit_inputs.TAKE_SEVERAL)
    job = jobs.Job(0, "a red cube", 0, {"image": ["a.png", "b.png"]})
    assert edit_inputs.for_pipeline(job, diffusers.QwenImageEditPlusPipeline) == job
    listed = edit_inputs.for_pipeline(job, diffusers.OmniGenPipeline)
    assert listed.prompt == "<img><|image_1|></img><img><|image_2|></img> a red cube"
    assert listed.call == {"input_images": ["a.png", "b.png"]}
    with pytest.raises(DitAttnError, match="FluxKontextPipeline takes one input image, got 2; give one"):
        edit_inputs.for_pipeline(job, diffusers.FluxKontextPipeline)


def test_a_line_of_a_file_names_several_images_from_its_folder(image: Path, tmp_path: Path) -> None:
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"prompt": "make it red", "image": ["in.png", str(image)]}))
    (made,) = jobs.make_jobs({"prompts": str(lines)}, {})
    assert made.call["image"] == [str(image), str(image)]


def test_pieces_by_their_characters_need_the_image_in_the_prompt() -> None:
    pipeline = type("Listed", (), {"__call__": lambda self, prompt, input_images=None: None})
    job = jobs.Job(0, "a red cube", 0, {"image": "in.png"})
    assert edit_inputs.for_pipeline(job, pipeline).call == {"input_images": ["in.png"]}
    with pytest.raises(DitAttnError, match="pieces are given by their characters"):
        edit_inputs.for_pipeline(job, pipeline, ranges=True)
    written = jobs.Job(0, "<img><|image_1|></img> a cube", 0, job.call)
    assert edit_inputs.for_pipeline(written, pipeline, ranges=True).prompt == written.prompt


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["--image", "IMAGE"], "no instruction; give --instruction TEXT"),
        (["--instruction", "x"], "no image to change; give --image FILE"),
        (["--image", "missing.png", "--instruction", "x"], "there is no such file"),
        (["--image", "TEXT", "--instruction", "x"], "is not a readable image"),
        (["--image", "IMAGE", "--instruction", " "], "--instruction: the prompt is empty"),
        (["--prompts", "LINES"], "line 1); give --image FILE, or an image in every line"),
        (["--image", "IMAGE", "--instruction", "x"], "takes no input image, so that it cannot edit one"),
    ],
)
def test_bad_input_is_one_line_and_loads_nothing(
    words: list[str], problem: str, image: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load_pipeline, "load_pipeline", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    files = {"IMAGE": image, "TEXT": tmp_path / "text.png", "LINES": tmp_path / "lines.jsonl"}
    files["TEXT"].write_text("no image")
    files["LINES"].write_text(json.dumps({"prompt": "make it red"}))
    given = [str(files.get(word, word)) for word in words]
    assert main(["edit", "--model", "tiny-joint", "--output", str(tmp_path / "out"), *given]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert problem in line
