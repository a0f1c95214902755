"""Let the tokens of a pretrained transformer choose their heads, without training: a calibration for :class:`MoH`.

Two passes over the same runs, both dense: the first fits, for every head h of a layer, ``log |z_h W_O,h|^2`` linearly
to the layer's input x, by ridge regression with the moments of x. The second takes the mean of z_h over the tokens that
will leave h out, which then stands for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dit_attn.api import disable, enabled
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.head_drop.dropped import enabled_file, write_heads
from dit_attn.processors.attach.layer_shape import layer_shape, output_projection
from dit_attn.processors.attach.session import Session
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.parameters import LayerShape, on_device
from dit_attn.processors.methods.base import Method
from dit_attn.processors.methods.head_choice import HeadChoice
from dit_attn.processors.methods.moh import MoH, input_rows
from dit_attn.processors.methods.saved import Origin

RIDGE = 1e-3

Look = Callable[[AttentionCall, slice, torch.Tensor], None]
"""Gets an attention call, the rows of it that the layer's input has, and their head outputs (B, rows, H, D)."""


@dataclass
class RoutedHeads:
    """A calibration by which tokens choose their heads.

    Attributes:
        method: without its tensors.
        transformer: class name.
        layers: number of its self-attention layers.
        tensors: by layer and name.
        explained: of every layer, the share of the variance of the heads' log-energies that the rule explains, mean
            over its heads; empty without a rule.
        about: what the file says besides, JSON values.
    """

    method: MoH
    transformer: str
    layers: int
    tensors: dict[str, torch.Tensor] = field(default_factory=dict, compare=False)
    explained: dict[str, float] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict, compare=False)

    def enabled(self, pipe: Any) -> AbstractContextManager[Session]:
        """Route the tokens for the length of a ``with`` block.

        Raises:
            DitAttnError: as for :func:`dit_attn.enable`.
        """
        return enabled_file(pipe, self.save)

    def save(self, path: str | Path) -> Path:
        """Write a JSON file that ``enable`` and ``--method`` take, and its tensors beside it; returns the JSON file.

        Args:
            path: ``NAME.json``; the tensors go into ``NAME.safetensors``.

        Raises:
            DitAttnError: it cannot be written.
        """
        origin = Origin(MoH.slug, self.transformer, self.layers)
        return write_heads(
            path, self.method.to_dict(), self.tensors, origin, {**self.about, "explained": self.explained}
        )


def calibrate_routing(
    pipe: Any,
    prompts: Sequence[str],
    method: MoH,
    *,
    call: dict[str, Any] | None = None,
    every: int = 4,
    seed: int = 0,
    ridge: float = RIDGE,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> RoutedHeads:
    """Run a stock pipeline, dense, and measure what a route without training needs.

    Args:
        pipe: the pipeline; enabled methods are disabled.
        prompts: one run each; two with ``route="calibrated"`` and ``fill="mean"``.
        method: with the ``route``, the number of active heads and the ``fill``.
        call: further arguments of the pipeline's call.
        every: measure one step of so many; the steps rotate from run to run, beginning with the first.
        seed: of the first run; run n has ``seed + n``.
        ridge: relative to the mean variance of a channel of the input.
        on_progress: callback(done, total) after every run.

    Raises:
        DitAttnError: nothing to measure, counts that do not fit the heads, no layer that can be measured, or queries
            that are seen after their normalization alone.
    """
    passes: list[Callable[[_Calibration], Look]] = []
    if method.route == "calibrated":
        passes.append(lambda one: one.fit)
    if method.fill == "mean":
        passes.append(lambda one: one.average)
    if not passes:
        remedy = "train it with dit-attn finetune moh" if method.route == "learned" else "enable it as it is"
        raise DitAttnError(f"{method.slug} with route={method.route!r} has nothing to measure; {remedy}")
    disable(pipe)
    name = type(pipe.transformer).__name__
    with enabled(pipe) as session:
        layers = [layer for layer in session.layers if "self" in layer.calls]
        modules = {layer.name: session.module(layer) for layer in layers}
        shapes = [layer_shape(layer, modules[layer.name], len(layers)) for layer in layers]
    method.check_heads(name, [shape.heads for shape in shapes])
    found = {
        shape.name: _Calibration(method, shape, modules[shape.name], choice)
        for shape in shapes
        if (choice := method.choice_for(shape)) is not None
    }
    if not found:
        raise DitAttnError(f"{name} has no output projection of its own behind the heads (to_out); set route='query'")
    for number, part in enumerate(passes):
        look = {layer: part(one) for layer, one in found.items()}
        watch = _Watch(look=look, queries=method.reads_queries, every=every)
        with enabled(pipe, watch):
            for index, prompt in enumerate(prompts):
                watch.run[0] = index
                generator = torch.Generator("cpu").manual_seed(seed + index)
                pipe(prompt=prompt, generator=generator, output_type="latent", **(call or {}))
                on_progress(number * len(prompts) + index + 1, len(passes) * len(prompts))
        for one in found.values():
            one.finish(ridge)
    plain = {key: value for key, value in (call or {}).items() if isinstance(value, (bool, int, float, str))}
    return RoutedHeads(
        method, name, len(layers),
        {f"{layer}.{key}": x for layer, one in found.items() for key, x in one.choice.state_dict().items()},
        {layer: one.explained for layer, one in found.items() if one.explained is not None},
        {"runs": len(prompts), "transformer": name, **plain},
    )  # fmt: skip


class RidgeMoments:
    """Sums over tokens for the regression of several values on x, fp64 on the CPU.

    Args:
        channels: of x.
        values: number of values.
    """

    def __init__(self, channels: int, values: int) -> None:
        size = 1 + channels + values
        self.channels = channels
        self.square = torch.zeros(size, size, dtype=torch.float64)  # of (1, x, y)

    def add(self, x: torch.Tensor, y: torch.Tensor) -> None:
        """Add tokens x (N, C) and their values y (N, values)."""
        row = torch.cat([part.detach().double().cpu() for part in (torch.ones_like(y[:, :1]), x, y)], 1)
        self.square += row.T @ row

    def solve(self, ridge: float = RIDGE) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the rule (values, C), its offset (values,), and the share of the variance that it explains (values,).

        Args:
            ridge: relative to the mean variance of a channel of x.
        """
        mean = self.square[0, 1:] / self.square[0, 0]
        covariance = self.square[1:, 1:] / self.square[0, 0] - torch.outer(mean, mean)
        size = self.channels
        xx, xy, spread = covariance[:size, :size], covariance[:size, size:], covariance.diagonal()[size:]
        strength = ridge * xx.diagonal().mean().clamp(min=1e-30)
        rule = torch.linalg.solve(xx + strength * torch.eye(size, dtype=xx.dtype), xy)
        left = spread - 2.0 * (rule * xy).sum(0) + (rule * (xx @ rule)).sum(0)
        explained = 1.0 - left / spread.clamp(min=1e-12)
        return rule.T, mean[size:] - mean[:size] @ rule, explained


class _Calibration:
    """What is measured of one layer.

    Args:
        method: the method.
        shape: of the layer.
        attention: its module.
        choice: what is filled in.
    """

    def __init__(self, method: MoH, shape: LayerShape, attention: Any, choice: HeadChoice) -> None:
        self.method, self.attention, self.choice, self.heads = method, attention, choice, shape.heads
        self.shared, routed, self.active = method.counts(shape.heads, shape.index)
        self.moments = RidgeMoments(shape.hidden_size, routed) if choice.rule is not None else None
        self.total = torch.zeros(shape.heads, shape.head_dim, dtype=torch.float64)
        self.count = torch.zeros(shape.heads, dtype=torch.float64)
        self.explained: float | None = None
        self.seen = False

    def fit(self, call: AttentionCall, rows: slice, z: torch.Tensor) -> None:
        """Add the energies of the heads' contributions to the output."""
        assert self.moments is not None and call.layer.inputs is not None
        energy = log_energy(z, output_projection(self.attention, "to_out").weight)
        self.moments.add(call.layer.inputs.flatten(0, 1), energy[..., self.shared :].flatten(0, 1))
        self.seen = True

    def average(self, call: AttentionCall, rows: slice, z: torch.Tensor) -> None:
        """Add the outputs of heads to the mean over the tokens that leave them out."""
        assert call.layer.inputs is not None
        signal = self.method.signal(call, call.layer.inputs, rows)
        if signal is None:
            raise DitAttnError(
                f"{call.layer.name} shows its queries after their normalization alone, when their norms are all alike; "
                "set route='calibrated'"
            )
        gates, _ = on_device(self.choice, z.device)(signal, self.shared, self.active)
        gone = (1.0 - gates.detach()).double()
        self.total += torch.einsum("bsh,bshd->hd", gone, z.detach().double()).cpu()
        self.count += gone.sum((0, 1)).cpu()
        self.seen = True

    def finish(self, ridge: float) -> None:
        """End a pass: fill in what was measured.

        Raises:
            DitAttnError: the layer was not measured.
        """
        if not self.seen:
            raise DitAttnError("no step of the runs was measured; give a smaller every, or run without torch.compile")
        self.seen = False
        with torch.no_grad():
            if self.moments is not None and self.choice.rule is not None and self.choice.offset is not None:
                rule, offset, explained = self.moments.solve(ridge)
                self.choice.rule.copy_(rule)
                self.choice.offset.copy_(offset)
                self.explained = round(float(explained.mean()), 4)
            if self.choice.mean is not None:
                self.choice.mean.copy_(self.total / self.count.clamp(min=1.0)[:, None])


def log_energy(z: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the squared norm of every head's contribution to a layer's output.

    Args:
        z: (B, S, H, D) head outputs.
        weight: (C, H * D) of the output projection.

    Returns:
        (B, S, H) fp32.
    """
    parts = weight.detach().float().unflatten(1, z.shape[2:])  # (C, H, D)
    gram = torch.einsum("chd,che->hde", parts, parts)
    z = z.detach().float()
    return torch.einsum("bshd,hde,bshe->bsh", z, gram, z).clamp(min=1e-30).log()


@dataclass(frozen=True, kw_only=True)
class _Watch(Method):
    """Hand calls of layers, the rows that their inputs have, and their outputs to functions.

    Attributes:
        look: by layer.
        queries: whether queries before their normalization are needed.
        every: one step of so many.
        run: number of the current run.
    """

    look: dict[str, Look]
    queries: bool
    every: int
    run: list[int] = field(default_factory=lambda: [0])

    def __post_init__(self) -> None:
        """Nothing to check."""

    @property
    def reads_input(self) -> bool:
        return True

    @property
    def reads_queries(self) -> bool:
        return self.queries

    def request(self, call: AttentionCall, request: Request) -> None:
        look, rows = self.look.get(call.layer.name), input_rows(call)
        if look is not None and rows is not None and (call.clock.step + self.run[0]) % self.every == 0:
            request.record_output(lambda out: look(call, rows, out[:, rows]))
