"""Step caches of other packages around a perturbed pass: cache-dit, and forwards that store their state on the model.

diffusers' own caches have a context for every branch. Others count the calls of the transformer, or compare a call
with the one before: a perturbed pass between two plain ones would be answered by the cache, or would shift its
decisions. cache-dit stores the forward it replaced, which the pass runs. For any other cache the pass begins in the
state of the plain pass, takes the same decision, and leaves no trace.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dit_attn.processors.core.layer import Layer


class LayerCalls:
    """Counts the attention calls of a pass through the transformer.

    Args:
        layers: the wrapped layers.
    """

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.layers, self.before = layers, [layer.stats.calls for layer in layers]

    @property
    def called(self) -> set[str]:
        """Names of the layers that were called since this object was made."""
        return {layer.name for layer, before in zip(self.layers, self.before) if layer.stats.calls > before}

    @property
    def answered(self) -> bool:
        """Whether layers that were called before in this run were not called since: a cache answered in their place."""
        return any(0 < before == layer.stats.calls for layer, before in zip(self.layers, self.before))


class ModuleState:
    """What the attributes of a module are, other than those of torch: counters and tensors of a step cache.

    Dictionaries, lists and sets are followed to any depth. Tensors are not copied.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.module = module
        self.values = {name: value for name, value in vars(module).items() if name not in _TORCH}
        self.contents: dict[int, tuple[Any, Any]] = {}
        for value in self.values.values():
            self._follow(value)

    def restore(self) -> None:
        """Give the module these attributes again, and its containers what they contained."""
        for name in [name for name in vars(self.module) if name not in _TORCH and name not in self.values]:
            del vars(self.module)[name]
        vars(self.module).update(self.values)
        for container, content in self.contents.values():
            container.clear()
            (container.extend if type(container) is list else container.update)(content)

    def _follow(self, value: Any) -> None:
        if type(value) not in (dict, list, set) or id(value) in self.contents:
            return
        self.contents[id(value)] = (value, value.copy())
        for item in value.values() if type(value) is dict else value:
            self._follow(item)


def is_cached(model: Any) -> bool:
    """Return whether a step cache of diffusers (FirstBlockCache and similar) is enabled on a transformer."""
    return bool(getattr(model, "is_cache_enabled", False))


def is_cache_dit(model: torch.nn.Module) -> bool:
    """Return whether cache-dit is enabled on a transformer."""
    return hasattr(model, "_context_manager") and hasattr(model, "_original_forward")


def has_foreign_forward(model: torch.nn.Module) -> bool:
    """Return whether other code has replaced the forward of a transformer or its class; it may be a step cache."""
    own = {f"{kind.__module__}.{kind.__qualname__}.forward" for kind in type(model).__mro__}
    layers: list[Any] = [model.forward]
    while layers:
        function = getattr(layers[-1], "__func__", layers[-1])
        wrapped = getattr(layers.pop(), "__wrapped__", None)
        layers += [] if wrapped is None else [wrapped]
        if isinstance(function, functools.partial):
            layers.append(function.func)
            continue
        home = getattr(function, "__globals__", {}).get("__name__", "")
        name = f"{home}.{getattr(function, '__qualname__', '')}"
        if home.partition(".")[0] not in _WRAPPERS and name not in own:
            return True
    return False


@contextmanager
def uncached_forward(
    model: torch.nn.Module, forward: Callable[..., Any], before: ModuleState | None
) -> Iterator[Callable[..., Any]]:
    """Give a forward of ``model`` that no step cache of another package answers, for the length of a ``with`` block.

    Args:
        model: the transformer.
        forward: what the plain pass has called.
        before: the state of the model before the plain pass; the state of now is restored at the end of the block.
    """
    if is_cache_dit(model):
        yield _without_cache_dit(model)
        return
    if before is None:
        yield forward
        return
    now = ModuleState(model)
    before.restore()
    try:
        yield forward
    finally:
        now.restore()


def _without_cache_dit(model: Any) -> Callable[..., Any]:
    """The forward that cache-dit replaced, with the offload hook that it calls around it."""
    hook, stock = getattr(model, "_hf_hook", None), model._original_forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        if hook is None:
            return stock(*args, **kwargs)
        args, kwargs = hook.pre_forward(model, *args, **kwargs)
        return hook.post_forward(model, stock(*args, **kwargs))

    return forward


_WRAPPERS = ("diffusers", "accelerate", "torch", "peft")  # packages that wrap a forward without answering for it
_TORCH = frozenset({*vars(torch.nn.Module()), "forward", "_compiled_call_impl"})
