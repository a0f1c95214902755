"""Metrics of a comparison: the arithmetic agrees with torchmetrics, nothing crashes, and every gap has a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dit_attn.errors import DitAttnError
from dit_attn.eval.extractors import Networks
from dit_attn.eval.shapes_world import world
from dit_attn.pipelines.compare import metrics
from dit_attn.pipelines.compare.records import ItemResult
from dit_attn.pipelines.compare.set_distances import frechet_distance, kernel_distance
from tests._support.random_weights import inception_weights, lpips_weights


class Means(nn.Module):
    """Features (N, 12): means of a 2 x 2 grid of every channel, and something uneven."""

    name = "means"
    num_features = 12

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return nn.functional.adaptive_avg_pool2d(images.float(), 2).flatten(1) / 16


def comparison(count: int, noise: float, size: int = 32, frames: int = 1) -> tuple[list[ItemResult], Any]:
    """Takes of dense and of ``a``, whose pixels are those of dense with noise; and how they are read."""
    scenes = [item for item in world.held_out_sample("image", count) if isinstance(item, world.Scene)]
    images = (world.render_scenes(scenes, size) * 255).round().permute(0, 2, 3, 1).numpy()
    rng, store, results = np.random.default_rng(0), {}, []
    for index, scene in enumerate(scenes):
        for label, strength in (("dense", 0.0), ("a", noise)):
            video = images[index][None].repeat(frames, 0) + strength * rng.normal(size=(frames, size, size, 3))
            store[label, index] = video.clip(0, 255).astype(np.uint8)
            results.append(ItemResult(label, index, world.caption(scene), index))
    return results, lambda result: store[result.variant, result.index]


@pytest.mark.parametrize("shape", [(60, 12), (8, 12), (13, 12)], ids=["many", "few", "about as many as features"])
def test_the_distances_are_those_of_torchmetrics(shape: tuple[int, int]) -> None:
    pytest.importorskip("torchmetrics")
    from torchmetrics.image.fid import FrechetInceptionDistance
    from torchmetrics.image.kid import poly_mmd

    torch.manual_seed(0)
    a, b = torch.randn(shape, dtype=torch.float64), 1.5 * torch.randn(shape, dtype=torch.float64) + 0.3

    class Passed(nn.Module):
        num_features = 12

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x

    metric = FrechetInceptionDistance(feature=Passed()).set_dtype(torch.float64)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert frechet_distance(a, b) == pytest.approx(float(metric.compute()), rel=1e-4)
    assert kernel_distance(a, b) == pytest.approx(float(poly_mmd(a, b)))
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)


def test_the_world_metrics_need_nothing_and_fall_with_noise() -> None:
    names = ("fid-world", "kid-world", "clip-world")
    little, much = (metrics.measure_metrics(names, *comparison(8, noise))["a"] for noise in (4.0, 60.0))
    assert little["fid-world"]["value"] < much["fid-world"]["value"]
    assert little["kid-world"]["value"] < much["kid-world"]["value"]
    assert little["clip-world"]["value"] > much["clip-world"]["value"]
    assert little["fid-world"]["label"] == "fid-world (world-clip, against dense)"
    assert little["clip-world"]["label"] == "clip-world (world-clip)" and little["clip-world"]["n"] == 8
    low, high = much["fid-world"]["ci95"]
    assert low <= much["fid-world"]["value"] <= high and "8 images for 96 features" in much["fid-world"]["caution"]


def test_lpips_and_the_inception_network_take_the_weights_that_are_given(tmp_path: Path) -> None:
    networks = Networks(inception=inception_weights(tmp_path), lpips_weights=lpips_weights("alex", tmp_path))
    from torchmetrics.image.fid import NoTrainInceptionV3

    results, read = comparison(3, 30.0, size=64)
    found = metrics.measure_metrics(("fid", "kid", "lpips"), results, read, networks)["a"]
    features = NoTrainInceptionV3("inception-v3-compat", ["2048"], str(networks.inception))
    features.name = "the same"
    expected = metrics.measure_metrics(("kid",), results, read, Networks(features=features))["a"]
    assert found["kid"]["value"] == pytest.approx(expected["kid"]["value"], rel=1e-4)
    assert "inception-v3" in found["kid"]["label"] and "inception-v3" in found["fid"]["label"]
    assert found["fid"]["value"] > 0 and found["lpips"]["value"] > 0 and found["lpips"]["n"] == 3
    assert "alex" in found["lpips"]["label"]


def test_dense_has_the_scores_that_need_no_reference_only() -> None:
    found = metrics.measure_metrics(("fid-world", "clip-world"), *comparison(4, 9.0))["dense"]
    assert found["fid-world"]["value"] is None and "compared with" in found["fid-world"]["why"]
    assert found["clip-world"]["value"] > 60


def test_network_features_are_read_once_for_all_metrics_and_clips_count_frames() -> None:
    pytest.importorskip("torchmetrics")
    calls = []
    network = Means()
    network.register_forward_hook(lambda module, args, out: calls.append(len(args[0])))
    results, read = comparison(4, 20.0, frames=3)
    found = metrics.measure_metrics(("fid", "kid"), results, read, Networks(features=network))["a"]
    assert sum(calls) == 4 * 2 * 3
    assert found["fid"]["images"] == 12 and found["fid"]["n"] == 4 and found["fid"]["label"].startswith("fid (means")
    assert found["fid"]["value"] > 0 and found["kid"]["better"] == "lower"


def test_too_few_samples_and_small_pictures_give_a_reason_and_no_crash() -> None:
    pytest.importorskip("torchmetrics")
    found = metrics.measure_metrics(("fid-world", "ms-ssim"), *comparison(1, 5.0))["a"]
    assert found["fid-world"]["value"] is None
    assert found["fid-world"]["why"] == "fid-world needs at least 2 items made by both, there are 1"
    assert found["ms-ssim"]["value"] is None and "160 pixels" in found["ms-ssim"]["why"]


def test_pair_metrics_are_a_mean_over_items_with_an_interval() -> None:
    pytest.importorskip("torchmetrics")
    from dit_attn.eval.metrics import score

    results, read = comparison(2, 30.0, size=192)
    found = metrics.measure_metrics(("ms-ssim",), results, read)["a"]["ms-ssim"]
    images = [torch.from_numpy(read(result)).permute(0, 3, 1, 2) for result in results]
    each = [score("ms-ssim", ours, dense).value for dense, ours in (images[:2], images[2:])]
    assert found["value"] == pytest.approx(sum(each) / 2) and found["ci95"] == pytest.approx(sorted(each))


def test_failed_items_are_left_out_on_both_sides() -> None:
    results, read = comparison(4, 9.0)
    results[1].error = results[2].error = "RuntimeError: no"  # a of item 0, dense of item 1
    found = metrics.measure_metrics(("fid-world", "clip-world"), results, read)["a"]
    assert found["fid-world"]["n"] == 2 and found["clip-world"]["n"] == 2


def test_intervals_leave_out_whole_prompts() -> None:
    results, read = comparison(4, 9.0)
    for result in results:
        result.prompt = results[0].prompt
    found = metrics.measure_metrics(("fid-world", "clip-world"), results, read)["a"]
    assert found["fid-world"]["ci95"] is None and found["clip-world"]["ci95"] is None


@pytest.mark.parametrize(
    ("names", "networks", "parts"),
    [
        (("fib",), None, "unknown metric"),
        (("clip",), Networks(clip="/no/such/folder"), "no CLIP model '/no/such/folder'"),
        (("fid",), Networks(inception=Path("nowhere.pth")), "nclude|nception|torch-fidelity"),
        (("lpips",), Networks(lpips="squeeze"), "LPIPS needs"),
    ],
)
def test_a_network_that_is_not_there_is_known_before_anything_is_made(
    names: tuple[str, ...], networks: Networks | None, parts: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pytest.importorskip("torchmetrics")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    with pytest.raises(DitAttnError, match=parts):
        metrics.check_metrics(names, networks)


def test_weights_that_would_be_downloaded_are_not_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    options: tuple[dict[str, Any], str] = {"feature_extractor_weights_path": None}, "inception-v3"
    monkeypatch.setattr("dit_attn.pipelines.compare.scorers.inception_options", lambda networks: options)
    with pytest.raises(DitAttnError, match=r"weights-inception.*--inception FILE.*fid-world"):
        metrics.check_metrics(("kid",))


def test_the_clip_score_reads_the_model_that_is_given() -> None:
    pytest.importorskip("torchmetrics")
    from dit_attn.eval.shapes_world.world_clip import FOLDER

    found = metrics.measure_metrics(("clip", "clip-world"), *comparison(3, 10.0, size=64), Networks(clip=str(FOLDER)))[
        "a"
    ]
    assert found["clip"]["value"] == pytest.approx(found["clip-world"]["value"], abs=0.5)
    assert str(FOLDER) in found["clip"]["label"]


def test_defects_are_judged_by_the_world_for_dense_as_well() -> None:
    results, read = comparison(3, 0.0)

    def stronger(result: ItemResult) -> np.ndarray:
        gray = read(result).mean(-1, keepdims=True)
        gain = 1 if result.variant == "dense" else 2
        return (gray + gain * (read(result) - gray)).clip(0, 255).round().astype(np.uint8)

    found = metrics.measure_metrics(("saturation", "artifact-rate"), results, stronger)
    assert found["dense"]["saturation"]["value"] == 0.0 and found["dense"]["artifact-rate"]["value"] == 0.0
    assert found["a"]["saturation"]["value"] > 0.5 and found["a"]["saturation"]["better"] == "lower"
    assert found["a"]["artifact-rate"]["n"] == 3 and "verifier" in found["a"]["artifact-rate"]["label"]


def test_other_prompts_are_held_against_dense_and_have_no_artifact_rate() -> None:
    results, read = comparison(2, 0.0)
    for result in results:
        result.prompt = "a cat"
    found = metrics.measure_metrics(("saturation", "artifact-rate"), results, read)
    assert found["a"]["saturation"]["value"] == 0.0 and found["a"]["saturation"]["n"] == 2
    assert found["dense"]["saturation"]["value"] is None and "compared with" in found["dense"]["saturation"]["why"]
    assert found["a"]["artifact-rate"]["value"] is None and "shapes world only" in found["a"]["artifact-rate"]["why"]
