"""Keeping one attention call of a run: its q, k and v after normalisation and rotary embedding."""

from __future__ import annotations

from typing import Any

import torch

from dit_attn.api import disable, observing
from dit_attn.errors import DitAttnError
from dit_attn.processors.core import executor
from dit_attn.processors.core.call import AttentionCall, Request


class _Keeper:
    """Keeps the first self-attention of one layer at one step."""

    def __init__(self, layer: float, step: float) -> None:
        self.layer, self.step = layer, step
        self.kept: dict[str, torch.Tensor] = {}
        self.about: dict[str, Any] = {}

    def __call__(self, call: AttentionCall, request: Request, out: torch.Tensor) -> None:
        if self.kept or executor.unsupported_reason(call):
            return
        layers, steps = call.layer_count, call.clock.total or 1
        if call.layer.index != _at(self.layer, layers) or call.clock.step != _at(self.step, steps):
            return
        self.kept = {name: getattr(call, name).detach().clone() for name in "qkv"}
        self.about = {"layer": call.layer.index, "layers": layers, "step": call.clock.step, "steps": steps}


def captured(
    pipe: Any, prompt: str, *, layer: float = 0.5, step: float = 0.5, seed: int = 0, call: dict[str, Any] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """q, k, v (B, S, H, D) of one call of a dense run, and where it was: layer and step, and how many there are.

    Args:
        pipe: a stock pipeline; methods on it are taken off.
        prompt: of the run.
        layer, step: which, as parts of all of them in [0, 1].
        seed: of the run.
        call: further arguments of the pipeline's call.

    Raises:
        DitAttnError: the run had no such call of self-attention over enough tokens.
    """
    disable(pipe)
    keeper = _Keeper(layer, step)
    generator = torch.Generator("cpu").manual_seed(seed)
    with observing(pipe, keeper), torch.no_grad():
        pipe(prompt, generator=generator, output_type="latent", **(call or {}))
    disable(pipe)
    if not keeper.kept:
        raise DitAttnError(
            f"the run had no self-attention of {executor.MIN_TOKENS} tokens or more at that layer and step; take a "
            "larger picture"
        )
    return keeper.kept, keeper.about


def _at(part: float, count: int) -> int:
    return min(int(part * count), count - 1)
