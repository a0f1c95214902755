"""`generate` from end to end, on the embedded models."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit_attn.cli import runner
from dit_attn.errors import DitAttnError, RunStopped
from tests.cli.conftest import FAST


def sidecars(folder):
    return [json.loads(path.read_text()) for path in sorted(folder.glob("0*.json"))]


def test_an_image_a_sidecar_and_a_report_are_written(image, tmp_path):
    outcome = image("--prompt", "a red circle", "-o", "out")
    assert outcome.code == 0, outcome.err
    folder = tmp_path / "out"
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["0000_a-red-circle_s42.json", "0000_a-red-circle_s42.png", "run.json"]
    (sidecar,) = sidecars(folder)
    assert sidecar["prompt"] == "a red circle" and sidecar["seed"] == 42
    assert sidecar["size"] == [32, 32] and sidecar["kind"] == "image"
    assert sidecar["model"] == "tiny-image" and sidecar["methods"] == [] and sidecar["summary"] is None
    assert sidecar["versions"]["torch"] == torch.__version__.partition("+")[0] or sidecar["versions"]["torch"]
    assert "--prompt 'a red circle'" in sidecar["command"]
    text = Image.open(folder / sidecar["file"]).text
    assert text["prompt"] == "a red circle"
    assert json.loads(text["dit_attn"])["call"]["num_inference_steps"] == 1


def test_a_picture_is_what_the_stock_pipeline_makes(image, tmp_path):
    from dit_attn import models

    assert image("--prompt", "a red circle", "--seed", "3", "-o", "out").code == 0
    pipe = models.load("tiny-image")
    call = {**models.call_defaults("tiny-image"), "height": 32, "width": 32, "num_inference_steps": 1}
    expected = pipe("a red circle", generator=torch.Generator().manual_seed(3), **call).images[0]
    found = Image.open(tmp_path / "out/0000_a-red-circle_s3.png")
    np.testing.assert_array_equal(np.asarray(found), np.asarray(expected))


def test_a_method_is_on_the_pipeline_and_in_the_sidecar(cli, tmp_path):
    outcome = cli(
        *("generate", "--model", "tiny-image", "--prompt", "a red circle", "--steps", "2", "-o", "out"),
        *("--method", "block-sparse", "--set", "density=0.5", "--set", "dense_steps=1"),
    )
    assert outcome.code == 0, outcome.err
    assert "sparse calls     6 of 12 attention calls" in outcome.out
    (sidecar,) = sidecars(tmp_path / "out")
    assert sidecar["methods"][0]["density"] == 0.5 and sidecar["methods"][0]["q_block"] == 32
    assert sidecar["summary"]["sparse_calls"] == 6
    assert sidecar["summary"]["fallbacks"] == {"dense step": 6}


def test_a_video_is_an_mp4_with_a_strip_in_the_sheet(cli, tmp_path):
    outcome = cli(
        *("generate", "--model", "tiny-video", "--prompt", "a large purple circle moving left fast on black"),
        *("--steps", "1", "--fps", "5", "--contact-sheet", "-o", "out", "--method", "block-sparse"),
    )
    assert outcome.code == 0, outcome.err
    (sidecar,) = sidecars(tmp_path / "out")
    assert sidecar["file"].endswith("_s42.mp4") and sidecar["fps"] == 5
    assert sidecar["kind"] == "video" and sidecar["size"] == [9, 48, 48]
    assert Image.open(tmp_path / "out/sheet.png").width > 6 * 160


def test_an_image_becomes_a_video_where_the_pipeline_takes_one(cli, image_to_video_model, tmp_path):
    Image.new("RGB", (60, 50), "red").save(tmp_path / "start.png")
    words = ("generate", "--model", image_to_video_model, "--prompt", "a red square", "-o", "out", "--json")
    size = ("--height", "48", "--width", "48", "--num-frames", "8", "--steps", "1")
    outcome = cli(*words, *size, "--image", "start.png", "--pipeline-kwargs", '{"max_sequence_length": 16}')
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["done"] == 1 and report["items"][0]["file"].endswith(".mp4")


def test_a_row_with_a_good_image_and_a_mask_changes_what_the_mask_shows_alone(cli, flux_model, tmp_path):
    model = tmp_path / "inpaint"
    shutil.copytree(flux_model, model)
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps({**index, "_class_name": "FluxInpaintPipeline"}))
    (tmp_path / "rows").mkdir()
    Image.new("RGB", (32, 32), "red").save(tmp_path / "rows/good.png")
    mask = Image.new("L", (32, 32))
    mask.paste(255, (16, 0, 32, 32))
    mask.save(tmp_path / "rows/mask.png")
    row = 'a scratch,7,good.png,"{""mask_image"": ""mask.png"", ""strength"": 1.0, ""max_sequence_length"": 16}"'
    (tmp_path / "rows/defects.csv").write_text(f"prompt,seed,image,pipeline_kwargs\n{row}\n")
    words = ("generate", "--model", model, "--prompts", "rows/defects.csv", "--height", "32", "--width", "32")
    outcome = cli(*words, "--steps", "2", "--method", "rectified-spaattn", "-o", "out")
    assert outcome.code == 0, outcome.err
    (sidecar,) = sidecars(tmp_path / "out")
    assert sidecar["seed"] == 7 and sidecar["call"]["mask_image"] == str(Path("rows/mask.png"))
    painted = np.asarray(Image.open(tmp_path / "out" / sidecar["file"]).convert("RGB")).astype(int)
    good = np.asarray(Image.open(tmp_path / "rows/good.png")).astype(int)
    assert abs(painted - good)[:, :16].max() <= 2 < abs(painted - good)[:, 16:].mean()


def test_an_adapter_changes_the_output_with_its_scale(cli, tmp_path):
    peft = pytest.importorskip("peft")
    from dit_attn import models

    torch.manual_seed(0)
    pipe = models.load("tiny-video")
    pipe.transformer.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False))
    layers = peft.get_peft_model_state_dict(pipe.transformer)
    pipe.save_lora_weights(tmp_path / "adapter", transformer_lora_layers=layers)
    words = ("generate", "--model", "tiny-video", "--prompt", "x", "--steps", "1", "-o", "out")
    zero = json.dumps({"lora_id": str(tmp_path / "adapter"), "lora_scale": 0.0})
    for extra in ((), ("--lora", "adapter"), ("--lora", zero)):
        outcome = cli(*words, *extra)
        assert outcome.code == 0, outcome.err
    plain, full, none = (
        next(item["sha256"] for item in sidecars(tmp_path / "out") if test(item["lora"]))
        for test in (lambda x: not x, lambda x: x and x[0]["lora_scale"] == 1.0, lambda x: x and not x[0]["lora_scale"])
    )
    assert plain == none != full


def test_it_can_be_compiled_with_a_method_on_in_another_type(cli, tmp_path):
    outcome = cli(
        *("generate", "--model", "tiny-video", "--prompt", "x", "--steps", "1", "-o", "out", "--dtype", "bf16"),
        *("--method", "block-sparse", "--compile", '{"backend": "eager"}', "--vae-tiling", "--vae-slicing"),
    )
    assert outcome.code == 0, outcome.err
    (sidecar,) = sidecars(tmp_path / "out")
    assert sidecar["dtype"] == "bfloat16" and sidecar["summary"]["sparse_calls"] == 12


def test_a_local_folder_is_a_model(cli, folder_model, tmp_path):
    call = '{"use_resolution_binning": false, "max_sequence_length": 16}'
    outcome = cli("generate", "--model", folder_model, "--prompt", "x", "-o", "out", *FAST, "--pipeline-kwargs", call)
    assert outcome.code == 0, outcome.err
    assert sidecars(tmp_path / "out")[0]["model"] == str(folder_model)


def test_the_default_folder_names_model_and_method(image, tmp_path):
    assert image("--prompt", "x").code == 0
    assert (tmp_path / "outputs/tiny-image-dense/0000_x_s42.png").is_file()


def test_json_is_all_that_is_printed(image):
    report = json.loads(image("--prompt", "a", "--prompt", "b", "--json", "-o", "out").out)
    assert (report["done"], report["failed"]) == (2, 0)
    assert [item["seed"] for item in report["items"]] == [42, 43]


def test_progress_bars_are_silent_without_a_terminal(image):
    assert image("--prompt", "a", "--prompt", "b", "-o", "out").err == ""


def test_a_dry_run_makes_nothing(image, tmp_path):
    outcome = image("--prompt", "a", "--method", "block-sparse", "-o", "out", "--dry-run")
    assert outcome.code == 0
    assert "0000_a_s42" in outcome.out and '"density": 0.25' in outcome.out
    assert not (tmp_path / "out").exists()
    assert json.loads(image("--prompt", "a", "--dry-run", "--json").out)["items"][0]["prompt"] == "a"


def test_a_configuration_file_is_overruled_by_flags(cli, tmp_path):
    (tmp_path / "run.yaml").write_text(
        "model: tiny-image\nprompt: [one, two]\nsteps: 7\nmethod: block-sparse\nset: {density: 0.5}\n"
    )
    outcome = cli("generate", "--config", "run.yaml", "--steps", "1", "--prompt", "three", "--dry-run", "--json")
    plan = json.loads(outcome.out)
    assert [item["prompt"] for item in plan["items"]] == ["three"]
    assert plan["items"][0]["call"]["num_inference_steps"] == 1
    assert plan["methods"][0]["density"] == 0.5


def test_resume_makes_only_what_is_missing_or_changed(image, tmp_path, monkeypatch):
    made = []
    original = runner.call_pipeline
    monkeypatch.setattr(runner, "call_pipeline", lambda pipe, job: made.append(job.prompt) or original(pipe, job))
    words = ("--prompt", "a", "--prompt", "b", "-o", "out", "--resume")
    assert image(*words).code == 0
    (tmp_path / "out/0001_b_s43.png").write_bytes(b"cut short")
    made.clear()
    outcome = image(*words)
    assert (outcome.code, made) == (0, ["b"])
    assert "already there" in outcome.out
    made.clear()
    assert image(*words).code == 0 and made == []
    image(*words, "--guidance-scale", "3")
    assert made == ["a", "b"]


def test_other_settings_do_not_overwrite(image, tmp_path):
    assert image("--prompt", "a", "-o", "out").code == 0
    before = (tmp_path / "out/0000_a_s42.png").read_bytes()
    assert image("--prompt", "a", "-o", "out", "--guidance-scale", "7").code == 0
    assert (tmp_path / "out/0000_a_s42.png").read_bytes() == before
    assert len(sidecars(tmp_path / "out")) == 2


def test_one_failing_item_does_not_stop_the_others(image, monkeypatch, tmp_path):
    original = runner.call_pipeline

    def flaky(pipe, job):
        if job.prompt == "b":
            raise RuntimeError("kernel\nexploded")
        return original(pipe, job)

    monkeypatch.setattr(runner, "call_pipeline", flaky)
    outcome = image("--prompt", "a", "--prompt", "b", "--prompt", "c", "-o", "out")
    assert outcome.code == 1
    assert "1 of 3 items failed" in outcome.err and "RuntimeError: kernel" in outcome.err
    assert "Traceback" not in outcome.err
    assert sorted(path.name for path in (tmp_path / "out").glob("*.png")) == [
        "0000_a_s42.png",
        "0002_c_s44.png",
        "sheet.png",
    ]
    report = json.loads((tmp_path / "out/run.json").read_text())
    assert [item["status"] for item in report["items"]] == ["done", "failed", "done"]


def test_nan_is_reported_and_not_saved(cli, folder_model, tmp_path):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(folder_model, broken)
    weights = broken / "transformer/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    save_file({name: value * float("nan") if "proj_out" in name else value for name, value in tensors.items()}, weights)
    call = '{"use_resolution_binning": false, "max_sequence_length": 16}'
    outcome = cli("generate", "--model", broken, "--prompt", "x", "-o", "out", *FAST, "--pipeline-kwargs", call)
    assert outcome.code == 1
    assert "100.0 % of the output is NaN" in outcome.err
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["run.json"]


def test_ctrl_c_keeps_what_is_finished_and_says_how_to_go_on(image, monkeypatch, tmp_path):
    original = runner.save_item

    def interrupted(run, job, media, seconds):
        if job.index == 1:
            raise KeyboardInterrupt
        return original(run, job, media, seconds)

    monkeypatch.setattr(runner, "save_item", interrupted)
    outcome = image("--prompt", "a", "--prompt", "b", "-o", "out")
    assert outcome.code == 130
    assert "1 of 2 items" in outcome.err and "--resume" in outcome.err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0000_a_s42.json", "0000_a_s42.png"]


def test_a_real_ctrl_c_leaves_no_half_file(tmp_path):
    words = [sys.executable, "-m", "dit_attn", "generate", "--model", "tiny-image", *FAST, "-o", str(tmp_path)]
    process = subprocess.Popen(
        [*words, "--prompt", "a", "--num-images-per-prompt", "500"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # background jobs ignore it
    )
    assert process.stdout is not None
    process.stdout.readline()  # the first item is there
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
    pictures = {path.stem for path in tmp_path.glob("*.png")}
    assert pictures and not list(tmp_path.glob(".*"))
    for path in tmp_path.glob("*.png"):
        Image.open(path).load()
    assert {path.stem for path in tmp_path.glob("*.json")} - pictures == set()


def test_an_item_that_is_refused_is_named_and_the_others_are_made(image, monkeypatch, tmp_path):
    original = runner.call_pipeline

    def picky(pipe, job):
        if job.prompt == "b":
            raise DitAttnError("this prompt is too short")
        return original(pipe, job)

    monkeypatch.setattr(runner, "call_pipeline", picky)
    outcome = image("--prompt", "a", "--prompt", "b", "--prompt", "c", "-o", "out")
    assert outcome.code == 1
    assert "failed: this prompt is too short (prompt 'b', seed 43)" in outcome.err
    assert sorted(path.name for path in (tmp_path / "out").glob("0*.png")) == ["0000_a_s42.png", "0002_c_s44.png"]
    assert [item["status"] for item in json.loads((tmp_path / "out/run.json").read_text())["items"]] == [
        "done", "failed", "done",
    ]  # fmt: skip


def test_a_full_disk_keeps_what_is_finished(image, monkeypatch, tmp_path):
    from dit_attn.cli import outputs

    original = outputs._write_png

    def full(media, path, text):
        if text["prompt"] == "b":
            path.write_bytes(b"half")
            raise OSError(28, os.strerror(28))
        original(media, path, text)

    monkeypatch.setattr(outputs, "_write_png", full)
    outcome = image("--prompt", "a", "--prompt", "b", "--prompt", "c", "-o", "out")
    outcome_err = outcome.err
    outcome.refused("No space left on device", "--resume")
    assert "[1/3]" in outcome.out, outcome_err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["0000_a_s42.json", "0000_a_s42.png"]


@pytest.mark.parametrize("name", ["sheet.png", "run.json"])
def test_a_disk_that_fills_up_behind_the_last_item_still_tells_of_every_item(image, monkeypatch, tmp_path, name):
    from dit_attn.cli import outputs

    function = "write_image" if name == "sheet.png" else "write_json"
    original = getattr(outputs, function)

    def full(what, path):
        if path.name == name:
            raise RunStopped(f"cannot write {path} (No space left on device)")
        original(what, path)

    monkeypatch.setattr(outputs, function, full)
    outcome = image("--prompt", "a", "--prompt", "b", "-o", "out", "--method", "block-sparse")
    outcome.refused(name, "No space left on device")
    assert "[2/2]" in outcome.out and "attention calls" in outcome.out  # the summary of the method
    assert {"0000_a_s42.png", "0001_b_s43.png"} <= {path.name for path in (tmp_path / "out").iterdir()}


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("DefaultCPUAllocator: can't allocate memory: 15 GB")])
def test_a_size_that_does_not_fit_in_memory_is_named_with_what_helps(image, monkeypatch, error):
    def large(pipe, job):
        raise error

    monkeypatch.setattr(runner, "call_pipeline", large)
    outcome = image("--prompt", "a", "-o", "out")
    assert outcome.code == 1 and "out of memory; try a smaller size" in outcome.err


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_disk_that_takes_no_more_bytes_is_bad_input_not_a_crash(tmp_path):
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "from dit_attn.cli import main\n"
        "import dit_attn.cli.runner, dit_attn.cli.load_pipeline, dit_attn.contact_sheet, torch, diffusers\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (200, resource.RLIM_INFINITY))\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    words = ["generate", "--model", "tiny-image", *FAST, "--prompt", "a", "-o", str(tmp_path)]
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, cwd=tmp_path.parent)
    assert done.returncode == 2, done.stderr
    assert "cannot write" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


# -- guidance that does not happen ------------------------------------------------------------------------------------


def dropped(cli, model, *words):
    asked = json.dumps({"true_cfg_scale": 3, "max_sequence_length": 16})
    return cli("generate", "--model", str(model), *FAST, "--pipeline-kwargs", asked, *words)


@pytest.mark.parametrize("method", [(), ("--method", "softpag", "--set", "heads=0")], ids=["stock", "softpag"])
def test_guidance_that_the_pipeline_drops_is_one_line(cli, flux_model, tmp_path, method):
    prompts = ("--prompt", "a red circle", "--prompt", "a blue square", "-o", "out", *method)
    outcome = dropped(cli, flux_model, *prompts)
    assert outcome.code == 0, outcome.err
    (line,) = [line for line in outcome.err.splitlines() if "warning" in line]
    assert line.startswith("dit-attn: warning: true_cfg_scale 3 had no effect") and line.endswith("(2 of 2 items)")
    assert "give negative_prompt" in line
    told = sidecars(tmp_path / "out")[0]["warnings"]
    assert len(told) == 1 and told[0] in line
    again = dropped(cli, flux_model, *prompts, "--resume")
    assert line in again.err  # what was kept is still without guidance


def test_guidance_that_happens_is_not_told_of(cli, image, flux_model):
    outcome = dropped(cli, flux_model, "--prompt", "a red circle", "--negative-prompt", " ", "--json")
    assert outcome.code == 0, outcome.err
    assert "warning" not in outcome.err and json.loads(outcome.out)["items"][0]["warnings"] == []
    assert "had no effect" not in image("--prompt", "a red circle", "--guidance-scale", "3").err
