"""Weights of adaptive re-weighting while a batch is painted: from the clean prediction of every step to the next step.

Where the clean prediction still looks like the normal image, nothing is painted yet, and the cell is to attend more to
the learned vectors; see :class:`~dit_attn.processors.methods.adaptive_reweighting.AdaptiveReweighting`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dit_attn.pipelines.anomaly.backbone import Backbone
from dit_attn.processors.attach.session import Session
from dit_attn.processors.core.row_weights import RowWeights
from dit_attn.processors.methods.adaptive_reweighting import AdaptiveReweighting


class Reweighting:
    """Weights of one batch.

    Args:
        method: the settings.
        session: of the pipeline with the method enabled; it gets the weights.
        normal: latents of the normal images, in the pipeline's form.
        region: (B, h, w) bool, the tokens that the masks touch.
        columns: (L,) bool, which tokens of the text are the concept.
    """

    def __init__(
        self, method: AdaptiveReweighting, session: Session, normal: torch.Tensor, region: torch.Tensor,
        columns: torch.Tensor,
    ):  # fmt: skip
        self.method, self.session, self.normal = method, session, normal
        self.region, self.columns = region.cpu(), columns[None].cpu()
        self.weights: torch.Tensor | None = None
        self._give(torch.ones(self.region.shape))

    def update(self, predicted: torch.Tensor) -> None:
        """Set the weights of the next step from the clean prediction of this one, in the pipeline's form."""
        change = token_change(predicted, self.normal, self.region.shape[1:]).cpu()
        self.weights = self.method.next_weights(change, self.region, self.weights)
        self._give(self.weights)

    def _give(self, weights: torch.Tensor) -> None:
        self.session.given[self.method.slug] = RowWeights(weights, self.columns, self.region)


def token_change(predicted: torch.Tensor, normal: torch.Tensor, grid: Sequence[int]) -> torch.Tensor:
    """Return the mean squared difference of latents over each token, (B, h, w) fp32.

    Args:
        predicted, normal: (B, C, H, W), or (B, h * w, C) where the pipeline packs them.
        grid: (h, w) tokens.
    """
    height, width = grid
    square = (predicted.float() - normal.to(predicted.device, torch.float32)).square()
    if square.ndim == 3:
        return square.mean(-1).unflatten(1, (height, width))
    return square.mean(1).unflatten(2, (width, -1)).unflatten(1, (height, -1)).mean((2, 4))


def touched_tokens(backbone: Backbone, masks: torch.Tensor) -> torch.Tensor:
    """Return the tokens that masks (B, 1, H, W) touch, (B, h, w) bool."""
    return backbone.cells(masks, backbone.cell)[:, 0] > 0
