"""Metrics say what they should on images whose answer is known, and what they need when it is missing."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy import linalg
from torch import nn

pytest.importorskip("torchmetrics")

from dit_attn.errors import DitAttnError
from dit_attn.eval.extractors import Networks
from dit_attn.eval.metrics import METRICS, score
from tests._support.ranks import run_ranks


def random_images(n: int, size: int = 48, seed: int = 0) -> torch.Tensor:
    """Smooth random color fields."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(n, 3, 6, 6, generator=rng)
    fine = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    return (fine * 255).round().to(torch.uint8)


def noisy(images: torch.Tensor, sigma: float) -> torch.Tensor:
    noise = torch.randn(images.shape, generator=torch.Generator().manual_seed(1)) * sigma * 255
    return (images + noise).clamp(0, 255).round().to(torch.uint8)


class Colors(nn.Module):
    """Mean and spread of every color: features that anybody can compute again."""

    name = "colors"
    num_features = 6

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.double().flatten(2) / 255
        return torch.cat([x.mean(2), x.std(2)], 1)


WITH_COLORS = Networks(features=Colors())


@pytest.mark.parametrize("metric", ("psnr", "ssim", "ms-ssim"))
def test_pair_metrics_fall_with_noise(metric: str) -> None:
    images = random_images(3, 176)
    values = [score(metric, noisy(images, sigma), images).value for sigma in (0.02, 0.05, 0.2)]
    assert values == sorted(values, reverse=True) and METRICS[metric].better == "higher"
    assert score(metric, images, images).value > values[0]


def test_psnr_is_the_mean_over_images_of_the_formula() -> None:
    images, others = random_images(4), noisy(random_images(4), 0.1)
    error = ((images.double() - others.double()) / 255).square().flatten(1).mean(1)
    assert score("psnr", others, images).value == pytest.approx(float((-10 * torch.log10(error)).mean()), rel=1e-6)


def test_fid_agrees_with_an_independent_matrix_square_root() -> None:
    real, made = random_images(40, seed=1), noisy(random_images(30, seed=2), 0.1)
    a, b = (Colors()(x).numpy() for x in (real, made))
    covariances = [np.cov(x, rowvar=False) for x in (a, b)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    expected = np.square(a.mean(0) - b.mean(0)).sum() + np.trace(covariances[0] + covariances[1] - 2 * root)
    found = score("fid", made, real, networks=WITH_COLORS)
    assert found.value == pytest.approx(expected, rel=1e-4)
    assert found.label == "fid (colors)" and (found.samples, found.reference) == (30, 40) and found.caution is None


def test_distances_of_sets_grow_with_damage_and_know_their_own_noise() -> None:
    real, more = random_images(120, seed=1), random_images(120, seed=2)
    for metric in ("fid", "kid"):
        floor = score(metric, more, real, networks=WITH_COLORS).value
        damaged = [score(metric, noisy(more, s), real, networks=WITH_COLORS).value for s in (0.1, 0.2, 0.4)]
        assert damaged == sorted(damaged) and damaged[0] > floor
    few = score("fid", random_images(4), random_images(5), networks=WITH_COLORS)
    assert few.caution is not None and "4 samples for 6 features" in few.caution


def test_inception_score_rewards_diversity() -> None:
    class Brightness(nn.Module):
        name, num_features = "brightness", 2

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            bright = x.float().mean((1, 2, 3)) / 255
            return torch.stack([bright, 1 - bright], 1) * 40

    two = torch.cat([torch.full((20, 3, 8, 8), 30), torch.full((20, 3, 8, 8), 220)]).to(torch.uint8)
    networks = Networks(features=Brightness())
    torch.manual_seed(0)
    both, one = score("is", two, networks=networks), score("is", two[:20], networks=networks)
    assert both.value > 1.5 > one.value and both.spread is not None


@pytest.fixture(scope="module")
def tiny_clip(tmp_path_factory: Any) -> Path:
    """A CLIP model folder with a vocabulary of characters, as a user has one on disk."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = list("abcdefghijklmnopqrstuvwxyz")
    tokens = [*letters, *(c + "</w>" for c in letters), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    ends = {"bos_token_id": len(tokens) - 2, "eos_token_id": len(tokens) - 1, "pad_token_id": len(tokens) - 1}
    config = CLIPConfig(
        text_config={**size, **ends, "vocab_size": len(tokens), "max_position_embeddings": 32},
        vision_config={**size, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(3)
    CLIPModel(config).save_pretrained(folder)
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"))
    square = {"height": 16, "width": 16}
    CLIPProcessor(CLIPImageProcessor(size={"shortest_edge": 16}, crop_size=square), tokenizer).save_pretrained(folder)
    return folder


def test_clip_score_is_the_cosine_of_a_real_clip_model(tiny_clip: Path) -> None:
    from transformers import CLIPModel, CLIPProcessor

    images, captions = random_images(3), ["a red cat", "blue", "two green dogs"]
    found = score("clip", images, captions=captions, networks=Networks(clip=str(tiny_clip)))
    model, processor = CLIPModel.from_pretrained(tiny_clip).eval(), CLIPProcessor.from_pretrained(tiny_clip)
    inputs = processor(text=captions, images=list(images), return_tensors="pt", padding=True)
    with torch.no_grad():
        out = model(**inputs)
    cosines = (out.image_embeds * out.text_embeds).sum(-1)
    assert cosines.mean() > 0  # torchmetrics gives 0 below
    assert found.value == pytest.approx(100 * float(cosines.mean()), rel=1e-4)
    assert str(tiny_clip) in found.label


EVERYWHERE = ("fid", "kid", "psnr", "ssim", "fid-world", "kid-world", "clip-world")


def part_of_two(rank: int, folder: Path) -> None:
    """One of two processes: the metrics of its half of the images."""
    part = slice(0, 9) if rank == 0 else slice(9, None)  # unequal, as a last batch is
    made, real = noisy(random_images(24, seed=2), 0.1)[part], random_images(24, seed=1)[part]
    captions = ["a large red circle at the left on white"] * len(made)
    found = {name: score(name, made, real, captions, WITH_COLORS) for name in EVERYWHERE}
    if rank == 0:
        (folder / "scores.json").write_text(json.dumps({name: one.to_dict() for name, one in found.items()}))


def test_two_processes_get_the_score_of_all(tmp_path: Path) -> None:
    run_ranks(part_of_two, 2, tmp_path)
    found = json.loads((tmp_path / "scores.json").read_text())
    made, real = noisy(random_images(24, seed=2), 0.1), random_images(24, seed=1)
    captions = ["a large red circle at the left on white"] * len(made)
    assert set(found) == set(EVERYWHERE)
    for name, one in found.items():
        alone = score(name, made, real, captions, WITH_COLORS)
        assert (one["samples"], one["reference"]) == (24, None if name == "clip-world" else 24)
        assert one["value"] == pytest.approx(alone.value, rel=1e-5), name


def test_a_score_does_not_depend_on_batches_or_on_the_state_of_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    made, real = noisy(random_images(24, seed=2), 0.1), random_images(24, seed=1)
    captions = ["a large red circle at the left on white"] * len(made)
    names = (*EVERYWHERE, "is")
    whole = {name: score(name, made, real, captions, WITH_COLORS).value for name in names}
    monkeypatch.setattr("dit_attn.eval.metrics.BATCH", 5)
    torch.manual_seed(99)
    state = torch.get_rng_state()
    for name in names:
        found = score(name, made, real, captions, WITH_COLORS).value
        assert found == pytest.approx(whole[name], rel=1e-5), name
    assert torch.equal(torch.get_rng_state(), state)


def test_what_is_missing_is_named_with_the_way_out(tmp_path: Path) -> None:
    images = random_images(2)
    for metric, options, words in (
        ("fidd", {}, "unknown metric 'fidd'"),
        ("psnr", {}, "compares with reference images"),
        ("psnr", {"reference": random_images(3)}, "one by one"),
        ("ssim", {"reference": images.float()}, "must be uint8"),
        ("ms-ssim", {"reference": images}, "larger than 160 pixels"),
        ("clip", {}, "a caption for each of 2 images, none were"),
        ("clip", {"captions": ["a"]}, "a caption for each of 2 images, 1 were"),
        ("clip", {"captions": ["a", "b"], "networks": Networks(clip=str(tmp_path))}, "or use clip-world"),
        ("fid", {"reference": images[:1], "networks": WITH_COLORS}, "at least 2 reference images, got 1"),
        ("lpips", {"reference": images, "networks": Networks(lpips="res")}, "unknown LPIPS backbone"),
        ("lpips", {"reference": images, "networks": Networks(lpips_weights=tmp_path / "a.pth")}, "no LPIPS weights at"),
    ):
        with pytest.raises(DitAttnError, match=words):
            score(metric, images, **options)  # type: ignore[arg-type]


def test_fid_without_its_network_points_to_the_offline_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None)
    with pytest.raises(DitAttnError, match="pip install torch-fidelity; without network access use fid-world"):
        score("fid", random_images(2), random_images(2))


def test_inception_weights_that_cannot_be_read_or_fetched_name_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dit_attn.eval import extractors

    def build(feature_extractor_weights_path: str | None) -> None:
        if feature_extractor_weights_path is None:
            raise OSError("Network is unreachable")
        torch.load(feature_extractor_weights_path)

    (tmp_path / "broken.pth").write_bytes(b"no weights")
    given, path = Networks(inception=tmp_path / "broken.pth"), str(tmp_path / "broken.pth")
    for networks, file, words in ((given, path, "broken.pth cannot be read"), (Networks(), None, "unreach")):
        options = {"feature_extractor_weights_path": file}, "inception-v3"
        monkeypatch.setattr(extractors, "inception_options", lambda networks, options=options: options)
        with pytest.raises(DitAttnError, match=f"{words}.*--inception FILE with weights-inception.*fid-world"):
            extractors.with_inception(build, networks)


def test_lpips_weights_may_lie_anywhere(tmp_path: Path) -> None:
    from dit_attn.eval.extractors import BACKBONE_FILES, _hub_with

    torch.save({"weight": torch.ones(2)}, tmp_path / "mine.pth")
    before = torch.hub.get_dir()
    with _hub_with(tmp_path / "mine.pth", BACKBONE_FILES["alex"]):
        address = f"https://download.pytorch.org/models/{BACKBONE_FILES['alex']}"  # as torchvision asks for it
        found = torch.hub.load_state_dict_from_url(address)
    assert found["weight"].tolist() == [1.0, 1.0] and torch.hub.get_dir() == before
