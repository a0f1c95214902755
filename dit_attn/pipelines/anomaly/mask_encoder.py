"""The mask encoder that all defects share: where the defect is, as vectors of text."""

from __future__ import annotations

import torch


class MaskEncoder(torch.nn.Module):
    """Encode masks as text vectors: (B, 1, H, W) -> (B, tokens, width), zero before training.

    Learned queries attend to an 8 x 8 grid of features; no statistic is shared over the batch.
    """

    def __init__(self, tokens: int, width: int, hidden: int = 64):
        super().__init__()
        layers: list[torch.nn.Module] = []
        for inner, outer in ((1, hidden // 2), (hidden // 2, hidden), (hidden, hidden)):
            layers += [torch.nn.Conv2d(inner, outer, 3, 2, 1), torch.nn.GroupNorm(8, outer), torch.nn.SiLU()]
        self.features = torch.nn.Sequential(*layers)
        self.places = torch.nn.Parameter(0.1 * torch.randn(64, hidden))
        self.queries = torch.nn.Parameter(torch.randn(tokens, hidden))
        self.attention = torch.nn.MultiheadAttention(hidden, 4, batch_first=True)
        self.out = torch.nn.Linear(hidden, width)
        torch.nn.init.zeros_(self.out.weight)
        torch.nn.init.zeros_(self.out.bias)

    def forward(self, masks: torch.Tensor) -> torch.Tensor:
        """Encode (B, 1, H, W) in {0, 1}."""
        grid = self.features(torch.nn.functional.adaptive_avg_pool2d(masks, 64)).flatten(2).transpose(1, 2)
        queries = self.queries.expand(len(masks), -1, -1)
        found, _ = self.attention(queries, grid + self.places, grid, need_weights=False)
        return self.out(found)
