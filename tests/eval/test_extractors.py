"""The networks behind LPIPS and FID, with random weights: from a file of weights to the score."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dit_attn.errors import DitAttnError
from dit_attn.eval.extractors import BACKBONE_FILES, Networks, lpips_metric, with_inception
from dit_attn.eval.metrics import score
from tests._support.random_weights import BACKBONES, inception_weights, lpips_weights
from tests.eval.test_metrics import noisy, random_images


@pytest.mark.parametrize("backbone", BACKBONES)
def test_lpips_grows_with_damage_on_every_backbone(backbone: str, tmp_path: Path) -> None:
    networks = Networks(lpips=backbone, lpips_weights=lpips_weights(backbone, tmp_path))
    metric, images = lpips_metric(networks), random_images(2, 64)
    same, little, much = (float(metric(noisy(images, sigma) / 255, images / 255)) for sigma in (0.0, 0.05, 0.4))
    assert same == 0.0 < little < much


def test_lpips_is_the_weighted_distance_of_normalised_features(tmp_path: Path) -> None:
    """Zhang et al., arXiv 1801.03924, equation 1, over the five layers of AlexNet behind their rectifiers."""
    file = lpips_weights("alex", tmp_path)
    from torchvision.models import alexnet

    networks = Networks(lpips_weights=file)
    images, others = random_images(2, 64), noisy(random_images(2, 64), 0.2)
    weights = torch.load(file)
    features = alexnet(weights=None).features
    features.load_state_dict({name: weights[f"features.{name}"] for name in features.state_dict()})
    heads = [module.model[-1].weight[0].double() for module in lpips_metric(networks).net.lins]
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])

    def stages(x: torch.Tensor) -> list[torch.Tensor]:
        x, found = ((2 * (x / 255) - 1) - shift[:, None, None]) / scale[:, None, None], []
        for layer in features:
            x = layer(x)
            if isinstance(layer, nn.ReLU):
                found.append(x.double())
        return [part / part.norm(dim=1, keepdim=True) for part in found]

    with torch.no_grad():
        expected = sum(
            (weight * (a - b).square()).sum(1).mean((1, 2))
            for a, b, weight in zip(stages(images), stages(others), heads, strict=True)
        )
    found = score("lpips", others, images, networks=networks)
    assert found.value == pytest.approx(float(expected.mean()), rel=1e-4)
    assert found.label == "lpips (alex)" and found.better == "lower"


def test_weights_of_another_backbone_are_told(tmp_path: Path) -> None:
    with pytest.raises(DitAttnError, match=f"are not those of alex .*give the file {BACKBONE_FILES['alex']}"):
        lpips_metric(Networks(lpips_weights=lpips_weights("squeeze", tmp_path)))


def test_the_inception_network_has_the_weights_that_are_given(tmp_path: Path) -> None:
    file = inception_weights(tmp_path)
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric, judge = with_inception(FrechetInceptionDistance, Networks(inception=file))
    weights = torch.load(file)
    assert all(torch.equal(value, weights[name]) for name, value in metric.inception.state_dict().items())
    same, other = (metric.inception(images) for images in (random_images(2), noisy(random_images(2), 0.2)))
    assert judge == "inception-v3" and same.shape == (2, 2048)
    assert (same - other).abs().max() > 1e-2


@pytest.mark.parametrize("metric", ("kid", "is"))
def test_scores_by_the_inception_network(metric: str, tmp_path: Path) -> None:
    images, reference = noisy(random_images(3), 0.2), random_images(3, seed=1) if metric == "kid" else None
    found = score(metric, images, reference, networks=Networks(inception=inception_weights(tmp_path)))
    assert found.label == f"{metric} (inception-v3)"
    assert found.value > 0 if metric == "kid" else 1 <= found.value <= 3
