"""Has a segmenter learned the traces of the model instead of the defect? Normal images that carry only the traces.

Generated pairs went through an autoencoder and a sampler inside their masks, normal images did not; a segmenter that
learns this difference finds nothing on real images. So normal test images get the same treatment without any defect:
``decoded`` through the autoencoder and pasted along a mask as generated pairs are, ``painted`` by the model with the
prompt of the normal product. What the maps say inside the mask is compared with what they say of the ``untouched``
image at the same place. A pixel AUROC of 0.5, or that of the untouched image, means that nothing was learned of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from dit_attn.errors import DitAttnError
from dit_attn.pipelines.anomaly.benchmark.scores import area_above
from dit_attn.pipelines.anomaly.benchmark.segmenter import UNet, predict, resized, resized_masks
from dit_attn.pipelines.anomaly.generator import AnomalyGenerator
from dit_attn.pipelines.anomaly.masks import MaskSource, foreground
from dit_attn.pipelines.anomaly.orders import Order, seed_of
from dit_attn.pipelines.anomaly.views import view_of


@dataclass(frozen=True)
class Traces:
    """Normal images that were treated inside masks.

    Attributes:
        masks: (N, 1, S, S) in {0, 1}.
        images: (N, 3, S, S) by what was done.
    """

    masks: torch.Tensor
    images: dict[str, torch.Tensor]

    def score(self, model: UNet) -> dict[str, float]:
        """Return the pixel AUROC of a segmenter's maps for the masks, by what was done."""
        return {name: area_above(predict(model, images), self.masks[:, 0] > 0) for name, images in self.images.items()}


def make_traces(
    generator: AnomalyGenerator, product: str, defect: str, normals: Sequence[np.ndarray],
    shapes: Sequence[np.ndarray], size: int, seed: int,
) -> Traces:  # fmt: skip
    """Treat normal images.

    Args:
        generator: of the model, without a concept.
        product, defect: names.
        normals: images (H, W, 3) uint8.
        shapes: masks of real shots.
        size: pixels along a side at which the segmenter sees them.
        seed: of places and noise.
    """
    orders = []
    for i, pixels in enumerate(normals):
        rng = np.random.default_rng(seed_of(seed, product, defect, i, "traces"))
        try:
            mask = MaskSource("real", list(shapes)).sample(foreground(pixels), rng)
        except DitAttnError:  # the shapes are of larger images
            continue
        orders.append(Order(product, defect, i, 0, Path(), pixels, mask, seed_of(seed, product, defect, i, "noise")))
    batch = generator.config.batch
    painted = [
        made.image
        for start in range(0, len(orders), batch)
        for made in generator.make(orders[start : start + batch], control=True)
    ]
    done = {
        "untouched": [order.pixels for order in orders],
        "decoded": [round_trip(generator, order) for order in orders],
        "painted": painted,
    }
    masks = resized_masks([order.mask for order in orders], size)
    return Traces(masks, {name: resized(images, size) for name, images in done.items()})


def round_trip(generator: AnomalyGenerator, order: Order) -> np.ndarray:
    """Send the view of a normal image through the autoencoder and paste it along the mask, as a pair is pasted."""
    config, backbone = generator.config, generator.backbone
    view = view_of(order.mask, backbone.resolution, config.crop)
    back = backbone.round_trip(view.image(order.pixels)[None])[0]
    return view.paste(back, order.pixels, order.mask, config.feather)
