"""Choose heads to drop by a profile, refit the output projections in closed form, and take the heads out.

With the kept channels S of the head outputs Z, their means and the covariance C of Z, the projection W is replaced by
the one that is nearest on the measured tokens::

    W' = (C_SS + l I)^-1 (C_S: W + l W_S)        b' = b + mean(Z) W - mean(Z_S) W'        l = ridge * trace(C_SS) / |S|

Heads are taken out by slicing the weights, so that every product of the layer gets smaller.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dit_attn import files
from dit_attn.errors import DitAttnError, reason
from dit_attn.pipelines.head_drop.profile import (
    STREAMS,
    HeadProfile,
    LayerProfile,
    Moments,
    output_projection,
    unsupported_reason,
)

FILE, TENSORS = "heads.json", "heads.safetensors"
RIDGE = 1e-3
_SIZES = ("heads", "inner_dim", "inner_kv_dim", "sliceable_head_dim")


@dataclass
class HeadDrop:
    """Heads to keep, and the output projections that go with them.

    Attributes:
        transformer: class name.
        kept: heads that stay, by layer; layers that keep all are left out.
        heads: number of heads of those layers.
        tensors: refitted ``weight`` (C, |S|) and ``bias`` (C,) by ``layer.stream.name``; empty without refit.
        expected: predicted relative squared error of the transformer's output.
    """

    transformer: str
    kept: dict[str, tuple[int, ...]]
    heads: dict[str, int]
    tensors: dict[str, torch.Tensor] = field(default_factory=dict, compare=False)
    expected: float = 0.0
    _stock: dict[str, dict[str, Any]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def dropped(self) -> int:
        """Number of heads that are taken out."""
        return sum(self.heads[name] - len(kept) for name, kept in self.kept.items())

    def apply(self, pipe: Any) -> None:
        """Take the heads out of a pipeline's transformer; :meth:`remove` brings them back.

        Raises:
            DitAttnError: they are out already, or it is another transformer; nothing is changed then.
        """
        model = pipe.transformer
        if self._stock:
            raise DitAttnError("these heads are taken out already; call remove() first")
        if type(model).__name__ != self.transformer:
            raise DitAttnError(f"these heads are those of {self.transformer}, this is {type(model).__name__}")
        modules = {name: _module(model, name, self.heads[name]) for name in self.kept}
        for name, attention in modules.items():
            self._stock[name] = {key: getattr(attention, key) for key in _SIZES if hasattr(attention, key)}
            _slice(attention, self.kept[name], self._stock[name])
            for stream in STREAMS:
                projection = output_projection(attention, stream)
                weight = self.tensors.get(f"{name}.{stream}.weight")
                if projection is not None and weight is not None:
                    bias = self.tensors[f"{name}.{stream}.bias"]
                    _fill(projection, weight, bias)

    def remove(self, pipe: Any) -> None:
        """Bring the heads back, bit for bit; nothing where they are not out."""
        for name, parts in self._stock.items():
            attention = pipe.transformer.get_submodule(name)
            for key, value in parts.items():
                owner, _, last = key.rpartition(".")
                if owner:
                    attention.get_submodule(owner)[int(last)] = value
                else:
                    setattr(attention, last, value)
        self._stock.clear()

    def save(self, folder: str | Path) -> Path:
        """Write ``heads.json`` and the refitted tensors; return the folder."""
        from safetensors.torch import save

        place = files.user_path(folder, "the folder")
        about = {"transformer": self.transformer, "heads": self.heads, "expected": self.expected}
        with files.report_os_error(f"write {place}", "choose another folder"):
            place.mkdir(parents=True, exist_ok=True)
            if self.tensors:
                files.write_bytes(place / TENSORS, save({k: v.contiguous() for k, v in self.tensors.items()}))
            files.write_json(place / FILE, {**about, "kept": {k: list(v) for k, v in self.kept.items()}})
        return place

    @staticmethod
    def load(folder: str | Path) -> HeadDrop:
        """Read what :meth:`save` wrote.

        Raises:
            DitAttnError: it is missing or something else.
        """
        place = files.user_path(folder, "the folder")
        try:
            data = files.parse_json((place / FILE).read_bytes())
            kept = {str(name): tuple(int(head) for head in heads) for name, heads in data["kept"].items()}
            heads = {str(name): int(data["heads"][name]) for name in kept}
            fields = (str(data["transformer"]), kept, heads)
            expected = float(data["expected"])
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DitAttnError(
                f"{place} has no dropped heads ({reason(error)}); give a folder of HeadDrop.save"
            ) from error
        tensors = files.read_weights(place / TENSORS) if (place / TENSORS).is_file() else {}
        return HeadDrop(*fields, tensors, expected)


def choose_heads(profile: HeadProfile, drop: float | int, *, refit: bool = True, ridge: float = RIDGE) -> HeadDrop:
    """Choose the heads whose loss changes the transformer's output least.

    In every layer heads are taken out one by one, the one whose loss leaves the smallest error after the refit first.
    The layers share the budget: the next head comes from the layer where the predicted error of the output grows least.
    A layer keeps one head at least.

    Args:
        profile: of the model.
        drop: heads to take out: a fraction of all, or a number.
        refit: fit the output projections to the heads that are left; otherwise they are only sliced.
        ridge: weight of the old projection in the refit.

    Raises:
        DitAttnError: more heads than can be taken out.
    """
    count = _count(profile, drop)
    curves = {layer.name: _elimination(layer, refit, ridge) for layer in profile.layers}
    taken = dict.fromkeys(curves, 0)
    error = 0.0
    for _ in range(count):
        growth = {
            name: curves[name][done + 1][0] - curves[name][done][0]
            for name, done in taken.items()
            if done + 1 < len(curves[name])
        }
        best = min(growth, key=lambda name: growth[name])
        taken[best] += 1
        error += growth[best]
    kept = {name: curves[name][done][1] for name, done in taken.items() if done}
    return _made(profile, kept, refit, ridge, error)


def random_heads(
    profile: HeadProfile, drop: float | int, seed: int, *, refit: bool = True, ridge: float = RIDGE
) -> HeadDrop:
    """Choose heads at random: the control of :func:`choose_heads`; arguments and errors as there."""
    count = _count(profile, drop)
    every = [(layer.name, head) for layer in profile.layers for head in range(layer.heads)]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
    left = {layer.name: set(range(layer.heads)) for layer in profile.layers}
    for name, head in (every[place] for place in order):
        if count and len(left[name]) > 1:
            left[name].discard(head)
            count -= 1
    sizes = {layer.name: layer.heads for layer in profile.layers}
    kept = {name: tuple(sorted(heads)) for name, heads in left.items() if len(heads) < sizes[name]}
    error = sum(
        layer.sensitivity * dropping_error(layer, kept[layer.name], refit, ridge)
        for layer in profile.layers
        if layer.name in kept
    )
    return _made(profile, kept, refit, ridge, error)


def _count(profile: HeadProfile, drop: float | int) -> int:
    count = round(drop * profile.heads) if isinstance(drop, float) else drop
    most = profile.heads - len(profile.layers)
    if not 0 <= count <= most:
        raise DitAttnError(f"{count} of {profile.heads} heads cannot be dropped, every layer keeps one: at most {most}")
    return count


def _made(
    profile: HeadProfile, kept: dict[str, tuple[int, ...]], refit: bool, ridge: float, error: float
) -> HeadDrop:
    tensors: dict[str, torch.Tensor] = {}
    layers = {layer.name: layer for layer in profile.layers}
    for name, heads in kept.items() if refit else ():
        for stream, moments in layers[name].streams.items():
            weight, shift = _refit(moments, _channels(layers[name], heads), ridge)
            tensors[f"{name}.{stream}.weight"] = weight.T.float().contiguous()
            tensors[f"{name}.{stream}.bias"] = shift.float()
    return HeadDrop(profile.transformer, kept, {name: layers[name].heads for name in kept}, tensors, error)


def _elimination(layer: LayerProfile, refit: bool, ridge: float) -> list[tuple[float, tuple[int, ...]]]:
    """Predicted error and kept heads after 0, 1, 2, ... heads are taken out."""
    kept = tuple(range(layer.heads))
    found = [(0.0, kept)]
    while len(kept) > 1:
        rests = [tuple(head for head in kept if head != gone) for gone in kept]
        errors = [dropping_error(layer, rest, refit, ridge) for rest in rests]
        best = min(range(len(rests)), key=errors.__getitem__)
        kept = rests[best]
        found.append((layer.sensitivity * errors[best], kept))
    return found


def dropping_error(layer: LayerProfile, kept: Sequence[int], refit: bool = True, ridge: float = RIDGE) -> float:
    """Return the mean squared error of a layer's output on the measured tokens, with these heads alone.

    Args:
        layer: its profile.
        kept: heads that stay.
        refit, ridge: as for :func:`choose_heads`.
    """
    channels, total = _channels(layer, kept), 0.0
    for moments in layer.streams.values():
        if not moments.count:
            continue
        full, second = moments.weight, moments.square / moments.count
        if refit:
            weight, shift = _refit(moments, channels, ridge)
        else:
            weight, shift = full[channels], torch.zeros(full.shape[1], dtype=full.dtype)
        change = full.clone()
        change[channels] -= weight  # the error of a token is z change - shift
        total += float((change * (second @ change)).sum() - 2 * (moments.mean @ change) @ shift + shift @ shift)
    return max(total, 0.0)


def _channels(layer: LayerProfile, heads: Sequence[int]) -> torch.Tensor:
    size = next(iter(layer.streams.values())).total.numel() // layer.heads
    return torch.cat([torch.arange(head * size, (head + 1) * size) for head in heads])


def _refit(moments: Moments, channels: torch.Tensor, ridge: float) -> tuple[torch.Tensor, torch.Tensor]:
    """W' (|S|, C), and what is added to the bias (C,)."""
    covariance = moments.covariance
    own = covariance[channels][:, channels]
    strength = ridge * own.diagonal().mean().clamp(min=1e-30)
    left = own + strength * torch.eye(len(channels), dtype=own.dtype)
    weight = torch.linalg.solve(left, covariance[channels] @ moments.weight + strength * moments.weight[channels])
    return weight, moments.mean @ moments.weight - moments.mean[channels] @ weight


# -- weights -----------------------------------------------------------------------------------------------------------


def _module(model: Any, name: str, heads: int) -> Any:
    try:
        attention = model.get_submodule(name)
    except AttributeError as error:
        raise DitAttnError(f"this transformer has no layer {name}; profile this model") from error
    if unsupported_reason(attention) is not None or attention.heads != heads:
        raise DitAttnError(f"{name} has other heads than were measured; profile this model, without dropped heads")
    return attention


def _slice(attention: Any, kept: Sequence[int], stock: dict[str, Any]) -> None:
    """Keep some heads of an attention module; what is replaced goes into ``stock``."""
    heads = attention.heads
    size = attention.to_q.out_features // heads
    channels = torch.cat([torch.arange(head * size, (head + 1) * size) for head in kept])
    for name in itertools.chain.from_iterable(STREAMS.values()):
        part = getattr(attention, name, None)
        if isinstance(part, torch.nn.Linear):
            stock[name] = part
            setattr(attention, name, _linear(part, rows=channels))
    for stream in STREAMS:
        projection = output_projection(attention, stream)
        if projection is None:
            continue
        listed = isinstance(getattr(attention, stream), torch.nn.ModuleList)
        stock[f"{stream}.0" if listed else stream] = projection
        new = _linear(projection, columns=channels)
        if listed:
            getattr(attention, stream)[0] = new
        else:
            setattr(attention, stream, new)
    attention.heads = len(kept)
    for key in ("inner_dim", "inner_kv_dim"):
        if key in stock:
            setattr(attention, key, len(channels))
    if "sliceable_head_dim" in stock:
        attention.sliceable_head_dim = len(kept)


def _linear(
    stock: torch.nn.Linear, rows: torch.Tensor | None = None, columns: torch.Tensor | None = None
) -> torch.nn.Linear:
    """A linear layer with some of the outputs, or of the inputs, of another one."""
    weight = stock.weight.detach()
    weight = weight if rows is None else weight[rows.to(weight.device)]
    weight = weight if columns is None else weight[:, columns.to(weight.device)]
    new = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=stock.bias is not None, device="meta")
    new.weight = torch.nn.Parameter(weight.clone(), requires_grad=stock.weight.requires_grad)
    if stock.bias is not None:
        bias = stock.bias.detach()
        bias = bias if rows is None else bias[rows.to(bias.device)]
        new.bias = torch.nn.Parameter(bias.clone(), requires_grad=stock.bias.requires_grad)
    return new


def _fill(projection: torch.nn.Linear, weight: torch.Tensor, shift: torch.Tensor) -> None:
    """Set refitted values."""
    with torch.no_grad():
        projection.weight.copy_(weight)
        if projection.bias is None:
            projection.bias = torch.nn.Parameter(torch.zeros_like(projection.weight[:, 0]))
        projection.bias.add_(shift.to(projection.bias))
