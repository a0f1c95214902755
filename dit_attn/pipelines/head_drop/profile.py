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

STREAMS = {"to_out": ("to_q", "to_k", "to_v"), "to_add_out": ("add_q_proj", "add_k_proj", "add_v_proj")}
"""Output projections of an attention module, and the projections whose heads they take: visual tokens, and text."""


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
    """All layers of a transformer.

    Attributes:
        transformer: class name.
        layers: in order.
        calls: transformer calls that were measured.
    """

    transformer: str
    layers: list[LayerProfile] = field(default_factory=list)
    calls: int = 0

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
        DitAttnError: an attention layer whose heads cannot be told apart or taken out.
    """
    disable(pipe)
    with enabled(pipe) as session:
        names = [layer.name for layer in session.layers if layer.kind == "self"]
    model = pipe.transformer
    profile = HeadProfile(type(model).__name__, [_new_layer(name, model.get_submodule(name)) for name in names])
    with _watched(model, profile, every, seed):
        for index, prompt in enumerate(prompts):
            generator = torch.Generator("cpu").manual_seed(seed + index)
            pipe(prompt=prompt, generator=generator, output_type="latent", **(call or {}))
            on_progress(index + 1, len(prompts))
    if not profile.calls:
        raise DitAttnError(f"no call of {profile.transformer} was measured; give prompts, or a smaller every")
    for layer in profile.layers:
        layer.ablation /= profile.calls
    return profile


def output_projection(attention: Any, stream: str) -> torch.nn.Linear | None:
    """Return an output projection of an attention module, ``None`` where it has none."""
    found = getattr(attention, stream, None)
    found = found[0] if isinstance(found, torch.nn.ModuleList) else found
    return found if isinstance(found, torch.nn.Linear) else None


def _new_layer(name: str, attention: Any) -> LayerProfile:
    reason = unsupported_reason(attention)
    if reason is not None:
        raise DitAttnError(f"the heads of {name} cannot be dropped: {reason}")
    streams = {}
    for stream in STREAMS:
        projection = output_projection(attention, stream)
        if projection is not None:
            weight = projection.weight.detach().double().T.contiguous()
            size = weight.shape[0]
            zero = weight.new_zeros(size), weight.new_zeros(size, size)
            streams[stream] = Moments(0, *zero, weight)
    return LayerProfile(name, attention.heads, streams, torch.zeros(attention.heads, dtype=torch.float64))


def unsupported_reason(attention: Any) -> str | None:
    """Return why the heads of an attention module cannot be taken out, or ``None``."""
    inputs: list[Any] = [getattr(attention, name, None) for name in STREAMS["to_out"]]
    if not all(isinstance(part, torch.nn.Linear) for part in inputs) or output_projection(attention, "to_out") is None:
        return f"{type(attention).__name__} has no separate to_q, to_k, to_v and to_out"
    q, k = inputs[0], inputs[1]
    if k.out_features != q.out_features:
        return "several query heads share a key head"
    size = q.out_features // attention.heads
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        weight = getattr(getattr(attention, name, None), "weight", None)
        if weight is not None and weight.numel() != size:
            return f"{name} normalizes over all heads at once"
    return None


@contextmanager
def _watched(model: Any, profile: HeadProfile, every: int, seed: int) -> Iterator[None]:
    """Fill the profile from the calls that the transformer gets inside the block."""
    layers = {layer.name: layer for layer in profile.layers}
    generator = torch.Generator().manual_seed(seed)
    seen, active = [0], [False]
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
        if (seen[0] - 1) % every != every // 2 % every:
            return stock(*args, **kwargs)
        profile.calls += 1
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
        output_projection(model.get_submodule(name), stream).register_forward_pre_hook(of(name, stream))  # type: ignore[union-attr]
        for name, layer in layers.items()
        for stream in layer.streams
    ]
    model.requires_grad_(False)
    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        for handle in handles:
            handle.remove()
        for parameter in trained:
            parameter.requires_grad_(True)
