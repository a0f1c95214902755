"""The optimizers of the embedded models: Muon for hidden matrices, AdamW for everything else."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch

from dit_attn.machine import multiplies_bf16
from dit_attn.models.recipe import Recipe

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic Newton-Schulz iteration, steepest at zero (Jordan 2024)."""


def build_optimizers(model: torch.nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Build Muon for the matrices of the blocks and AdamW for the rest; AdamW for all at a Muon rate of 0."""
    hidden: list[torch.nn.Parameter] = []
    rest: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = "transformer." in name and ("blocks." in name or "transformer.layers." in name)
        inside = inside and name.endswith(".weight") and parameter.ndim == 2
        (hidden if inside else rest).append(parameter)
    if recipe.muon_lr == 0:
        return [torch.optim.AdamW([*hidden, *rest], lr=recipe.lr, betas=recipe.betas, weight_decay=0.0)]
    adamw = torch.optim.AdamW(rest, lr=recipe.lr, betas=recipe.betas, weight_decay=0.0)
    return [Muon(hidden, lr=recipe.muon_lr), adamw]


class Muon(torch.optim.Optimizer):
    """Muon (Jordan 2024) with Nesterov momentum, AdamW's step size and no weight decay.

    `torch.optim.Muon(adjust_lr_fn="match_rms_adamw", weight_decay=0.0)`, except that matrices are orthogonalized in
    fp32 on a device that has no instructions for bf16. There, products in bf16 take 25 times as long as in fp32: most
    of a training step.
    """

    def __init__(self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every matrix that has a gradient; returns what `closure` does."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if "momentum_buffer" not in state:
                    state["momentum_buffer"] = torch.zeros_like(matrix.grad)
                average = state["momentum_buffer"].lerp_(matrix.grad, 1 - group["momentum"])
                update = orthogonalize(matrix.grad.lerp(average, group["momentum"]))
                matrix.add_(update, alpha=-0.2 * math.sqrt(max(matrix.shape)) * group["lr"])
        return loss


def orthogonalize(matrix: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Compute a matrix of the same singular vectors whose singular values are near 1, by Newton-Schulz iterations.

    Args:
        matrix: (rows, columns); computed in bf16 where the device multiplies it, else in the matrix' dtype.
        steps: iterations.
    """
    a, b, c = COEFFICIENTS
    x = matrix.bfloat16() if multiplies_bf16(matrix.device) else matrix
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x
