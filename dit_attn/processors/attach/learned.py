"""Make, load and save the modules of the methods that learn."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach.families import Family
from dit_attn.processors.attach.layer_shape import compute_device, layer_shape
from dit_attn.processors.core.layer import Layer, kinds_at
from dit_attn.processors.core.parameters import LearnedModules, make_module
from dit_attn.processors.methods.base import Method
from dit_attn.processors.methods.saved import TENSORS, Origin, contents, dump_tensors, load_tensors


def learned_modules(
    model: torch.nn.Module,
    family: Family,
    layers: Sequence[Layer],
    methods: Sequence[Method],
    component: str,
    previous: LearnedModules | None = None,
) -> LearnedModules:
    """Return the modules of the methods that learn, with the tensors that their ``weights`` name.

    Args:
        model: the transformer; not changed.
        family: its row of the family table.
        layers: its layers.
        methods: the methods to enable.
        component: name of the transformer in its pipeline.
        previous: modules of the methods enabled before. A method that is enabled again, or that continues one of them,
            takes them over.

    Raises:
        DitAttnError: saved tensors that are missing or do not fit.
    """
    found = LearnedModules(type(model).__name__)
    for method in {id(method): method for method in methods if method.learns}.values():
        kinds = kinds_at(method.sites, family.text_kind)
        mine = [layer for layer in layers if not kinds.isdisjoint(layer.calls)]
        child = _reusable(method, previous, found)
        if previous is not None and child is not None:
            found.adopt(method, previous, child)
        elif modules := _make(method, model, mine):
            name = found.add(method, modules, len(mine))
            if method.weights is not None:
                origin = Origin(method.slug, found.transformer, len(mine))
                found.load(name, load_tensors(method.weights, component, origin), method.weights)
    found.train(model.training).bind(layers)
    return found


def _reusable(method: Method, previous: LearnedModules | None, found: LearnedModules) -> str | None:
    """Name of the method's modules among those of before, ``None`` where they are taken or not its own."""
    taken = {id(child) for child in found.children()}
    for name, old in previous.methods.items() if previous is not None else ():
        again = old is method or method.continues(old)
        if again and previous is not None and id(previous.get_submodule(name)) not in taken:
            return name
    return None


def _make(method: Method, model: torch.nn.Module, layers: Sequence[Layer]) -> dict[str, torch.nn.Module]:
    """New modules of a method by layer."""
    found = {}
    for layer in layers:
        attention = model.get_submodule(layer.name)
        module = make_module(method.parameters_for, layer_shape(layer, attention, len(layers)))
        if module is not None:
            found[layer.name] = module.to(compute_device(attention))
    return found


def saved_files(learned: dict[str, LearnedModules]) -> dict[str, dict[str, bytes]]:
    """Return the files of the methods that learn, by folder and name.

    Args:
        learned: modules by the transformer's name in the pipeline.

    Returns:
        ``{folder: {name: contents}}``; a method that learns alone has the folder ``""``.

    Raises:
        DitAttnError: no method learns, or tensors are not in memory.
    """
    first = next(iter(learned.values()))
    if not first.methods:
        raise DitAttnError("no enabled method learns tensors; save settings with save_pretrained of the method")
    files = {}
    for name, method in first.methods.items():
        tensors = {
            TENSORS[component]: dump_tensors(own, name, Origin(method.slug, own.transformer, own.counts[name]))
            for component, own in learned.items()
        }
        files["" if len(first.methods) == 1 else name] = contents(method.to_dict(), tensors)
    return files
