"""Capture the q, k and v of one attention call of a run, after normalization and rotary embedding."""

from __future__ import annotations

from typing import Any

import torch

from dit_attn.api import disable, observing
from dit_attn.errors import DitAttnError
from dit_attn.processors.core import executor
from dit_attn.processors.core.call import AttentionCall, Request


class _Capture:
    """An attention observer that copies the first self-attention call of one layer at one step."""

    def __init__(self, layer: float, step: float) -> None:
        self.layer, self.step = layer, step
        self.tensors: dict[str, torch.Tensor] = {}
        self.position: dict[str, Any] = {}

    def __call__(self, call: AttentionCall, request: Request, out: torch.Tensor) -> None:
        if self.tensors or executor.unsupported_reason(call):
            return
        layers, steps = call.layer_count, call.clock.total or 1
        if call.layer.index != _index(self.layer, layers) or call.clock.step != _index(self.step, steps):
            return
        self.tensors = {name: getattr(call, name).detach().clone() for name in "qkv"}
        self.position = {"layer": call.layer.index, "layers": layers, "step": call.clock.step, "steps": steps}


def capture_call(
    pipe: Any, prompt: str, *, layer: float = 0.5, step: float = 0.5, seed: int = 0, call: dict[str, Any] | None = None
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Run a pipeline dense and capture the tensors of one attention call.

    Args:
        pipe: a stock pipeline; enabled methods are disabled.
        prompt: of the run.
        layer, step: position of the call, as fractions of all layers and steps in [0, 1].
        seed: of the run.
        call: further arguments of the pipeline's call.

    Returns:
        ``q``, ``k``, ``v`` (B, S, H, D), and the position: ``layer`` of ``layers``, ``step`` of ``steps``.

    Raises:
        DitAttnError: the run had no such self-attention call over enough tokens.
    """
    disable(pipe)
    capture = _Capture(layer, step)
    generator = torch.Generator("cpu").manual_seed(seed)
    with observing(pipe, capture), torch.no_grad():
        pipe(prompt, generator=generator, output_type="latent", **(call or {}))
    disable(pipe)
    if not capture.tensors:
        raise DitAttnError(
            f"the run had no self-attention of {executor.MIN_TOKENS} tokens or more at that layer and step; use a "
            "larger image"
        )
    return capture.tensors, capture.position


def _index(fraction: float, count: int) -> int:
    return min(int(fraction * count), count - 1)
