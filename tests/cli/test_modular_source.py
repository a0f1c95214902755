"""Models that are modular pipelines alone: they run as others do, and what cannot be done is refused in one line."""

from __future__ import annotations

import json
import logging
import shutil
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image

from dit_attn import models
from dit_attn.cli import modular_source
from dit_attn.cli.load_pipeline import LoadConfig, load_pipeline
from dit_attn.cli.model_source import describe
from dit_attn.processors.attach.compat import modular_blocks

PROMPT = ("--prompt", "a red cube")
SMALL = ("--height", "64", "--width", "64", "--steps", "2")


def index_of(folder, kind):
    """A folder with nothing but the index of a modular pipeline."""
    blocks = getattr(getattr(diffusers, kind, None), "default_blocks_name", None)
    folder.mkdir()
    (folder / modular_source.INDEX).write_text(json.dumps({"_class_name": kind, "_blocks_class_name": blocks}))
    return folder


def pixels(path):
    """The image in a file."""
    return np.asarray(Image.open(path).convert("RGB"))


@pytest.fixture(scope="module")
def stock_image(modular_model):
    """The image of a run in Python."""
    pipe = diffusers.ModularPipeline.from_pretrained(str(modular_model))
    pipe.load_components(torch_dtype=torch.float32)
    call = {"height": 64, "width": 64, "num_inference_steps": 2, "generator": torch.Generator("cpu").manual_seed(42)}
    image = pipe(prompt="a red cube", **call, output_type="np", output="images")[0]
    return (image * 255).round().astype(np.uint8)


def test_generate_is_the_run_in_python_bit_for_bit(cli, modular_model, stock_image, tmp_path):
    words = ("generate", "--model", modular_model, *PROMPT, *SMALL)
    for name, more in {"stock": (), "dense": ("--method", "block-sparse:density=1")}.items():
        outcome = cli(*words, *more, "-o", name)
        assert outcome.code == 0, outcome.err
        (file,) = (tmp_path / name).glob("0*.png")
        assert np.array_equal(pixels(file), stock_image), name


@pytest.fixture(scope="module")
def guided(tmp_path_factory):
    """A modular pipeline with a guider, and the folder it is saved in."""
    blocks = getattr(diffusers, "StableDiffusion3AutoBlocks", None)
    if blocks is None:
        pytest.skip("this diffusers has no modular pipeline with a guider for the embedded models")
    pipe, stock = blocks().init_pipeline(), models.load("tiny-joint")
    wanted, folder = set(pipe.component_names), tmp_path_factory.mktemp("models") / "guided"
    pipe.update_components(**{name: part for name, part in stock.components.items() if name in wanted and part})
    pipe.save_pretrained(str(folder), overwrite_modular_index=True)
    return pipe, folder


def test_a_method_finds_the_negative_prompt_and_an_error_in_a_block_is_one_line(cli, guided, monkeypatch):
    words = ("generate", "--model", guided[1], *PROMPT, *SMALL, "--method", "nag")
    outcome = cli(*words, "--negative-prompt", "blue", "-o", "out")
    assert outcome.code == 0 and "nag" in outcome.out, outcome.err
    monkeypatch.setattr(diffusers.AutoencoderKL, "decode", lambda *args, **kwargs: 1 / 0)
    outcome = cli(*words, "--negative-prompt", "blue", "-o", "other")
    assert outcome.code == 1 and "division by zero" in outcome.err
    assert not logging.getLogger("diffusers.modular_pipelines.modular_pipeline").isEnabledFor(logging.ERROR)


def test_a_guidance_scale_is_that_of_the_guider_for_one_call(cli, guided, tmp_path):
    pipe, folder = guided
    expected = {}
    for scale in (2.0, pipe.guider.guidance_scale):
        pipe.guider.guidance_scale = scale
        call = {"height": 64, "width": 64, "num_inference_steps": 2, "generator": torch.Generator().manual_seed(42)}
        image = pipe(prompt="a red cube", **call, output_type="np", output="images")[0]
        expected[scale] = (image * 255).round().astype(np.uint8)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": "a red cube", "seed": 42, **x}) + "\n" for x in ({"guidance_scale": 2.0}, {}))
    )
    outcome = cli("generate", "--model", folder, "--prompts", prompts, *SMALL, "-o", "out")
    assert outcome.code == 0, outcome.err
    for file, image in zip(sorted((tmp_path / "out").glob("0*.png")), expected.values(), strict=True):
        assert np.array_equal(pixels(file), image)


def test_a_sparse_run_has_a_sidecar_and_a_report_and_is_resumed(cli, modular_model, stock_image, tmp_path):
    words = ("generate", "--model", modular_model, *PROMPT, *SMALL, "--method", "block-sparse:density=0.25")
    outcome = cli(*words, "-o", "out", "--json")
    assert outcome.code == 0, outcome.err
    assert "it/s" not in outcome.err  # no bar where there is no terminal
    report = json.loads(outcome.out)
    assert report["pipeline"] == "FluxModularPipeline" and report["done"] == 1
    (file,) = (tmp_path / "out").glob("0*.png")
    sidecar = json.loads(file.with_suffix(".json").read_text())
    assert sidecar["summary"]["sparse_calls"] == 4 and sidecar["summary"]["steps"] == 2
    assert not np.array_equal(pixels(file), stock_image)
    assert json.loads(cli(*words, "-o", "out", "--json", "--resume").out)["skipped"] == 1


def test_other_commands_take_it(cli, modular_model, flux_model, tmp_path):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    edit = cli("edit", "--model", modular_model, "--instruction", "blue", "--image", "red.png", *SMALL, "-o", "edit")
    assert edit.code == 0, edit.err
    explain = ("explain", "--height", "64", "--width", "64", "--json", "--method", "block-sparse")
    modular, other = (json.loads(cli(*explain, "--model", model).out) for model in (modular_model, flux_model))
    assert modular["tokens"] == other["tokens"] > 0 and modular["methods"] == other["methods"]
    inspect = cli("inspect", "--model", modular_model, *PROMPT, *SMALL, "-o", "inspect")
    assert inspect.code == 0, inspect.err
    compare = cli(
        "compare", "--model", modular_model, *PROMPT, *SMALL, "--method", "block-sparse:density=1", "-o", "compare"
    )
    assert compare.code == 0, compare.err


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (("search", *PROMPT), "is a modular pipeline"),
        (("calibrate", *PROMPT, "--method", "block-sparse"), "is a modular pipeline"),
        (("finetune", "sla", *PROMPT, "--steps", "1"), "is a modular pipeline"),
        (("generate", *PROMPT, "--height", "128", "--width", "128", "--high-resolution"), "FluxModularPipeline"),
    ],
)
def test_what_needs_another_pipeline_is_refused(cli, modular_model, words, part):
    cli(*words, "--model", modular_model).refused(part)


def test_a_model_that_brings_code_is_refused(cli, modular_model, tmp_path):
    folder = tmp_path / "own"
    shutil.copytree(modular_model, folder)
    (folder / "modular_config.json").write_text(json.dumps({"auto_map": {"ModularPipelineBlocks": "block.Mine"}}))
    (folder / "block.py").write_text("raise SystemExit('it was run')")
    cli("generate", "--model", folder, *PROMPT).refused("runs no code of a model", "trust_remote_code=True")


def test_an_old_diffusers_is_refused(cli, modular_model, monkeypatch):
    lazy = type(diffusers)
    stock = lazy.__getattr__

    def older(module, name):
        if name == "ModularPipeline":
            raise AttributeError(name)
        return stock(module, name)

    monkeypatch.setattr(lazy, "__getattr__", older)
    monkeypatch.delitem(vars(diffusers), "ModularPipeline", raising=False)
    cli("generate", "--model", modular_model, *PROMPT).refused("is a modular pipeline", "pip install -U diffusers")


@pytest.mark.parametrize(
    ("kind", "words", "parts"),
    [
        ("FutureModularPipeline", (), ("FutureModularPipeline", "pip install -U diffusers")),
        ("FluxPipeline", (), ("FluxPipeline", "does not have")),
        ("MiniMaxMusic3ModularPipeline", (), ("neither images nor videos",)),
        ("Wan22Image2VideoModularPipeline", (), ("needs image", "--image")),
        ("WanAnimate2ModularPipeline", ("--image", "red.png"), ("needs driving_video", "cannot give")),
        (
            "MiniMaxH3ModularPipeline",
            ("--pipeline-kwargs", '{"references": ["red.png"]}'),
            ("takes references", "cannot give"),
        ),
        ("ZImageModularPipeline", ("--pipeline-kwargs", '{"latents": [0.0]}'), ("takes latents", "cannot give")),
        ("MiniMaxH3ModularPipeline", ("--guidance-scale", "3"), ("takes no guidance_scale", "--guidance-scale")),
        ("ZImageModularPipeline", ("--guidance-scale", "3"), ("takes no guidance_scale",)),  # its guider is off
        ("StableDiffusionXLModularPipeline", ("--method", "block-sparse"), ("no diffusion transformer",)),
    ],
)
def test_what_it_cannot_do_is_refused_before_weights_are_loaded(cli, tmp_path, kind, words, parts):
    Image.new("RGB", (64, 64), "red").save(tmp_path / "red.png")
    cli("generate", "--model", index_of(tmp_path / "model", kind), *PROMPT, *words).refused(*parts)


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda folder: (folder / modular_source.INDEX).write_text("{"), [modular_source.INDEX, "cannot be read"]),
        (lambda folder: (folder / "transformer/config.json").unlink(), ["configuration of transformer"]),
        (
            lambda folder: (folder / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"half"),
            ["cannot be loaded"],
        ),
    ],
    ids=["bad index", "no config", "bad weights"],
)
def test_a_damaged_folder_is_refused(cli, modular_model, tmp_path, damage, parts):
    folder = tmp_path / "model"
    shutil.copytree(modular_model, folder)
    index = folder / modular_source.INDEX
    index.write_text(index.read_text().replace(str(modular_model), str(folder)))  # older diffusers reads the original
    damage(folder)
    cli("generate", "--model", folder, *PROMPT, *SMALL, "-o", "out").refused(*parts)


def test_a_model_of_the_hub_is_taken_from_the_cache(cli, modular_model, tmp_path, monkeypatch):
    from huggingface_hub import constants, file_download

    cache, commit = tmp_path / "cache", "0123456789abcdef0123456789abcdef01234567"
    folder = cache / "models--someone--blocks" / "snapshots" / commit
    shutil.copytree(modular_model, folder)
    index = (folder / modular_source.INDEX).read_text().replace(str(modular_model), "someone/blocks")
    (folder / modular_source.INDEX).write_text(index)
    (folder.parents[1] / "refs").mkdir()
    (folder.parents[1] / "refs" / "main").write_text(commit)
    for module in (constants, file_download, diffusers.utils.constants, diffusers.configuration_utils):
        for name in ("HF_HUB_CACHE", "HF_HUB_OFFLINE", "HUGGINGFACE_HUB_CACHE"):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, True if name == "HF_HUB_OFFLINE" else str(cache))
    outcome = cli("generate", "--model", "someone/blocks", *PROMPT, *SMALL, "-o", "out", "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["commit"] == commit and report["done"] == 1


def test_a_call_loads_the_parts_that_it_needs(tmp_path):
    opened = describe(str(index_of(tmp_path / "model", "MiniMaxH3ModularPipeline")), modular=True).opened
    text, references = (
        modular_source.parts_of(opened, [{"prompt": "a", **more}]) for more in ({}, {"references": ["one"]})
    )
    assert "transformer" in text and "transformer_ref" not in text
    assert "transformer" not in references and "transformer_ref" in references


def test_the_sound_of_a_video_comes_with_it():
    class Stock:
        blocks = SimpleNamespace(
            outputs=[SimpleNamespace(name=name) for name in ("videos", "audio", "sampling_rate")], inputs=[]
        )

        def __call__(self, output):
            return {name: name for name in output}

    made = modular_source._called_as_others(Stock(), "h3")()()
    assert (made.frames, made.audio, made.sampling_rate) == ("videos", "audio", "sampling_rate")


def test_bars_of_inner_blocks_can_be_turned_off(modular_model):
    opened = describe(str(modular_model), modular=True).opened
    opened.set_progress_bar_config(disable=True)
    inner = [block for block in modular_blocks(opened) if hasattr(block, "progress_bar")]
    assert inner and all(block._progress_bar_config == {"disable": True} for block in inner)


def test_offloading_reaches_every_part(modular_model, monkeypatch):
    """No GPU is needed: what diffusers does with the parts is its own."""
    import diffusers.hooks

    source = describe(str(modular_model), modular=True)
    pipe = modular_source.load(source.opened, source.path, None, None, torch.float32, None)
    managed, grouped = [], []
    monkeypatch.setattr(diffusers.ComponentsManager, "add", lambda self, name, part: managed.append(name))
    monkeypatch.setattr(
        diffusers.ComponentsManager, "enable_auto_cpu_offload", lambda self, device: managed.append(device)
    )
    monkeypatch.setattr(diffusers.hooks, "apply_group_offloading", lambda part, **how: grouped.append(part))
    modular_source.offload(pipe, "model", "cuda")
    modular_source.offload(pipe, "group", "cuda")
    modules = {"transformer", "vae", "text_encoder", "text_encoder_2"}
    assert set(managed) == {*modules, "cuda"} and len(grouped) == 4


def test_a_part_alone_is_loaded_in_its_precision(modular_model):
    source = describe(str(modular_model), modular=True)
    config = LoadConfig(source, torch.device("cpu"), torch.bfloat16, parts=("transformer", "scheduler"))
    pipe = load_pipeline(config)
    assert pipe.transformer.dtype == torch.bfloat16 and pipe.vae is None and pipe.text_encoder is None
