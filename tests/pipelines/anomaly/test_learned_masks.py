"""Masks drawn by a model that learned those of the shots: what counts as a mask, its seeds, its file."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.pipelines.anomaly import Backbone, Concept, MaskSource, TrainConfig, train
from dit_attn.pipelines.anomaly.mask_drawer import ATTEMPTS, MaskDrawer, check_mask_model
from dit_attn.pipelines.anomaly.mask_model import canvas_side, mask_of, on_canvas
from dit_attn.pipelines.anomaly.mask_training import MaskTrainConfig, MaskTraining, learn_masks
from dit_attn.pipelines.anomaly.sources import from_folders
from tests._support.inspection_pipelines import data, tiny_pipeline

CONFIG = TrainConfig(steps=1, batch=1, tokens=2, mask_tokens=1, lora_rank=2)
MASKS = MaskTrainConfig(steps=3, batch=2, tokens=2, lora_rank=2, trials=2, save_every=2)
NAME = "metal+hole"
SHAPE = np.zeros((6, 10), bool)
SHAPE[1:5, 1:9] = True


@pytest.fixture(scope="module", params=["image", "joint"])
def learned(request, tmp_path_factory):
    """(pipe, folder) after a training of a tiny random pipeline with masks."""
    folder = tmp_path_factory.mktemp("learned")
    pipe = tiny_pipeline(request.param)
    backbone = Backbone(pipe, 32)
    concept = train(backbone, from_folders(*data(folder / "data"), "metal", "hole"), CONFIG, folder)
    before = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    learn_masks(backbone, concept, MASKS, folder)
    after = pipe.transformer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.requires_grad for p in pipe.transformer.parameters())
    return pipe, folder


def _concept(folder):
    return Concept.load(folder / "concept.safetensors")


def test_vectors_and_lora_are_in_the_file_and_nothing_else_changes(learned):
    _pipe, folder = learned
    concept = _concept(folder)
    model = concept.mask_model
    assert model.settings.tokens == 2 and model.settings.steps == 3 and set(model.settings.usable) == {NAME}
    assert model.settings.canvas == {NAME: canvas_side(concept.shapes[NAME])}
    assert any("lora_B" in name and value.any() for name, value in model.lora.items())
    concept.save(folder / "again.safetensors")
    again = Concept.load(folder / "again.safetensors")
    assert torch.equal(again.mask_model.vectors, model.vectors) and again.settings == concept.settings
    assert all(torch.equal(value, again.mask_model.lora[name]) for name, value in model.lora.items())


def test_resumed_learning_is_uninterrupted_learning(learned, tmp_path):
    pipe, folder = learned
    whole, concept = _concept(folder), _concept(folder)
    training = MaskTraining(Backbone(pipe, 32), concept, MASKS)
    training.update()
    training.save(tmp_path)
    training.close()
    resumed = learn_masks(Backbone(pipe, 32), _concept(folder), MASKS, tmp_path, resume=True)
    assert torch.equal(resumed.mask_model.vectors, whole.mask_model.vectors)
    assert all(torch.equal(value, resumed.mask_model.lora[name]) for name, value in whole.mask_model.lora.items())
    with pytest.raises(DitAttnError, match="belongs to a training with other settings"):
        learn_masks(Backbone(pipe, 32), _concept(folder), replace(MASKS, lr=1.0), tmp_path, resume=True)


def test_a_seed_is_a_mask_whatever_else_is_drawn(learned):
    pipe, folder = learned
    first, second = (MaskDrawer(Backbone(pipe, 32), _concept(folder), steps=2) for _ in range(2))
    second.image(NAME, 5)
    assert torch.equal(first.image(NAME, 7), second.image(NAME, 7))
    assert not torch.equal(first.image(NAME, 7), first.image(NAME, 8))


def test_unusable_masks_are_drawn_again_from_new_seeds_until_the_run_is_given_up(learned, monkeypatch):
    pipe, folder = learned
    drawer = MaskDrawer(Backbone(pipe, 32), _concept(folder), steps=1)
    seeds = []

    def attempt(pair, seed):
        seeds.append(seed)
        return SHAPE, "" if len(seeds) == good else "it is empty"

    monkeypatch.setattr(drawer, "attempt", attempt)
    good = 3
    assert drawer.draw(NAME, 1) is drawer.draw(NAME, 1) is not None
    assert len(set(seeds)) == 3
    good = 0
    with pytest.raises(DitAttnError, match=f"{ATTEMPTS} masks drawn for metal[+]hole cannot be used, the last because"):
        drawer.draw(NAME, 2)
    assert len(set(seeds)) == 3 + ATTEMPTS
    region = np.zeros((40, 60), bool)
    region[5:35, 5:55] = True
    source = MaskSource("learned", [SHAPE], drawer.of(NAME))
    good = len(seeds) + 1
    found = source.sample(region, np.random.default_rng(0))
    assert found.sum() == SHAPE.sum() and not (found & ~region).any()


def test_a_model_that_draws_no_masks_is_refused(learned):
    concept = _concept(learned[1])
    concept.settings = replace(concept.settings, mask_model=replace(concept.settings.mask_model, usable={NAME: 0.25}))
    with pytest.raises(DitAttnError, match=r"of the masks drawn for metal[+]hole after training 25% could be used"):
        check_mask_model(concept, NAME)
    concept.settings = replace(concept.settings, mask_model=None)
    with pytest.raises(DitAttnError, match="did not learn to draw masks; train it with --learn-masks"):
        check_mask_model(concept, NAME)


@pytest.mark.parametrize("size", [32, 64, 16])
def test_a_mask_comes_back_from_its_canvas(size):
    side = canvas_side([SHAPE, SHAPE[:, :4]])
    assert side >= 1.6 * 8
    shown = on_canvas(SHAPE, side, size, np.random.default_rng(0))
    assert shown.shape == (3, size, size) and set(shown.unique().tolist()) == {0.0, 1.0}
    mask, reason = mask_of(shown, side, [SHAPE])
    assert reason == "" and mask.shape == (side, side) and abs(int(mask.sum()) - 32) <= 8


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ((0, 0, 0, 0), "it is empty"),
        ((1, 1, 31, 31), "its area is 900, that of the shots 32 to 32"),
        ((10, 10, 13, 13), "its area is 9, that of the shots 32 to 32"),
        ((0, 10, 6, 16), "it is cut off by the border"),
        ((10, 3, 12, 29), "its elongation is 15, that of the shots 2.05 to 2.05"),
    ],
)
def test_an_image_that_is_no_mask_says_why(box, reason):
    top, left, bottom, right = box
    gray = torch.full((3, 32, 32), 0.2)
    gray[:, top:bottom, left:right] = 0.9
    assert mask_of(gray, 32, [SHAPE])[1] == reason


def test_specks_are_dropped_and_large_parts_stay():
    gray = torch.zeros(3, 32, 32)
    gray[:, 8:13, 8:13] = gray[:, 20:23, 20:24] = gray[:, 28, 28] = 1
    mask, reason = mask_of(gray, 32, [SHAPE])
    assert mask.sum() == 37 and not mask[28, 28]
    assert reason == "its number of parts is 2, that of the shots 1 to 1"
    assert mask_of(gray, 32, [SHAPE, mask])[1] == ""


def test_a_ragged_mask_is_refused():
    gray = torch.zeros(3, 32, 32)
    gray[:, 12:18, 10:22] = 1
    gray[:, 13:18:2, 11:21:2] = 0
    assert mask_of(gray, 32, [SHAPE])[1].startswith("its roughness is")
