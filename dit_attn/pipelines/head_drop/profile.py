"""Measure what every attention head of a transformer contributes, on a few runs.

Of every layer the moments of its head outputs are summed: with Z (tokens x heads * D) the input of the output
projection W, everything that a choice of heads needs follows from the mean of Z and from ``Z^T Z``. The effect on the
transformer's output comes from one backward pass per call: with random signs r, ``(d <r, v> / d gate_h)^2`` is in
expectation the squared change of the output v, to first order, when head h is taken out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_attn.api import disable, enabled
from dit_attn.errors import DitAttnError
from dit_attn.processors.attach.layer_shape import STREAMS, head_count, output_projection


@dataclass
class Moments:
    """Sums over the tokens of one stream of one layer, fp64.

    Attributes:
        count: tokens.
        total: (heads * D,) sum of the head outputs Z.
        square: (heads * D, heads * D), sum of Z^T Z.
        weight: (heads * D, C), the output projection transposed.
    """

    count: int
    total: torch.Tensor
    square: torch.Tensor
    weight: torch.Tensor

    @property
    def mean(self) -> torch.Tensor:
        """(heads * D,) mean of Z."""
        return self.total / max(self.count, 1)

    @property
    def covariance(self) -> torch.Tensor:
        """(heads * D, heads * D)."""
        return self.square / max(self.count, 1) - torch.outer(self.mean, self.mean)

    def gram(self, heads: int) -> torch.Tensor:
        """Return (heads, heads): mean over the tokens of the dot products of the heads' contributions Z_h W_h."""
        joint = (self.weight @ self.weight.T) * (self.square / max(self.count, 1))
        size = joint.shape[0] // heads
        return joint.unflatten(0, (heads, size)).unflatten(2, (heads, size)).sum((1, 3))


@dataclass
class LayerProfile:
    """One attention layer.

    Attributes:
        name: module path in the transformer.
        heads: number of heads.
        streams: moments by the name of the output projection.
        ablation: (heads,) squared change of the transformer's output without each head, to first order, relative to the
            squared output; mean over the calls.
    """

    name: str
    heads: int
    streams: dict[str, Moments]
    ablation: torch.Tensor

    def channels(self, heads: Sequence[int]) -> torch.Tensor:
        """Return the channels of some heads."""
        size = next(iter(self.streams.values())).total.numel() // self.heads
        return torch.cat([torch.arange(head * size, (head + 1) * size) for head in heads])

    @property
    def energy(self) -> torch.Tensor:
        """(heads,) mean squared norm of every head's contribution, sum over the streams."""
        return sum((m.gram(self.heads).diagonal() for m in self.streams.values()), torch.zeros(self.heads).double())

    @property
    def redundancy(self) -> torch.Tensor:
        """(heads, heads) cosine of the contributions of two heads, all streams together."""
        gram = sum((m.gram(self.heads) for m in self.streams.values()), torch.zeros(self.heads, self.heads).double())
        norm = gram.diagonal().clamp(min=1e-30).sqrt()
        return gram / torch.outer(norm, norm)

    @property
    def sensitivity(self) -> float:
        """Squared change of the transformer's output per squared change of this layer's, over its heads."""
        return float(self.ablation.sum() / self.energy.sum().clamp(min=1e-30))


@dataclass
class HeadProfile:
    """All layers of a transformer whose heads end in an output projection of the attention module.

    Attributes:
        transformer: class name.
        layers: in order.
        count: number of self-attention layers, those without such a projection too.
        calls: transformer calls that were measured.
        end: fraction of the run that it ends at.
        runs: number of runs.
        call: arguments of the pipeline's call that are JSON values.
    """

    transformer: str
    layers: list[LayerProfile] = field(default_factory=list)
    count: int = 0
    calls: int = 0
    end: float = 1.0
    runs: int = 0
    call: dict[str, Any] = field(default_factory=dict)

    @property
    def heads(self) -> int:
        """Number of heads of all layers."""
        return sum(layer.heads for layer in self.layers)


def profile_heads(
    pipe: Any,
    prompts: Sequence[str],
    *,
    call: dict[str, Any] | None = None,
    every: int = 4,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> HeadProfile:
    """Run a stock pipeline, dense, and measure its heads.

    Args:
        pipe: the pipeline; enabled methods are disabled.
        prompts: one run each.
        call: further arguments of the pipeline's call.
        every: measure one transformer call of so many.
        seed: of the first run; run n has ``seed + n``.
        on_progress: callback(done, total) after every run.

    Raises:
        DitAttnError: no attention layer whose heads can be told apart.
    """
    return profile_parts(pipe, prompts, (), call=call, every=every, seed=seed, on_progress=on_progress)[0]


def profile_parts(
    pipe: Any,
    prompts: Sequence[str],
    until: Sequence[float],
    *,
    call: dict[str, Any] | None = None,
    every: int = 4,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[HeadProfile]:
    """Measure the heads in every part of the run by itself.

    Args:
        pipe, prompts, call, every, seed, on_progress: as for :func:`profile_heads`.
        until: where each part but the last ends, fractions of the steps, ascending.

    Raises:
        DitAttnError: as for :func:`profile_heads`, or no call of a part was measured.
    """
    disable(pipe)
    model, plain = pipe.transformer, {k: v for k, v in (call or {}).items() if isinstance(v, (bool, int, float, str))}
    with enabled(pipe) as session:
        names = [layer.name for layer in session.layers if layer.kind == "self"]
        profiles = [
            HeadProfile(
                type(model).__name__, _new_layers(model, names), len(names), end=end, runs=len(prompts), call=plain
            )
            for end in (*until, 1.0)
        ]  # fmt: skip

        def current() -> HeadProfile:
            return profiles[sum(session.clock.progress >= end - 1e-9 for end in until)]

        with _watched(model, current, every, seed) as begin_run:
            for index, prompt in enumerate(prompts):
                begin_run(index)
                generator = torch.Generator("cpu").manual_seed(seed + index)
                pipe(prompt=prompt, generator=generator, output_type="latent", **(call or {}))
                on_progress(index + 1, len(prompts))
    for profile in profiles:
        if not profile.calls:
            raise DitAttnError(f"a part of the run has no measured call of {profile.transformer}; give a smaller every")
        for layer in profile.layers:
            layer.ablation /= profile.calls
    return profiles


def _new_layers(model: Any, names: Sequence[str]) -> list[LayerProfile]:
    """An empty profile of every layer that has an output projection."""
    modules = {name: model.get_submodule(name) for name in names}
    reasons = {name: unsupported_reason(module) for name, module in modules.items()}
    if all(reasons.values()):
        raise DitAttnError(f"the heads of {names[0]} cannot be measured: {reasons[names[0]]}")
    return [_new_layer(name, modules[name]) for name, reason in reasons.items() if reason is None]


def _new_layer(name: str, attention: Any) -> LayerProfile:
    streams, heads = {}, head_count(attention) or 1
    for stream in STREAMS:
        projection = output_projection(attention, stream)
        if projection is not None:
            weight = projection.weight.detach().double().T.contiguous().cpu()
            size = weight.shape[0]
            streams[stream] = Moments(0, weight.new_zeros(size), weight.new_zeros(size, size), weight)
    return LayerProfile(name, heads, streams, torch.zeros(heads, dtype=torch.float64))


def unsupported_reason(attention: Any) -> str | None:
    """Return why the heads of an attention module cannot be measured, or ``None``."""
    projection, heads = output_projection(attention, "to_out"), head_count(attention)
    if projection is None or heads is None or projection.in_features % heads:
        return f"{type(attention).__name__} has no output projection of its own behind the heads (to_out)"
    return None


@contextmanager
def _watched(model: Any, current: Callable[[], HeadProfile], every: int, seed: int) -> Iterator[Callable[[int], None]]:
    """Fill the current profile from the calls that the transformer gets inside the block.

    Yields what is to be called with the number of every run that begins: the calls that are measured rotate from run to
    run, and begin with the first of all, whose input is unlike any other.
    """
    layers: dict[str, LayerProfile] = {}  # of the call that is measured
    generator = torch.Generator().manual_seed(seed)
    seen, active = [0], [False]

    def begin_run(number: int) -> None:
        seen[0] = number

    gates: dict[str, torch.Tensor] = {}

    def of(name: str, stream: str) -> Callable[[Any, tuple[Any, ...]], tuple[Any, ...] | None]:
        def gated(module: Any, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
            if not active[0]:
                return None
            layer, z = layers[name], args[0]
            moments = layer.streams[stream]
            rows = z.detach().flatten(0, -2).double().to(moments.total.device)
            moments.count += rows.shape[0]
            moments.total += rows.sum(0)
            moments.square += rows.T @ rows
            if name not in gates:
                gates[name] = torch.ones(z.shape[0], layer.heads, device=z.device, requires_grad=True)
            gate = gates[name].to(z.dtype).unflatten(0, (-1, *[1] * (z.ndim - 2)))[..., None]
            return ((z.unflatten(-1, (layer.heads, -1)) * gate).flatten(-2), *args[1:])

        return gated

    stock = model.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        seen[0] += 1
        if (seen[0] - 1) % every:
            return stock(*args, **kwargs)
        profile = current()
        profile.calls += 1
        layers.update({layer.name: layer for layer in profile.layers})
        with torch.enable_grad():
            gates.clear()
            active[0] = True
            try:
                output = stock(*args, **kwargs)
            finally:
                active[0] = False
            out = output[0] if isinstance(output, tuple) else output.sample
            signs = (torch.randint(2, out.shape, generator=generator) * 2 - 1).to(out.device, out.dtype)
            found = torch.autograd.grad((signs * out).sum(), list(gates.values()), allow_unused=True)
        scale = float(out.detach().double().square().sum().clamp(min=1e-30))
        for name, gradient in zip(gates, found):
            if gradient is not None:  # every sample is a probe of its own
                layers[name].ablation += gradient.double().cpu().square().sum(0) / scale
        plain = out.detach()
        return (plain, *output[1:]) if isinstance(output, tuple) else type(output)(sample=plain)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles = [
        output_projection(model.get_submodule(name), stream).register_forward_pre_hook(of(name, stream))
        for name in (layer.name for layer in current().layers)
        for stream in STREAMS
        if output_projection(model.get_submodule(name), stream) is not None
    ]
    model.requires_grad_(False)
    model.forward = forward
    try:
        yield begin_run
    finally:
        del model.forward
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
