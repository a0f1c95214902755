"""Run a second pass through a transformer over some batch rows, and reuse the blocks it shares with the first."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach import compat, key_cache, step_cache
from dit_attn.processors.attach.batch import take, take_call
from dit_attn.processors.attach.families import Axis

if TYPE_CHECKING:
    from dit_attn.processors.attach.transformer_run import TransformerRun

_RESIDUALS = ("controlnet", "control")  # arguments that are added between blocks


def block_order(model: torch.nn.Module, layers: Sequence[str]) -> list[str]:
    """Return the module paths of the blocks around attention layers, in the order they run.

    ``blocks.3`` of ``blocks.3.attn1``. All blocks of a stack are listed, those without a listed layer too.
    """
    stacks = dict.fromkeys(block_of(layer).rpartition(".")[0] for layer in layers)
    sizes = {stack: len(cast(Sized, model.get_submodule(stack))) for stack in stacks}
    return [f"{stack}.{i}" for stack, size in sizes.items() for i in range(size)]


def block_of(layer: str) -> str:
    """Return ``blocks.3`` of ``blocks.3.attn1``: the path up to its first number."""
    parts = layer.split(".")
    end = next(i for i, part in enumerate(parts) if part.isdigit())
    return ".".join(parts[: end + 1])


def first_block(blocks: Sequence[str], layers: Sequence[str], skipped: Sequence[str]) -> int:
    """Return the position of the first block that differs when ``layers`` are perturbed and ``skipped`` left out."""
    touched = {block_of(layer) for layer in layers} | set(skipped)
    return next(i for i, block in enumerate(blocks) if block in touched)


class Prefix:
    """The blocks before the first perturbed one: the perturbed pass reuses their work from the plain pass.

    The plain pass records the input of the first perturbed block; the second pass gives that block the same input, and
    the blocks before it return at once.

    Args:
        model: the transformer.
        blocks: paths of the blocks to reuse, and last the first one to run again.
        axes: see ``Family.batch_axes``.
    """

    def __init__(self, model: torch.nn.Module, blocks: Sequence[str], axes: Mapping[str, Axis]) -> None:
        self.axes = axes
        self.modules = [model.get_submodule(block) for block in blocks]
        self.handles: list[Any] = []
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.results: dict[str, Any] = {}
        self._stacks = [block.rpartition(".")[0] for block in blocks]

    @property
    def saved(self) -> int:
        """Number of blocks that the second pass does not run."""
        return len(self.modules) - 1

    def record(self) -> None:
        """Record the next pass."""
        self.clear()
        self.handles.append(self.modules[-1].register_forward_pre_hook(self._record_input, with_kwargs=True))
        for i, stack in enumerate(self._stacks[:-1]):
            if stack not in self._stacks[:i]:
                self.handles.append(self.modules[i].register_forward_hook(self._record_output(stack)))

    def clear(self) -> None:
        """Drop what was recorded, and the hooks that record."""
        for handle in self.handles:
            handle.remove()
        self.handles, self.inputs, self.results = [], None, {}

    def replacements(
        self, index: Sequence[int], rows: int, other: Mapping[torch.nn.Module, Callable[..., Any]]
    ) -> dict[torch.nn.Module, Callable[..., Any]]:
        """Return the forwards of the second pass over some rows.

        The results of earlier blocks only need the right form: the last block gets its recorded input.

        Args:
            index: the rows of the second pass.
            rows: rows of the plain pass.
            other: forwards that differ anyway.
        """
        assert self.inputs is not None
        full = len(index) == rows
        args, kwargs = self.inputs
        if not full:
            args, kwargs = (), take_call(self.modules[-1], args, kwargs, index, rows, self.axes)
        results = {s: r if full else take(r, index, rows) for s, r in self.results.items()}
        found: dict[torch.nn.Module, Callable[..., Any]] = {}
        for module, stack in zip(self.modules[:-1], self._stacks):
            found[module] = lambda *_, result=results[stack], **__: result
        last = self.modules[-1]
        run = other.get(last, last.forward)
        found[last] = lambda *_, **__: run(*args, **kwargs)
        return found

    def _record_input(self, module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.inputs = (args, dict(kwargs))

    def _record_output(self, stack: str) -> Callable[..., None]:
        def record(module: torch.nn.Module, args: Any, output: Any) -> None:
            self.results[stack] = output

        return record


def shareable_prefix(
    run: TransformerRun, blocks: Sequence[str], first: int, kwargs: Mapping[str, Any]
) -> Prefix | None:
    """Return the blocks that two passes compute alike, ``None`` where none can be reused.

    Args:
        run: the run.
        blocks: every block, in order.
        first: position of the first block that differs.
        kwargs: arguments of the transformer's call.
    """
    model: Any = run.model
    if not first or not run.family.block_chain or step_cache.is_cached(model) or key_cache.is_used(kwargs):
        return None
    if any(value is not None and any(word in name for word in _RESIDUALS) for name, value in kwargs.items()):
        return None
    alike = blocks[: first + 1]
    modules = [model, *(model.get_submodule(block) for block in alike)]
    hooked = any(getattr(module, "_diffusers_hook", None) is not None for module in modules[1:])
    if hooked or any(module._compiled_call_impl is not None for module in modules):
        return None
    return Prefix(model, alike, run.family.batch_axes)


@contextmanager
def replaced_forwards(replaced: Mapping[torch.nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forwards of some modules for the length of a ``with`` block."""
    names = ("forward", "_compiled_call_impl")
    before = {module: {name: module.__dict__.pop(name, None) for name in names} for module in replaced}
    for module, forward in replaced.items():
        module.__dict__["forward"] = forward
    try:
        yield
    finally:
        for module, stock in before.items():
            del module.__dict__["forward"]
            module.__dict__.update({name: value for name, value in stock.items() if value is not None})


def skip_forward(block: torch.nn.Module) -> Callable[..., Any]:
    """Return a forward that skips a block: it returns the residual streams it is given.

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
