"""A small U-Net that segments defects, trained for a fixed number of steps: no arm gets more of anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from dit_attn.pipelines.anomaly.benchmark.arms import Sample


@dataclass(frozen=True)
class SegmenterConfig:
    """How the U-Net is trained.

    Attributes:
        size: pixels along a side at which it sees images.
        width: channels of its first level.
        steps: of the optimizer.
        batch: images per step: half are normal, half have a defect; of those half are real where there are others.
        lr: highest learning rate, of a one-cycle schedule.
        flips: mirror and turn images: ``"both"``, ``"horizontal"`` or ``"none"``.
    """

    size: int = 64
    width: int = 16
    steps: int = 1000
    batch: int = 8
    lr: float = 2e-3
    flips: str = "both"


class UNet(nn.Module):
    """Segment images: (B, 3, H, W) in [0, 1] -> logits (B, 1, H, W); sides are multiples of 8.

    Four levels with skips (Ronneberger et al., U-Net, 2015); group norm, so that an image's map depends on no other.

    Args:
        width: channels of the first level, doubled at each.
    """

    def __init__(self, width: int = 16):
        super().__init__()
        channels = [width * 2**level for level in range(4)]
        self.down = nn.ModuleList(_block(a, b) for a, b in zip((3, *channels), channels))
        self.up = nn.ModuleList(_block(a + b, a) for a, b in pairwise(channels))
        self.head = nn.Conv2d(width, 1, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return logits."""
        x, skips = x * 2 - 1, []
        for level, block in enumerate(self.down):
            x = block(F.max_pool2d(x, 2) if level else x)
            skips.append(x)
        x = skips.pop()
        for block in reversed(self.up):
            skip = skips.pop()
            x = block(torch.cat([skip, F.interpolate(x, skip.shape[2:], mode="bilinear", align_corners=False)], 1))
        return self.head(x)


def _block(inner: int, outer: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for channels in (inner, outer):
        layers += [nn.Conv2d(channels, outer, 3, padding=1, bias=False), nn.GroupNorm(max(1, outer // 8), outer)]
        layers.append(nn.ReLU(inplace=True))
    return nn.Sequential(*layers)


def resized(images: Sequence[np.ndarray], size: int) -> torch.Tensor:
    """Bring images (H, W, 3) uint8 to (N, 3, size, size) in [0, 1]."""
    return torch.cat([_image(one, size) for one in images]) if images else torch.zeros(0, 3, size, size)


def resized_masks(masks: Sequence[np.ndarray], size: int) -> torch.Tensor:
    """Bring masks (H, W) bool to (N, 1, size, size) in {0, 1}: 1 wherever a pixel of the mask falls."""
    out = [_mask(one, size) for one in masks]
    return torch.cat(out) if out else torch.zeros(0, 1, size, size)


def _image(pixels: np.ndarray, size: int) -> torch.Tensor:
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float() / 255
    if image.shape[2:] == (size, size):
        return image
    return F.interpolate(image, (size, size), mode="bilinear", antialias=True, align_corners=False)


def _mask(mask: np.ndarray, size: int) -> torch.Tensor:
    found = torch.from_numpy(np.ascontiguousarray(mask)).float()[None, None]
    if found.shape[2:] == (size, size):
        return found
    return F.adaptive_max_pool2d(found, size) if min(mask.shape) >= size else F.interpolate(found, (size, size))


class Data:
    """Images of one training at the U-Net's size.

    Args:
        normals: images (H, W, 3) uint8.
        real, made: pairs.
        config: sizes and flips.
    """

    def __init__(
        self, normals: Sequence[np.ndarray], real: Sequence[Sample], made: Sequence[Sample], config: SegmenterConfig
    ):
        size = config.size
        self.config = config
        images = resized(normals, size)
        self.kinds = {"normal": (images, torch.zeros(len(images), 1, size, size))}
        for name, pairs in (("real", real), ("made", made)):
            if pairs:
                self.kinds[name] = resized([p for p, _ in pairs], size), resized_masks([m for _, m in pairs], size)

    def batch(self, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw images (B, 3, size, size) and masks (B, 1, size, size)."""
        count = self.config.batch
        defects = count // 2
        made = defects // 2 if "made" in self.kinds else 0
        kinds = ["normal"] * (count - defects) + ["real"] * (defects - made) + ["made"] * made
        images, masks = zip(*(self._draw(kind, rng) for kind in kinds))
        return torch.stack(images), torch.stack(masks)

    def _draw(self, kind: str, rng: np.random.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        images, masks = self.kinds[kind]
        index = int(rng.integers(len(images)))
        across, over, turned = rng.uniform(size=3) < 0.5  # drawn for every kind, so that arms share them
        flips = self.config.flips
        dims = [2] * bool(across and flips != "none") + [1] * bool(over and flips == "both")
        image, mask = (one[index].flip(dims) if dims else one[index] for one in (images, masks))
        if turned and flips == "both":
            image, mask = image.transpose(1, 2), mask.transpose(1, 2)
        return image, mask


def fit(data: Data, config: SegmenterConfig, seed: int, device: str | torch.device = "cpu") -> UNet:
    """Train a U-Net; weights at the start, normal images and flips depend on ``seed`` alone. The last weights are kept.

    Args:
        data: images.
        config: how.
        seed: of everything random.
        device: where.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UNet(config.width).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config.lr, total_steps=max(2, config.steps))
    for step in range(config.steps):
        images, masks = (one.to(device) for one in data.batch(np.random.default_rng((seed, step))))
        loss = segmentation_loss(model(images), masks)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


def segmentation_loss(logits: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Add binary cross-entropy and soft Dice loss of the batch; both (B, 1, H, W)."""
    found = logits.sigmoid()
    dice = 1 - (2 * (found * masks).sum() + 1) / (found.sum() + masks.sum() + 1)
    return F.binary_cross_entropy_with_logits(logits, masks) + dice


@torch.no_grad()
def predict(model: UNet, images: torch.Tensor, batch: int = 32) -> torch.Tensor:
    """Return the probability of a defect, (N, H, W) float64 on the CPU: in double, high ones stay apart."""
    device = next(model.parameters()).device
    parts = [model(part.to(device)).cpu() for part in images.split(batch)]
    return torch.cat(parts)[:, 0].double().sigmoid()
