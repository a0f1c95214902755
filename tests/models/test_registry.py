"""The embedded models load as plain stock pipelines and run with their call defaults."""

from __future__ import annotations

import shutil
import stat
from dataclasses import replace

import numpy as np
import pytest
import torch

from dit_attn import files, models
from dit_attn.errors import DitAttnError
from dit_attn.eval.shapes_world import edits, multi, world
from dit_attn.models import evaluate_edits, nets, registry
from dit_attn.models.recipe import RECIPES

SHAPES = ["tiny-image", "tiny-video", "tiny-joint", "tiny-multi"]
OF_TEXT = [*SHAPES, "tiny-inspect"]
NAMES = [*OF_TEXT, "tiny-edit"]


def _run(name, pipeline, **changes):
    call = {**models.call_defaults(name), "num_inference_steps": 2, **changes}
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    output = pipeline(models.info(name).example, generator=generator, output_type="np", **call)
    return output.frames[0] if name == "tiny-video" else output.images[0]


@pytest.mark.parametrize("name", NAMES)
def test_load_gives_the_stock_class_itself(name):
    import diffusers

    if name == "tiny-edit":
        pytest.importorskip("torchvision")

    pipeline = models.load(name)
    assert type(pipeline) is getattr(diffusers, models.info(name).pipeline)
    assert next(pipeline.transformer.parameters()).dtype == torch.float32


def test_dtype_is_taken():
    assert next(models.load("tiny-image", dtype=torch.bfloat16).transformer.parameters()).dtype == torch.bfloat16


SIZES = [(128, 128, 3), (9, 48, 48, 3), (128, 128, 3), (128, 128, 3), (64, 64, 3)]


@pytest.mark.parametrize(("name", "shape"), list(zip(OF_TEXT, SIZES)))
def test_call_defaults_run_and_give_the_stated_size(name, shape):
    output = _run(name, models.load(name))
    assert output.shape == shape
    assert np.isfinite(output).all()


@pytest.mark.parametrize("name", OF_TEXT)
def test_tokens_are_what_the_entry_says(name):
    pipeline = models.load(name)
    seen = []
    block = getattr(pipeline.transformer, "blocks" if name == "tiny-video" else "transformer_blocks")[0]

    def note(module, args, kwargs):
        seen.append((args[0] if args else kwargs["hidden_states"]).shape[1])

    block.register_forward_pre_hook(note, with_kwargs=True)
    _run(name, pipeline, num_inference_steps=1)
    assert set(seen) == {models.info(name).tokens}


def test_the_editing_model_recolors_what_it_is_told_and_keeps_the_rest():
    pytest.importorskip("torchvision")
    source = multi.parse("a large red circle at the left and a small green cross at the right on white")
    words = ("make the circle yellow", "make the circle purple", "make the cross blue", "make the background gray")
    items = [edits.Edit(source, edits.parse(one)) for one in words]
    pipeline, call = models.load("tiny-edit"), {**models.call_defaults("tiny-edit"), "num_inference_steps": 8}
    pipeline.set_progress_bar_config(disable=True)
    made = evaluate_edits.generate(pipeline, items, call, seed=0)
    assert made[0].output.shape == (128, 128, 3)
    assert sum(one.verdict.followed[0] for one in made) >= 3
    assert sum(ok for one in made for ok in one.verdict.kept) >= 3  # of five


@pytest.mark.parametrize("name", SHAPES)
def test_the_caption_changes_the_output(name):
    pipeline = models.load(name)
    pipeline.set_progress_bar_config(disable=True)
    call = {**models.call_defaults(name), "num_inference_steps": 2, "output_type": "np"}
    text = models.info(name).example
    other = text.replace("black", "white") if text.endswith("black") else text.replace("white", "black")
    first, second = (
        pipeline(prompt, generator=torch.Generator().manual_seed(0), **call)[0] for prompt in (text, other)
    )
    assert np.abs(np.asarray(first) - np.asarray(second)).mean() > 0.3


@pytest.mark.parametrize("name", NAMES)
def test_folder_is_small_and_readable_by_everyone(name):
    files = [p for p in models.info(name).folder.rglob("*") if p.is_file()]
    assert 0 < models.info(name).size_bytes < 20_000_000
    assert all(p.stat().st_mode & stat.S_IROTH for p in files)


@pytest.mark.parametrize("name", SHAPES)
def test_every_word_of_the_world_is_a_token(name):
    tokenizer = models.load(name).tokenizer
    words = nets.WORDS.get(RECIPES[name].kind, world.vocabulary)()
    unknown = [w for w in words if tokenizer.convert_tokens_to_ids(w) == tokenizer.unk_token_id]
    assert not unknown


@pytest.mark.parametrize("name", NAMES)
def test_the_tokens_of_a_recipe_are_those_of_the_shipped_model(name):
    chosen = RECIPES[name]
    built = nets.build_tokenizer(chosen.kind, chosen.net.text_length)
    assert built.get_vocab() == models.load(name).tokenizer.get_vocab()


def test_changing_the_returned_defaults_does_not_change_the_registry():
    models.call_defaults("tiny-image")["height"] = 1
    assert models.call_defaults("tiny-image")["height"] == 128


def test_unknown_name_is_refused_with_the_list():
    with pytest.raises(DitAttnError, match=r"tiny-image.*tiny-video") as error:
        models.load("tiny-imge")
    assert "Did you mean 'tiny-image'" in str(error.value)


def test_every_recipe_has_an_entry_and_the_reverse():
    assert set(registry.MODELS) == set(RECIPES)


def test_missing_weights_are_refused_with_the_remedy(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "WEIGHTS", tmp_path)
    with pytest.raises(DitAttnError, match="dit-attn train tiny-image"):
        models.load("tiny-image")


def test_damaged_weights_are_refused_in_one_line(monkeypatch, tmp_path):
    shutil.copytree(models.info("tiny-image").folder, tmp_path / "tiny-image")
    (tmp_path / "tiny-image/transformer/diffusion_pytorch_model.safetensors").write_bytes(b"not weights")
    monkeypatch.setattr(registry, "WEIGHTS", tmp_path)
    with pytest.raises(DitAttnError, match="cannot be read") as error:
        models.load("tiny-image")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_training_record_names_recipe_seed_and_versions(name):
    record = models.info(name).training
    assert record["name"] == name
    assert {"seed", "steps_done", "recipe", "environment", "figures"} <= set(record)


def test_the_steps_of_weights_are_those_of_all_trainings_that_went_on_from_each_other(monkeypatch, tmp_path):
    monkeypatch.setattr(registry, "WEIGHTS", tmp_path)
    assert models.info("tiny-image").steps_trained is None
    (tmp_path / "tiny-image").mkdir()
    first, second = {"steps_done": 100}, {"steps_done": 20}
    files.write_json(tmp_path / "tiny-image/training.json", {"steps_done": 3, "went_on_from": second})
    assert models.info("tiny-image").steps_trained == 23
    second["went_on_from"] = first
    files.write_json(tmp_path / "tiny-image/training.json", {"steps_done": 3, "went_on_from": second})
    assert models.info("tiny-image").steps_trained == 123


def test_entries_are_immutable():
    with pytest.raises(AttributeError):
        models.available()["tiny-image"].name = "other"  # type: ignore[misc]
    assert replace(models.info("tiny-image"), name="x").name == "x"
