"""A second pass through a transformer over some rows of its batch, and the blocks it need not compute again."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach import compat
from dit_attn.processors.attach.batch import take, take_call
from dit_attn.processors.attach.families import Axis


def block_order(model: torch.nn.Module, layers: Sequence[str]) -> list[str]:
    """Module paths of the blocks around attention layers, in the order they run: ``blocks.3`` of ``blocks.3.attn1``.

    Whole stacks are listed, so that a block without an addressable layer is not forgotten.
    """
    stacks = dict.fromkeys(_block_of(layer).rpartition(".")[0] for layer in layers)
    return [f"{stack}.{i}" for stack in stacks for i in range(len(_stack(model, stack)))]


def _block_of(layer: str) -> str:
    """``blocks.3`` of ``blocks.3.attn1``: the path up to its first number."""
    parts = layer.split(".")
    end = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: end + 1])


def first_block(blocks: Sequence[str], layers: Sequence[str], skipped: Sequence[str]) -> int:
    """Position of the first block whose result differs when ``layers`` are perturbed and ``skipped`` left out."""
    touched = {_block_of(layer) for layer in layers} | set(skipped)
    return next(i for i, block in enumerate(blocks) if block in touched)


def _stack(model: torch.nn.Module, path: str) -> Any:
    return model.get_submodule(path)


class Prefix:
    """The blocks before the first perturbed one: their work is taken over from the plain pass.

    The plain pass shows what the first perturbed block is given; the second pass hands that block the same, and the
    blocks before it return at once.
    """

    def __init__(self, model: torch.nn.Module, blocks: Sequence[str], axes: Mapping[str, Axis]) -> None:
        """``blocks``: paths of the blocks to save, and last the first one to run again; ``axes``: see
        ``Family.batch_axes``."""
        self.axes = axes
        self.modules = [model.get_submodule(block) for block in blocks]
        self.handles: list[Any] = []
        self.given: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.results: dict[str, Any] = {}
        self._stacks = [block.rpartition(".")[0] for block in blocks]

    @property
    def saved(self) -> int:
        """Blocks that the second pass does not run."""
        return len(self.modules) - 1

    def watch(self) -> None:
        """Record in the next pass."""
        self.forget()
        self.handles.append(self.modules[-1].register_forward_pre_hook(self._see_input, with_kwargs=True))
        for i, stack in enumerate(self._stacks[:-1]):
            if stack not in self._stacks[:i]:
                self.handles.append(self.modules[i].register_forward_hook(self._see_output(stack)))

    def forget(self) -> None:
        """Drop what was recorded."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.given, self.results = [], None, {}

    def replacements(
        self, index: Sequence[int], rows: int, other: Mapping[torch.nn.Module, Callable[..., Any]]
    ) -> dict[torch.nn.Module, Callable[..., Any]]:
        """Forwards of the second pass over the rows ``index`` of ``rows``; what earlier blocks return only has the
        right form, since the last one is handed what it was given before. ``other``: forwards that differ anyway."""
        assert self.given is not None
        whole = len(index) == rows
        args, kwargs = self.given
        if not whole:
            args, kwargs = (), take_call(self.modules[-1], args, kwargs, index, rows, self.axes)
        results = {s: r if whole else take(r, index, rows) for s, r in self.results.items()}
        found: dict[torch.nn.Module, Callable[..., Any]] = {}
        for module, stack in zip(self.modules[:-1], self._stacks):
            found[module] = lambda *_, result=results[stack], **__: result
        last = self.modules[-1]
        run = other.get(last, last.forward)
        found[last] = lambda *_, **__: run(*args, **kwargs)
        return found

    def _see_input(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.given = (args, dict(kwargs))

    def _see_output(self, stack: str) -> Callable[..., None]:
        def see(module: torch.nn.Module, args: Any, output: Any) -> None:
            self.results[stack] = output

        return see


@contextmanager
def forwards(replaced: Mapping[torch.nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Other forwards for some modules, for the length of a ``with`` block."""
    names = ("forward", "_compiled_call_impl")
    kept = {module: {name: module.__dict__.pop(name, None) for name in names} for module in replaced}
    for module, forward in replaced.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, before in kept.items():
            del module.__dict__["forward"]
            module.__dict__.update({name: value for name, value in before.items() if value is not None})


def passing(block: torch.nn.Module) -> Callable[..., Any]:
    """A forward that hands a block's inputs on: the block is skipped, its residual streams go by.

    Raises:
        DitAttnError: which input belongs to which output of the block is not known.
    """
    order = compat.block_streams(block)
    if order is None:
        raise DitAttnError(
            f"{type(block).__name__} cannot be skipped: its streams are not known to diffusers' layer skipping; "
            "use STG(mode='attention') or SoftPAG instead"
        )
    signature = inspect.signature(type(block).forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(block, *args, **kwargs).arguments
        streams = tuple(given.get(name) for name in order)
        return streams[0] if len(streams) == 1 else streams

    return forward
