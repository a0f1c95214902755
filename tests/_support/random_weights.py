"""Files of random weights for the networks of LPIPS and FID, with the names and shapes of the published ones."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
import torch
from torch import nn

BACKBONES = {"alex": "alexnet", "vgg": "vgg16", "squeeze": "squeezenet1_1"}
_HEADS = ("classifier", "fc.")  # LPIPS and FID end before the layers that tell classes


def lpips_weights(backbone: str, folder: Path) -> Path:
    """The file that ``--lpips-weights`` takes; skips the test where torchvision is not installed."""
    models = pytest.importorskip("torchvision.models", reason="LPIPS needs torchvision, which is not installed")
    with torch.device("meta"):
        network = getattr(models, BACKBONES[backbone])(weights=None)
    return _save(network, folder / f"{backbone}.pth")


def inception_weights(folder: Path) -> Path:
    """The file that ``--inception`` takes; skips the test where torch-fidelity is not installed."""
    name = "torch_fidelity.feature_extractor_inceptionv3"
    module = pytest.importorskip(name, reason="FID needs torch-fidelity, which is not installed")
    kind = module.FeatureExtractorInceptionV3
    with torch.device("meta"), mock.patch.object(kind, "load_state_dict"), mock.patch.object(torch, "load"):
        network = kind("inception-v3-compat", ["2048"], "no file")
    return _save(network, folder / "inception.pth")


def _save(network: nn.Module, file: Path) -> Path:
    """Save random weights that keep the size of a signal; a layer that is not used takes one number on the disk."""
    numbers, weights = torch.Generator().manual_seed(0), {}
    for name, value in network.state_dict().items():
        if name.startswith(_HEADS):
            weights[name] = torch.zeros(()).expand(value.shape)
        elif value.ndim > 1:
            weights[name] = torch.randn(value.shape, generator=numbers) * (2 / value[0].numel()) ** 0.5
        else:
            ones = name.endswith(("weight", "running_var"))
            weights[name] = torch.full(value.shape, int(ones), dtype=value.dtype)
    torch.save(weights, file)
    return file
