"""Tensors that a method learns: a module per attention layer, owned by the transformer while the method is enabled.

They are the last child of the transformer, so that ``.to``, ``parameters()``, optimizers, moving averages and
``state_dict`` see them behind the model's own, under ``dit_attn.<method>.<layer>``.
"""

from __future__ import annotations

import copy
import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dit_attn.errors import DitAttnError, cut, shorten
from dit_attn.processors.core.layer import Layer

CHILD = "dit_attn"
"""Name of the child of a transformer that holds the learned tensors."""


@dataclass(frozen=True)
class LayerShape:
    """Sizes of one attention layer.

    Attributes:
        name: module path in the transformer, e.g. ``"blocks.3.attn1"``.
        kind: ``"self"`` or ``"cross"`` attention.
        index: position among the layers of its kind, from 0.
        count: number of layers that the method applies to.
        heads: query heads.
        kv_heads: heads of the key projection; divides ``heads``. Some models repeat them before the attention call.
        head_dim: channels of a head.
        hidden_size: channels of a token that enters the layer.
        dtype: type that the layer computes in.
        outputs: its output projections and the channels of their results: ``to_out``, and ``to_add_out`` where the text
            has one of its own; empty where they are not linear layers of the module.
    """

    name: str
    kind: str
    index: int
    count: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    dtype: torch.dtype
    outputs: tuple[tuple[str, int], ...] = ()


class LearnedModules(torch.nn.Module):
    """The modules of the methods that learn, a child per method and under it one per layer.

    A pickled transformer comes back without methods, so that this module is pickled empty.

    Args:
        transformer: class name of the transformer.

    Attributes:
        methods: the methods by the name of their child.
        counts: number of layers that each of them applies to.
    """

    def __init__(self, transformer: str = "") -> None:
        super().__init__()
        self.transformer = transformer
        self.methods: dict[str, Any] = {}
        self.counts: dict[str, int] = {}
        self.register_load_state_dict_post_hook(_allow_absence)

    def __deepcopy__(self, memo: dict[int, Any]) -> LearnedModules:
        clone = memo[id(self)] = LearnedModules(self.transformer)
        for name, child in self._modules.items():
            clone.add_module(name, copy.deepcopy(child, memo))
        clone.methods, clone.counts = dict(self.methods), dict(self.counts)
        return clone.train(self.training)

    def __reduce__(self) -> Any:
        return LearnedModules, ()

    def bind(self, layers: Sequence[Layer]) -> None:
        """Give every layer its modules."""
        for name, method in self.methods.items():
            for layer in layers:
                if (module := self.find(name, layer.name)) is not None:
                    layer.learned[id(method)] = module

    def add(self, method: Any, modules: dict[str, torch.nn.Module], count: int) -> str:
        """Register the modules of a method for some of its ``count`` layers; returns the name of their child."""
        name = self._new_name(method, count)
        for layer, module in modules.items():
            parent: torch.nn.Module = self
            *path, last = (name, *layer.split("."))
            for part in path:
                if part not in parent._modules:
                    parent.add_module(part, torch.nn.Module())
                parent = parent.get_submodule(part)
            parent.add_module(last, module)
        return name

    def adopt(self, method: Any, other: LearnedModules, child: str) -> None:
        """Take modules over from ``other``, where they are called ``child``: the same objects."""
        self.add_module(self._new_name(method, other.counts[child]), other.get_submodule(child))

    def _new_name(self, method: Any, count: int) -> str:
        base = (method.slug or type(method).__name__).replace("-", "_")
        names = itertools.chain([base], (f"{base}_{count}" for count in itertools.count(2)))
        name = next(name for name in names if name not in self.methods)
        self.methods[name], self.counts[name] = method, count
        return name

    def find(self, name: str, layer: str) -> torch.nn.Module | None:
        """Return a layer's module of the method with a child of this name, ``None`` where it has none."""
        try:
            return self.get_submodule(f"{name}.{layer}")
        except AttributeError:
            return None

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """Return a copy of a method's tensors on the CPU, by layer and name.

        Raises:
            DitAttnError: they are not in memory.
        """
        state = self.get_submodule(name).state_dict()
        if any(x.is_meta for x in state.values()):
            raise DitAttnError(
                f"the tensors of {name} are on the meta device or offloaded; call remove_all_hooks() of the pipeline "
                "before you save them"
            )
        return {key: x.detach().cpu().clone(memory_format=torch.contiguous_format) for key, x in state.items()}

    def load(self, name: str, tensors: dict[str, torch.Tensor], source: str) -> None:
        """Copy saved tensors into those of a method.

        Args:
            name: of the method's child.
            tensors: by layer and name.
            source: where they come from, for messages.

        Raises:
            DitAttnError: other names or shapes, or a value that is not finite; nothing is copied then.
        """
        own = self.get_submodule(name).state_dict()
        for key in [*own, *tensors]:
            problem = _mismatch(own.get(key), tensors.get(key))
            if problem is not None:
                raise DitAttnError(
                    f"{cut(source, 100)}: {cut(key, 100)} {problem}; give the folder that was saved with this method, "
                    "these settings and this model"
                )
        with torch.no_grad():
            for key, x in own.items():
                x.copy_(tensors[key])


def _mismatch(own: torch.Tensor | None, given: torch.Tensor | None) -> str | None:
    """Why a saved tensor cannot become one of ours, or ``None``."""
    if own is None or given is None:
        return "is missing" if given is None else "is no tensor of the method"
    if own.shape != given.shape:
        return f"is {shorten(tuple(given.shape))} and must be {tuple(own.shape)}"
    return None if bool(torch.isfinite(given.float()).all()) else "has values that are not finite"


def make_module(make: Callable[[LayerShape], torch.nn.Module | None], shape: LayerShape) -> torch.nn.Module | None:
    """Return what ``make`` returns for a layer, on the CPU: random values depend on the seed alone and use up none."""
    with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.device("cpu"):
        return make(shape)


def untrained_modules(method: Any, call: Any) -> dict[int, torch.nn.Module]:
    """Return new modules of a method for the layer of an attention call, as ``layer.learned`` has them.

    For measurements of single calls outside of a model.
    """
    if not method.learns:
        return {}
    (heads, size), kv_heads = call.q.shape[2:], call.k.shape[2]
    place = (call.layer.name, "self", call.layer.index, call.layer_count)
    shape = LayerShape(*place, heads, kv_heads, size, heads * size, call.q.dtype)
    module = make_module(method.parameters_for, shape)
    return {} if module is None else {id(method): module.to(call.q.device)}


def on_device(module: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """Return the module, moved to ``device`` if it is elsewhere; meta tensors are those of a hook that brings them."""
    if any(x.device != device and not x.is_meta for x in _tensors(module)):
        module.to(device)
    return module


def _tensors(module: torch.nn.Module) -> Iterator[torch.Tensor]:
    yield from module.parameters()
    yield from module.buffers()


def _allow_absence(module: torch.nn.Module, incompatible: Any) -> None:
    """A state dict of the stock model has none of our tensors: they keep their values."""
    own = [f"{CHILD}.{name}" for name in module.state_dict()]
    missing = [name for name in incompatible.missing_keys if name.endswith(tuple(own))] if own else []
    if missing and len(missing) == len(own):
        incompatible.missing_keys[:] = [name for name in incompatible.missing_keys if name not in missing]
        warnings.warn(
            "dit_attn: the state dict has none of the tensors that the enabled methods learn: they keep their values. "
            "Saved ones are loaded by enable(pipe, folder)",
            stacklevel=3,
        )
