"""Choose heads to leave out by a profile, and refit the output projections to those that stay."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.pipelines.head_drop.dropped import DroppedHeads
from dit_attn.pipelines.head_drop.profile import HeadProfile, LayerProfile
from dit_attn.pipelines.head_drop.refit import RIDGE, dropping_error, refit
from dit_attn.processors.guidance import heads as addresses
from dit_attn.processors.methods.head_drop import Kept

Curve = list[tuple[float, tuple[int, ...]]]  # predicted error and kept heads after 0, 1, 2, ... heads are gone


def choose_heads(
    profile: HeadProfile | Sequence[HeadProfile], drop: float | int, *, refitted: bool = True, ridge: float = RIDGE
) -> DroppedHeads:
    """Choose the heads whose loss changes the transformer's output least.

    In every layer heads are taken out one by one, the one whose loss leaves the smallest error after the refit first.
    Layers and parts of the run share the budget: the next head comes from where the predicted error of the output grows
    least. A layer keeps one head at least.

    Args:
        profile: of the model, or those of the parts of the run (:func:`profile_parts`), each of which gets its own set.
        drop: heads to leave out: a fraction of all, or a number; over the parts of the run, the mean.
        refitted: fit the output projections to the heads that stay; otherwise they are only sliced.
        ridge: weight of the old projection in the refit.

    Raises:
        DitAttnError: more heads than can be left out.
    """
    profiles = [profile] if isinstance(profile, HeadProfile) else list(profile)
    count = _count(profiles[0], drop)
    curves: dict[tuple[int, str], Curve] = {
        (number, layer.name): _elimination(layer, refitted, ridge)
        for number, part in enumerate(profiles)
        for layer in part.layers
    }
    shares = _shares(profiles)
    taken = dict.fromkeys(curves, 0)
    left, error = float(count), 0.0
    while left > 1e-9:
        growth = {
            key: curves[key][done + 1][0] - curves[key][done][0]
            for key, done in taken.items()
            if done + 1 < len(curves[key]) and shares[key[0]] <= left + 1e-9
        }
        if not growth:
            break
        best = min(growth, key=lambda key: growth[key])
        taken[best] += 1
        left -= shares[best[0]]
        error += growth[best] * shares[best[0]]
    kept: list[Kept] = [{} for _ in profiles]
    for (number, name), done in taken.items():
        if done:
            kept[number][name] = curves[number, name][done][1]
    return _made(profiles, kept, refitted, ridge, error)


def random_heads(
    profile: HeadProfile, drop: float | int, seed: int, *, refitted: bool = True, ridge: float = RIDGE
) -> DroppedHeads:
    """Choose heads at random: the control of :func:`choose_heads`; arguments and errors as there."""
    every = [(layer.name, head) for layer in profile.layers for head in range(layer.heads)]
    order = torch.randperm(len(every), generator=torch.Generator().manual_seed(seed)).tolist()
    return first_heads(profile, [every[place] for place in order], drop, refitted=refitted, ridge=ridge)


def first_heads(
    profile: HeadProfile,
    order: Sequence[tuple[str, int]],
    drop: float | int,
    *,
    refitted: bool = True,
    ridge: float = RIDGE,
) -> DroppedHeads:
    """Leave out the first heads of a list, past those that are the last of their layer.

    Args:
        profile: of the model.
        order: (layer, head), the first to go first.
        drop, refitted, ridge: as for :func:`choose_heads`.

    Raises:
        DitAttnError: more heads than can be left out.
    """
    count = _count(profile, drop)
    left = {layer.name: set(range(layer.heads)) for layer in profile.layers}
    for name, head in order:
        if count and len(left[name]) > 1:
            left[name].discard(head)
            count -= 1
    return _given(profile, {name: tuple(sorted(heads)) for name, heads in left.items()}, refitted, ridge)


def named_heads(profile: HeadProfile, heads: Any, *, refitted: bool = True, ridge: float = RIDGE) -> DroppedHeads:
    """Leave out the heads that are named, and refit the others.

    Args:
        profile: of the model.
        heads: in any form of :mod:`dit_attn.processors.guidance.heads`.
        refitted, ridge: as for :func:`choose_heads`.

    Raises:
        DitAttnError: no such head, or a layer that keeps none.
    """
    counts = {layer.name: layer.heads for layer in profile.layers}
    gone = addresses.resolve(addresses.canonical(heads), counts, 1.0)
    kept = {name: tuple(h for h in range(count) if h not in gone.get(name, {})) for name, count in counts.items()}
    if empty := [name for name, heads in kept.items() if not heads]:
        raise DitAttnError(f"no head of {empty[0]} would stay; a layer keeps one at least")
    return _given(profile, kept, refitted, ridge)


def _count(profile: HeadProfile, drop: float | int) -> int:
    count = round(drop * profile.heads) if isinstance(drop, float) else drop
    most = profile.heads - len(profile.layers)
    if not 0 <= count <= most:
        raise DitAttnError(f"{count} of {profile.heads} heads cannot be dropped, every layer keeps one: at most {most}")
    return count


def _shares(profiles: Sequence[HeadProfile]) -> list[float]:
    """Fraction of the run of every part."""
    ends = [*(profile.end for profile in profiles[:-1]), 1.0]
    return [end - start for start, end in zip([0.0, *ends], ends)]


def _elimination(layer: LayerProfile, refitted: bool, ridge: float) -> Curve:
    kept = tuple(range(layer.heads))
    found: Curve = [(0.0, kept)]
    while len(kept) > 1:
        rests = [tuple(head for head in kept if head != gone) for gone in kept]
        errors = [dropping_error(layer, rest, refitted, ridge) for rest in rests]
        best = min(range(len(rests)), key=errors.__getitem__)
        kept = rests[best]
        found.append((layer.sensitivity * errors[best], kept))
    return found


def _given(profile: HeadProfile, kept: Kept, refitted: bool, ridge: float) -> DroppedHeads:
    """The drop of a set that was chosen already, with its predicted error."""
    layers = {layer.name: layer for layer in profile.layers}
    kept = {name: heads for name, heads in kept.items() if len(heads) < layers[name].heads}
    errors = (layers[name].sensitivity * dropping_error(layers[name], kept[name], refitted, ridge) for name in kept)
    return _made([profile], [kept], refitted, ridge, sum(errors))


def _made(
    profiles: Sequence[HeadProfile], kept: Sequence[Kept], refitted: bool, ridge: float, error: float
) -> DroppedHeads:
    tensors: dict[str, torch.Tensor] = {}
    for number, (profile, part) in enumerate(zip(profiles, kept)):
        layers = {layer.name: layer for layer in profile.layers}
        for name, heads in part.items() if refitted else ():
            channels = layers[name].channels(heads)
            for stream, moments in layers[name].streams.items():
                weight, shift = refit(moments, channels, ridge)
                change = weight - moments.weight[channels]
                tensors[f"{name}.{stream}_{number}_weight"] = change.T.float().contiguous()
                tensors[f"{name}.{stream}_{number}_bias"] = shift.float()
    first = profiles[0]
    return DroppedHeads(
        first.transformer, first.count, {layer.name: layer.heads for layer in first.layers}, tuple(kept),
        tuple(profile.end for profile in profiles[:-1]), tensors, error,
        {"runs": first.runs, "transformer": first.transformer, **first.call},
    )  # fmt: skip
