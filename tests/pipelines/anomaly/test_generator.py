"""Learning and painting on tiny random pipelines: exact backgrounds, one seed one pair, gates with their controls."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.eval.inspection_world.world import Piece, draw
from dit_attn.pipelines.anomaly import (
    AnomalyGenerator,
    Backbone,
    Concept,
    Gate,
    GenerateConfig,
    MaskSource,
    TrainConfig,
)
from dit_attn.pipelines.anomaly.manifest import read_rows
from dit_attn.pipelines.anomaly.masks import augmented, drawn, foreground, placed
from dit_attn.pipelines.anomaly.orders import seed_of
from dit_attn.pipelines.anomaly.sources import from_folders
from dit_attn.pipelines.anomaly.training import ConceptTraining, masked_loss, train
from dit_attn.pipelines.anomaly.views import view_of
from tests._support.inspection_pipelines import data, tiny_pipeline

CONFIG = TrainConfig(steps=3, batch=2, tokens=2, mask_tokens=1, lora_rank=2, lora_after=0.0, save_every=2)
PAIR = ("metal", "hole")


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return from_folders(*data(tmp_path_factory.mktemp("data")), *PAIR)


@pytest.fixture(scope="module")
def learned(source, tmp_path_factory):
    """(pipe, concept file) after three steps."""
    pipe, folder = tiny_pipeline(), tmp_path_factory.mktemp("concept")
    train(Backbone(pipe, 32), source, CONFIG, folder)
    return pipe, folder / "concept.safetensors"


def _state(pipe):
    return {name: value.clone() for name, value in pipe.transformer.state_dict().items()}


def test_only_the_concept_learns_and_the_pipeline_is_as_before(source, tmp_path):
    pipe = tiny_pipeline()
    before, modules = _state(pipe), [type(m) for m in pipe.transformer.modules()]
    concept = train(Backbone(pipe, 32), source, CONFIG, tmp_path)
    after = _state(pipe)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert [type(m) for m in pipe.transformer.modules()] == modules
    assert all(p.requires_grad for p in pipe.transformer.parameters())
    assert any("lora_B" in name and value.any() for name, value in concept.lora.items())


@pytest.mark.parametrize("family", ["image", "joint"])
def test_resumed_training_is_uninterrupted_training(family, source, tmp_path):
    whole = train(Backbone(tiny_pipeline(family), 32), source, CONFIG, tmp_path / "whole")
    training = ConceptTraining(Backbone(tiny_pipeline(family), 32), source, CONFIG)
    from accelerate import Accelerator

    training.update(Accelerator(cpu=True))
    training.save(tmp_path / "cut")
    training.close()
    resumed = train(Backbone(tiny_pipeline(family), 32), source, CONFIG, tmp_path / "cut", resume=True)
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    assert all(torch.equal(value, resumed.lora[name]) for name, value in whole.lora.items())
    with pytest.raises(DitAttnError, match="belongs to a training with other settings"):
        train(Backbone(tiny_pipeline(family), 32), source, replace(CONFIG, lr=1.0), tmp_path / "cut", resume=True)


def test_recomputed_activations_teach_the_same(source, tmp_path):
    pipe = tiny_pipeline()
    stored, again = (
        train(Backbone(pipe, 32), source, CONFIG, tmp_path / str(on), checkpointing=on) for on in (False, True)
    )
    assert not pipe.transformer.is_gradient_checkpointing
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in stored.state_dict().items())
    assert all(torch.equal(value, again.lora[name]) for name, value in stored.lora.items())


def test_the_loss_does_not_depend_on_the_area_of_the_mask(source):
    training = ConceptTraining(Backbone(tiny_pipeline(), 32), source, replace(CONFIG, lora_rank=0))
    training.backbone.errors = lambda clean, *_: torch.ones_like(clean)
    clean = torch.zeros(1, 3, 32, 32)
    losses = []
    for size in (2, 20):
        mask = torch.zeros(1, 1, 32, 32)
        mask[..., :size, :size] = 1
        text = {key: value[:1] for key, value in training.texts.items()}
        given = (clean, clean, clean[:, 0, 0, 0], mask, torch.tensor([0]), text)
        losses.append(float(masked_loss(training.backbone, training.concept, *given)))
    assert losses[0] == pytest.approx(losses[1]) == pytest.approx(1.1)


def test_a_concept_file_gives_everything_back_and_refuses_others(learned, tmp_path):
    _pipe, path = learned
    concept = Concept.load(path)
    assert concept.settings.pairs == ("metal+hole",) and len(concept.shapes["metal+hole"]) == 2
    assert concept.settings.shots["learned"] == ["metal+hole/000.png", "metal+hole/001.png"]
    concept.save(tmp_path / "again.safetensors")
    again = Concept.load(tmp_path / "again.safetensors")
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in concept.state_dict().items())
    (tmp_path / "broken.safetensors").write_bytes(path.read_bytes()[:200])
    with pytest.raises(DitAttnError, match="is damaged"):
        Concept.load(tmp_path / "broken.safetensors")
    with pytest.raises(DitAttnError, match="was learned on PixArtSigmaPipeline, not StableDiffusion3Pipeline"):
        AnomalyGenerator(tiny_pipeline("joint"), concept)


@pytest.mark.parametrize("family", ["image", "joint"])
def test_the_background_is_the_normal_image_byte_for_byte(family, source):
    generator = AnomalyGenerator(tiny_pipeline(family), None, GenerateConfig(steps=3, feather=2), resolution=32)
    masks = MaskSource("real", [source.shots[0].read()[1]])
    orders = [generator.order(*PAIR, i, 0, source.normals["metal"], masks) for i in range(2)]
    made = generator.make(orders)
    alone = generator.make(orders[1:])
    np.testing.assert_allclose(alone[0].image.astype(int), made[1].image.astype(int), atol=1)  # a batch changes nothing
    for one in made:
        from scipy import ndimage

        outside = ndimage.distance_transform_edt(~one.order.mask) > 2
        np.testing.assert_array_equal(one.image[outside], one.order.pixels[outside])
        assert (one.image[one.order.mask] != one.order.pixels[one.order.mask]).any()


def test_a_run_meets_its_quota_resumes_and_keeps_rejects_apart(learned, source, tmp_path):
    pipe, path = learned
    concept = Concept.load(path)
    config = GenerateConfig(steps=2, batch=2, retries=1)
    generator = AnomalyGenerator(pipe, concept, config)
    masks = {PAIR: MaskSource("real", concept.shapes["metal+hole"])}
    before = _state(pipe)
    summary = generator.run(tmp_path / "a", source.normals, {PAIR: 3}, masks, controls=1)
    after = _state(pipe)
    assert all(torch.equal(before[name], after[name]) for name in before)
    rows = read_rows(tmp_path / "a" / "manifest.jsonl")
    told = summary["pairs"]["metal+hole"]
    assert told["accepted"] + told["missing"] == 3 and told["rejected"] == sum(bool(row["reason"]) for row in rows)
    assert len(rows) <= 6 and summary["controls"]["metal+hole"]["count"] == 1
    for row in rows:
        assert (tmp_path / "a" / row["generated"]).is_file() and row["generated"].startswith(row["decision"])
    # An interrupted run goes on to the same files.
    text = (tmp_path / "a" / "manifest.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "manifest.jsonl").write_text(text[0] + text[1][: len(text[1]) // 2] + "\n")
    generator.run(tmp_path / "b", source.normals, {PAIR: 3}, masks, controls=0)
    key = lambda row: (row["number"], row["attempt"])  # noqa: E731
    again = sorted(read_rows(tmp_path / "b" / "manifest.jsonl"), key=key)
    assert [row["seed"] for row in again] == [row["seed"] for row in sorted(rows, key=key)]


def test_seeds_depend_on_the_pair_and_nothing_else():
    assert seed_of(0, "nut", "hole", 1, 0) == seed_of(0, "nut", "hole", 1, 0) != seed_of(0, "nut", "hole", 1, 1)
    assert len({seed_of(run, "nut", "hole", i, 0) for run in range(3) for i in range(50)}) == 150


@pytest.mark.parametrize(("product", "defect"), [("metal", "scratch"), ("granite", "contamination"), ("nut", "crack")])
def test_the_gate_accepts_true_defects_and_refuses_normal_images(product, defect):
    def pieces(first, count):
        return [draw(Piece(product, defect, seed), 64) for seed in range(first, first + count)]

    shots = [(one.image, one.mask) for one in pieces(0, 5)]
    controls = [(one.normal, one.mask) for one in pieces(100, 24)]
    gate = Gate.from_dict(json.loads(json.dumps(Gate.fit(shots, controls).to_dict())))
    held = pieces(1000, 20)
    true = [gate.verdict(gate.score(one.image, one.normal, one.mask)) for one in held]
    none = [gate.verdict(gate.score(one.normal, one.normal, one.mask)) for one in held]
    assert sum(not reason for reason in true) >= 19
    assert sum(not reason for reason in none) <= 1


def test_the_gate_sees_a_part_of_the_mask_that_was_left_out():
    one = draw(Piece("metal", "hole", 3), 64)
    gate = Gate.fit([(one.image, one.mask)], [(one.normal, one.mask)])
    second = np.roll(one.mask, 30, axis=1)
    scores = gate.score(one.image, one.normal, one.mask | second)
    assert scores.part_fill < 0.1 and gate.verdict(scores)


def test_masks_lie_on_the_product_and_keep_their_size():
    rng = np.random.default_rng(0)
    piece = draw(Piece("nut", "stain", 1), 64)
    pixels = (piece.normal * 255).astype(np.uint8)
    region = foreground(pixels)
    assert 0.2 < region.mean() < 0.6 and (region & piece.foreground).sum() > 0.9 * piece.foreground.sum()
    metal = (draw(Piece("metal", "", 1), 64).image * 255).astype(np.uint8)
    assert foreground(metal).all()
    for make in (lambda: augmented(piece.mask, rng), lambda: drawn([piece.mask], rng)):
        found = [make() for _ in range(10)]
        areas = [one.sum() / piece.mask.sum() for one in found]
        assert min(areas) > 0.4 and max(areas) < 2.5
        assert all(not (placed(one, region, rng) & ~region).any() for one in found[:3])
    with pytest.raises(DitAttnError, match="fits nowhere on the product"):
        placed(np.ones((70, 70), bool), region, rng)


def test_a_crop_holds_the_mask_and_pastes_back_without_a_seam():
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 255, (200, 300, 3), dtype=np.uint8)
    mask = np.zeros((200, 300), bool)
    mask[150:170, 20:60] = True
    for draws in (None, rng):
        view = view_of(mask, 64, rng=draws)
        assert view.height == view.width >= 64 and mask[view.box].sum() == mask.sum()
        assert view.image(pixels).shape == (3, 64, 64) and view.mask(mask).max() == 1
    pasted = view.paste(torch.ones(3, 64, 64), pixels, mask, feather=2)
    assert (pasted[mask] == 255).all()
    far = np.ones_like(mask)
    far[147:173, 17:63] = False
    np.testing.assert_array_equal(pasted[far], pixels[far])
    thin = np.zeros((200, 300), bool)
    thin[100, 10:290] = True
    assert view_of(thin, 64, "none").mask(thin).any()
