"""Bad input of every command: one line on standard error, exit code 2, no traceback, nothing lost."""

from __future__ import annotations

import json
import shutil

import pytest
from PIL import Image

from dit_attn.cli import load_pipeline

PROMPT = ("--prompt", "a red circle")
MODEL = ("--model", "tiny-image")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (PROMPT, ["no model", "--model"]),
        (MODEL, ["no prompt", "--prompts"]),
        ((*MODEL, "--prompt", " "), ["prompt is empty"]),
        ((*MODEL, "--prompt", "a red\0circle"), ["--prompt: prompt has a zero byte", "take it out"]),
        ((*MODEL, *PROMPT, "--negative-prompt", "\0"), ["negative_prompt has a zero byte"]),
        ((*MODEL, *PROMPT, "--method", "nag"), ["--prompt: nag needs a negative prompt", "--negative-prompt TEXT"]),
        ((*MODEL, *PROMPT, "--method", "nag:negative_prompt=x + slg"), ["slg", "nag", "both add rows to a step"]),
        (("--model", "tiny-imag", *PROMPT), ["'tiny-imag'", "Did you mean 'tiny-image'", "tiny-video"]),
        (("--model", "./nowhere", *PROMPT), ["./nowhere", "no such folder"]),
        (("--model", "/no/where/at/all", *PROMPT), ["no such folder"]),
        (("--model", "org/nowhere", *PROMPT), ["'org/nowhere'", "Hub"]),
        ((*MODEL, "--revision", "main", *PROMPT), ["--revision", "embedded"]),
        ((*MODEL, "--variant", "fp16", *PROMPT), ["--variant 'fp16'", "embedded"]),
        ((*MODEL, *PROMPT, "--method", "sparse"), ["unknown method 'sparse'", "block-sparse"]),
        ((*MODEL, *PROMPT, "--method", "block-sparse", "--set", "dens=1"), ["'dens'", "density"]),
        ((*MODEL, *PROMPT, "--method", "block-sparse", "--set", "density=2"), ["density", "between", "2.0"]),
        ((*MODEL, *PROMPT, "--method", "block-sparse", "--method", "block-sparse"), ["cannot run together"]),
        ((*MODEL, *PROMPT, "--set", "density=1"), ["no method"]),
        ((*MODEL, *PROMPT, "--preset", "x", "--method", "block-sparse"), ["unknown preset 'x'", "tiny-image"]),
        ((*MODEL, *PROMPT, "--steps", "0"), ["--steps", "at least 1", "'0'"]),
        ((*MODEL, *PROMPT, "--height", "tall"), ["--height", "whole number", "'tall'"]),
        ((*MODEL, *PROMPT, "--seed", "-1"), ["--seed", "'-1'"]),
        ((*MODEL, *PROMPT, "--seed", str(2**63)), ["--seed"]),
        ((*MODEL, *PROMPT, "--guidance-scale", "nan"), ["--guidance-scale"]),
        ((*MODEL, *PROMPT, "--dtype", "int8"), ["'int8'", "bfloat16"]),
        ((*MODEL, *PROMPT, "--device", "tpu"), ["'tpu'", "cuda"]),
        ((*MODEL, *PROMPT, "--device", "cuda:99"), ["cuda:99", "--device cpu"]),
        ((*MODEL, *PROMPT, "--device", "meta"), ["'meta'"]),
        ((*MODEL, *PROMPT, "--height", "33"), ["divisible by 8", "a red circle"]),
        ((*MODEL, *PROMPT, "--num-frames", "9"), ["takes no num_frames", "--num-frames"]),
        ((*MODEL, *PROMPT, "--image", "x.png"), ["--image x.png", "no such file"]),
        ((*MODEL, *PROMPT, "--pipeline-kwargs", "{"), ["--pipeline-kwargs", "not JSON"]),
        ((*MODEL, *PROMPT, "--pipeline-kwargs", "[1]"), ["JSON object"]),
        ((*MODEL, *PROMPT, "--pipeline-kwargs", '{"etaa": 1}'), ["'etaa'", "Did you mean 'eta'"]),
        ((*MODEL, *PROMPT, "--pipeline-kwargs", '{"generator": 1}'), ["--seed"]),
        ((*MODEL, *PROMPT, "--pipeline-kwargs", '{"num_inference_steps": "x"}'), ["num_inference_steps", "'x'"]),
        ((*MODEL, *PROMPT, "--pipeline-kwargs", '{"height": 0}'), ["height in --pipeline-kwargs", "at least 1"]),
        ((*MODEL, *PROMPT, "--compile", "{"), ["--compile", "not JSON"]),
        ((*MODEL, *PROMPT, "--compile", '{"mode": "x"}'), ["--compile", "mode=x"]),
        ((*MODEL, *PROMPT, "--compile", '{"modee": "x"}'), ["--compile", "'modee'"]),
        ((*MODEL, *PROMPT, "--dry-run", "--height", "33"), ["divisible by 8"]),
        (("--model", "tiny-video", *PROMPT, "--dry-run", "--width", "20"), ["divisible by 16"]),
        ((*MODEL, *PROMPT, "--method", "block-sparse", "--set", "dense_layers=6"), ["layer 6", "0 to 5"]),
        ((*MODEL, *PROMPT, "--method", "block-sparse", "--set", "dense_steps=1.5"), ["1.5", "whole number"]),
        ((*MODEL, *PROMPT, "--lora", "nowhere"), ["nowhere", "no such file"]),
        ((*MODEL, *PROMPT, "--lora", "{"), ["--lora", "not JSON"]),
        ((*MODEL, *PROMPT, "--lora", '{"lora": "x"}'), ["'lora'", "lora_id"]),
        ((*MODEL, *PROMPT, "--lora", '{"lora_id": "a/b", "lora_scale": "big"}'), ["lora_scale", "'big'"]),
        ((*MODEL, *PROMPT, "--attention-backend", "warp"), ["--attention-backend 'warp'"]),
        ((*MODEL, *PROMPT, "--config", "none.yaml"), ["none.yaml", "No such file"]),
        ((*MODEL, "--prompts", "none.txt"), ["none.txt", "No such file"]),
    ],
)
def test_generate_refuses(cli, words, parts, tmp_path):
    cli("generate", "--device", "cpu", *words, "-o", "out").refused(*parts)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_offloading_without_a_gpu_is_refused(cli):
    words = ("generate", *MODEL, *PROMPT, "--device", "cpu", "--cpu-offload", "model")
    cli(*words).refused("--cpu-offload model", "cpu")


def test_a_missing_adapter_library_is_named_with_its_install(cli, monkeypatch, tmp_path):
    import importlib.util

    original = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "peft" else original(name, *rest)
    )
    (tmp_path / "adapter.safetensors").write_bytes(b"x")
    cli("generate", *MODEL, *PROMPT, "--lora", tmp_path / "adapter.safetensors").refused("peft", "pip install")


def test_a_missing_video_library_is_named_with_its_install(cli, monkeypatch, tmp_path):
    import diffusers.utils

    def absent(*args, **kwargs):
        raise ImportError("no imageio")

    monkeypatch.setattr(diffusers.utils, "export_to_video", absent)
    words = ("generate", "--model", "tiny-video", "--prompt", "x", "--steps", "1", "-o", "out")
    cli(*words).refused("imageio-ffmpeg", "pip install")


def test_a_corrupt_adapter_is_refused(cli, tmp_path):
    pytest.importorskip("peft")
    (tmp_path / "adapter.safetensors").write_bytes(b"not weights")
    outcome = cli("generate", *MODEL, *PROMPT, "--lora", tmp_path / "adapter.safetensors")
    outcome.refused("--lora" if "lora" in outcome.err else "LoRA")


def test_adapters_for_a_pipeline_that_takes_none_are_refused_before_it_is_loaded(cli, monkeypatch, tmp_path):
    pytest.importorskip("peft")
    monkeypatch.setattr(load_pipeline, "load_pipeline", None)
    (tmp_path / "adapter.safetensors").write_bytes(b"x")
    words = ("generate", *MODEL, *PROMPT, "--lora", tmp_path / "adapter.safetensors")
    cli(*words).refused("PixArtSigmaPipeline takes no LoRA adapters", "leave out --lora")


def test_an_image_for_a_pipeline_that_takes_none_is_refused(cli, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    cli("generate", *MODEL, *PROMPT, "--image", "x.png", "-o", "out").refused("takes no image", "--image")


@pytest.mark.parametrize("content", [None, b"", b"not a picture", b"\x89PNG\r\n\x1a\n half"])
def test_a_missing_or_corrupt_picture_is_refused(cli, image_to_video_model, tmp_path, content):
    if content is not None:
        (tmp_path / "start.png").write_bytes(content)
    words = ("generate", "--model", image_to_video_model, *PROMPT, "--image", "start.png", "-o", "out")
    cli(*words).refused("--image start.png", "no such file" if content is None else "not a readable image")


def test_a_prompt_file_with_a_bad_line_is_refused_before_anything_is_made(cli, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "seed": "x"}\n')
    cli("generate", *MODEL, "--prompts", "p.jsonl", "-o", "out").refused("line 2", "seed", "'x'")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b", "height": 33}\n')
    cli("generate", *MODEL, "--prompts", "p.jsonl", "-o", "out").refused("line 2", "divisible by 8")
    assert not list((tmp_path / "out").glob("*"))


def test_a_prompt_file_of_another_encoding_is_refused(cli, tmp_path):
    (tmp_path / "p.txt").write_bytes("a red circle\na blue square\n".encode("utf-16-be"))
    cli("generate", *MODEL, "--prompts", "p.txt", "-o", "out").refused("p.txt, line 1", "zero byte", "UTF-16")


def test_a_number_in_the_configuration_where_text_belongs_says_what_to_write(cli, tmp_path):
    for written, read in (("3", "3"), ("3:7", "187")):  # YAML takes 3:7 for minutes and seconds
        (tmp_path / "c.yaml").write_text(f"prompt: a red circle\nmethod: {{softpag: {{heads: {written}}}}}\n")
        told = (f"softpag.heads must be text, got {read}", "put it in quotes")
        cli("generate", *MODEL, "--config", "c.yaml", "--dry-run").refused(*told)


def test_an_output_that_is_a_file_is_refused_and_kept(cli, tmp_path):
    (tmp_path / "out").write_text("precious")
    cli("generate", *MODEL, *PROMPT, "-o", "out").refused("--output out", "is a file")
    cli("demo", "-o", "out").refused("--output out", "is a file")
    assert (tmp_path / "out").read_text() == "precious"


def test_an_output_that_cannot_be_made_is_refused(cli, tmp_path):
    (tmp_path / "file").write_text("x")
    cli("generate", *MODEL, *PROMPT, "-o", "file/inside").refused("cannot write", "file/inside")
    cli("generate", *MODEL, *PROMPT, "-o", "a\0b").refused("--output", "zero byte")
    cli("generate", *MODEL, *PROMPT, "-o", "").refused("--output is empty", "outputs/tiny-image-dense")


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda folder: (folder / "model_index.json").unlink(), ["no model_index.json"]),
        (lambda folder: (folder / "model_index.json").write_text("{"), ["model_index.json", "cannot be read"]),
        (
            lambda folder: (folder / "model_index.json").write_text(json.dumps({"_class_name": "FuturePipeline"})),
            ["FuturePipeline", "update diffusers"],
        ),
        (lambda folder: (folder / "transformer/config.json").unlink(), ["transformer/config.json"]),
        (
            lambda folder: (folder / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"half"),
            ["cannot be loaded"],
        ),
        (lambda folder: (folder / "tokenizer/tokenizer.json").write_text("{"), ["cannot be loaded"]),
        (lambda folder: shutil.rmtree(folder / "vae"), ["cannot be loaded"]),
    ],
    ids=["no index", "bad index", "unknown pipeline", "no config", "bad weights", "bad tokenizer", "no vae"],
)
def test_a_damaged_model_folder_is_refused(cli, folder_model, tmp_path, damage, parts):
    folder = tmp_path / "model"
    shutil.copytree(folder_model, folder)
    damage(folder)
    cli("generate", "--model", folder, *PROMPT, "-o", "out").refused(*parts)


def test_a_file_is_not_a_model(cli, tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    cli("generate", "--model", tmp_path / "model.safetensors", *PROMPT).refused("is a file", "model_index.json")


def test_a_model_without_a_transformer_takes_no_method(cli, folder_model, tmp_path):
    folder = tmp_path / "unet"
    shutil.copytree(folder_model, folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(
        json.dumps({**index, "_class_name": "DDPMPipeline", "transformer": [None, None]})
    )
    words = ("generate", "--model", folder, *PROMPT, "--method", "block-sparse")
    cli(*words).refused("no diffusion transformer", "--method")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((), ["no model"]),
        (("--model", "nothing"), ["unknown model 'nothing'"]),
        ((*MODEL, "--method", "nothing"), ["unknown method 'nothing'"]),
        ((*MODEL, "--height", "2", "--width", "2"), ["smaller than one token"]),
        ((*MODEL, "--height", "0"), ["at least 1"]),
        ((*MODEL, "--config", "none.yaml"), ["No such file"]),
        ((*MODEL, "--seed", "3"), ["unknown flag '--seed'"]),
        (("--model", "org/nowhere"), ["'org/nowhere'", "cannot be reached", "built in: Wan 2.1 1.3B"]),
    ],
)
def test_explain_refuses(cli, words, parts):
    cli("explain", *words).refused(*parts)


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--steps", "0"), ["--steps must be at least 1"]),
        (("--device", "cuda:99"), ["cuda:99"]),
        (("--sheet", "/proc/nowhere/demo.png"), ["cannot write"]),
        (("extra",), ["'extra'"]),
    ],
)
def test_demo_refuses(cli, words, parts):
    cli("demo", "-o", "out", *words).refused(*parts)


@pytest.mark.parametrize("command", ["models", "doctor"])
def test_commands_without_arguments_refuse_them(cli, command):
    cli(command, "--model", "x").refused("unknown flag '--model'", f"dit-attn {command} --help")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("nothing",), ["'nothing'", "tiny-image"]),
        (("tiny-image", "--steps", "0"), ["--steps must be at least 1, got '0'"]),
        (("world-clip", "--tail"), ["--tail is for the pipelines", "leave it out"]),
    ],
)
def test_train_refuses(cli, words, parts):
    cli("train", *words).refused(*parts)


def test_no_gpu_says_why(monkeypatch):
    import torch

    from dit_attn.errors import DitAttnError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(DitAttnError, match="no NVIDIA driver or GPU found"):
        load_pipeline.pick_device("cuda")
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(DitAttnError, match="built without CUDA"):
        load_pipeline.pick_device("cuda")


def test_a_picture_the_pipeline_needs_is_asked_for_before_anything_is_loaded(cli, image_to_video_model):
    words = ("generate", "--model", image_to_video_model, *PROMPT, "--dry-run", "-o", "out")
    cli(*words).refused("WanImageToVideoPipeline needs image", "--image")


def test_an_empty_model_name_is_not_the_current_folder(cli):
    cli("generate", "--model", "", *PROMPT).refused("--model is empty")
