"""The attention layers of a transformer that methods and observers may see, and the kinds of calls they want."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

import torch

from dit_attn.errors import DitAttnError, shorten
from dit_attn.processors.attach.attention_processor import tap_of
from dit_attn.processors.attach.families import Family, family_of
from dit_attn.processors.core.layer import SITES, kinds_at
from dit_attn.processors.methods.base import Method


def eligible_layers(model: torch.nn.Module, family: Family) -> list[str]:
    """Return the module paths of the self and joint attention layers the family row lists, in the order of the model.

    Those of a branch next to the stack of blocks come last.

    Raises:
        DitAttnError: the row matches no layer of this model.
    """
    names = _matching(model, family.layers)
    if not names:
        raise DitAttnError(
            f"no attention layer of {type(model).__name__} matches {', '.join(family.layers)}; "
            "this version of diffusers may have renamed them"
        )
    return [*names, *_matching(model, family.side_layers)]


def cross_layers(model: torch.nn.Module, family: Family) -> list[str]:
    """Return the module paths of the cross-attention layers the family row lists, in the order of the model."""
    return _matching(model, family.cross_layers)


def _matching(model: torch.nn.Module, patterns: tuple[str, ...]) -> list[str]:
    """Module paths of the attention layers that match one of the patterns."""
    return [
        name
        for name, module in model.named_modules()
        if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns) and hasattr(module, "processor")
    ]


def check_taps(model: torch.nn.Module, names: list[str]) -> None:
    """Raise ``DitAttnError`` where a layer has no softmax attention to tap."""
    refused = [name for name in names if tap_of(model.get_submodule(name).processor) is None]
    if refused:
        kind = type(model.get_submodule(refused[0]).processor).__name__
        raise DitAttnError(
            f"{len(refused)} layers of {type(model).__name__} have no softmax attention to tap "
            f"({kind}: {', '.join(refused[:4])}{', ...' if len(refused) > 4 else ''}); remove the custom processor"
        )


def wanted_kinds(model: torch.nn.Module, methods: Sequence[Method], sites: Sequence[str]) -> frozenset[str]:
    """Return the kinds of attention calls that methods or an observer want, self attention where there are none.

    Raises:
        DitAttnError: unsupported family, or cross attention is wanted of a model without.
    """
    family = family_of(model, ())
    wanted = {method.slug or type(method).__name__: method.sites for method in methods}
    if sites:
        wanted["the observer"] = tuple(sites)
    kinds = [checked_kinds(model, family, where, who) for who, where in wanted.items()]
    return frozenset().union(*kinds) if kinds else frozenset({"self"})


def checked_kinds(model: torch.nn.Module, family: Family, sites: Sequence[str], who: str) -> frozenset[str]:
    """Return the kinds of attention calls that sites mean in a family; ``who`` wants them.

    Raises:
        DitAttnError: no such site, or cross attention is wanted of a model without.
    """
    unknown = [site for site in sites if site not in SITES]
    if unknown or isinstance(sites, str):
        raise DitAttnError(f"{who}: sites must be a tuple of {', '.join(SITES)}, got {shorten(sites)}")
    kinds = kinds_at(sites, family.text_kind)
    if "cross" in kinds and not cross_layers(model, family):
        raise DitAttnError(
            f"{who} needs cross attention, and {type(model).__name__} has none: its text is part of the sequence"
        )
    return kinds
