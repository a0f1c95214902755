"""One wrapped attention layer: what it is called, what it did in the run, and what methods store for it."""

from __future__ import annotations

import copy
import itertools
import time
import weakref
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_attn.errors import DitAttnError

next_id = itertools.count(time.time_ns()).__next__
"""Number for the next handle; layers and run states share the sequence. A package that is loaded again has another."""
_LAYERS: weakref.WeakValueDictionary[int, Layer] = weakref.WeakValueDictionary()

KINDS = {"self": "self attention", "cross": "cross attention", "image": "cross attention to an image"}
"""Kinds of attention calls: the sequence attends to itself, to the text, or to the tokens of a conditioning image."""
SITES = (*KINDS, "text")
"""Where a method may apply: the kinds of calls, or ``"text"``, for those whose keys are or contain the text."""


PLAIN = "plain"
"""Name of the pass whose result the pipeline gets; others are ``"perturbed"`` and ``"twin"``."""


def new_handle(number: int) -> torch.Tensor:
    """Return a 0-d int64 CPU tensor that names an object in compiled graphs, which do not guard tensors by value."""
    return torch.tensor(number, dtype=torch.int64, device="cpu")


@dataclass
class LayerStats:
    """What one layer did in the current run.

    Attributes:
        calls: attention calls that reached the layer.
        sparse_calls: calls that a method carried out.
        fallbacks: calls that took stock attention, by reason.
        biased_calls: calls with a logit bias, sparse or dense.
        scaled_calls: calls with another softmax scale, stock attention included.
        replaced_calls: calls whose output a method replaced; nothing was computed.
        moved: steps at which the layer's tokens had other positions, by what moved them.
        computed: sum over the sparse calls of the attention computed, as a fraction of dense (all rows, all keys).
        seconds: time spent in sparse calls (host time; on an accelerator it is the time to enqueue them).
        dense_calls: calls in stock attention that were timed: those that a sparse method left dense, on the CPU.
        dense_seconds: their time.
        error: relative L2 error measured on sampled rows of the first sparse call, the largest where densities change
            over the run; ``None`` where no bound is set.
        measured: densities whose error was measured for ``max_error``.
        measurements: of errors for ``target_error``.
        measuring: attention that they computed, as a fraction of dense, summed.
        kernels: sparse calls whose kernel was chosen for a property of this machine, by kernel and reason.
    """

    calls: int = 0
    sparse_calls: int = 0
    biased_calls: int = 0
    scaled_calls: int = 0
    replaced_calls: int = 0
    moved: dict[str, set[int]] = field(default_factory=dict)
    fallbacks: Counter[str] = field(default_factory=Counter)
    computed: float | torch.Tensor = 0.0
    seconds: float = 0.0
    dense_calls: int = 0
    dense_seconds: float = 0.0
    error: float | None = None
    measured: set[float | tuple[float, ...] | None] = field(default_factory=set)
    measurements: int = 0
    measuring: float = 0.0
    kernels: Counter[str] = field(default_factory=Counter)

    def note_error(self, error: float) -> None:
        """Note a measured error; one that is not a number counts as the largest."""
        self.error = error if self.error is None or not error <= self.error else self.error


class PassStates:
    """What methods store from step to step, apart for every window of the sample and every pass."""

    def __init__(self) -> None:
        self._place: tuple[Hashable, str] = (None, PLAIN)  # window and pass
        self.current: dict[Any, Any] = {}
        self._states: dict[tuple[Hashable, str], dict[Any, Any]] = {self._place: self.current}

    def begin_call(self, window: Hashable = None, pass_name: str = PLAIN) -> None:
        """Note that a pass through the transformer for one window of the sample begins."""
        self._place = (window, pass_name)
        self.current = self._states.setdefault(self._place, {})

    def of(self, pass_name: str) -> dict[Any, Any]:
        """Return what was stored in another pass for the same window; empty where there was none."""
        return self._states.get((self._place[0], pass_name), {})

    def snapshot(self) -> PassStates:
        """Return it with the current state copied: what is stored from here on does not change the copy."""
        found = copy.copy(self)
        found.current = dict(self.current)
        return found

    def drop(self) -> None:
        """Empty the state of every window and pass."""
        self.current = {}
        self._states = {self._place: self.current}


STALE = "this model was compiled with another load of dit_attn, or is gone; call dit_attn.enable(...) on it again"


class Layer:
    """One wrapped attention layer of a transformer.

    Attributes:
        name: module path in the transformer, e.g. ``"blocks.3.attn1"``.
        index: position among the wrapped layers of its kind, from 0.
        calls: kinds (:data:`KINDS`) of the attention calls that its processor makes, in order.
        call_kind: kind of the current attention call.
        handle: names the layer inside compiled graphs.
        disabled: reason why this layer stays dense until it is enabled again (a failed kernel, NaN), or ``None``.
        disabled_run: whether that ends with the run, since its input is to blame (NaN, out of memory).
        rows: first and last + 1 of the model's batch rows in the current attention call; some models attend to their
            samples one by one.
        learned: modules of the methods that learn, by the method's ``id``.
        inputs: hidden states (B, S, C) that enter the layer, while its processor runs for a method that reads them.
        raw_queries: queries before their normalization, in the processor's own layout, while it runs for a method that
            reads them; ``None`` where none was seen.
        normalizes_queries: whether the queries of the attention call are normalized, or nothing is known about them.
        reduced: what the processor gets in the place of the layer's module, with some of its heads, or ``None``.
        kept_heads: heads that attention is computed for, where the module projects others too; ``None`` for all.
        stateless: reason why nothing that an earlier step stored is right for the rest of the run, or ``None``.
    """

    def __init__(self, name: str, index: int, calls: Sequence[str] = ("self",)) -> None:
        self.name, self.index, self.calls = name, index, tuple(calls)
        self.call_kind = self.calls[0]
        self.id = next_id()
        self.handle = new_handle(self.id)
        self.disabled: str | None = None
        self.disabled_run = False
        self.checked_run = 0
        self.rows = (0, 0)
        self._states = PassStates()
        self.stats = LayerStats()
        self.learned: dict[int, torch.nn.Module] = {}
        self.inputs: torch.Tensor | None = None
        self.raw_queries: torch.Tensor | None = None
        self.normalizes_queries = True
        self.reduced: Any = None
        self.kept_heads: tuple[int, ...] | None = None
        self.stateless: str | None = None
        _LAYERS[self.id] = self

    @property
    def kind(self) -> str:
        """``"self"`` or ``"cross"``."""
        return "self" if self.calls == ("self",) else "cross"

    @property
    def state(self) -> dict[Any, Any]:
        """What methods store for this layer from step to step, of the current window and pass; emptied by a new run."""
        return self._states.current

    def begin_call(self, window: Hashable = None, pass_name: str = PLAIN) -> None:
        """Note that a pass through the transformer for one window of the sample begins."""
        self.rows = (0, 0)
        self._states.begin_call(window, pass_name)

    def state_of(self, pass_name: str) -> dict[Any, Any]:
        """Return what methods stored in another pass for the same window; empty where there was none."""
        return self._states.of(pass_name)

    def advance_rows(self, count: int, turn: int = 0) -> None:
        """Note that an attention call of ``count`` batch rows begins, the one at ``turn`` of the processor's call."""
        turn %= len(self.calls)
        self.call_kind = self.calls[turn]
        if turn == 0:  # the other calls of the processor are for the same rows
            self.rows = (self.rows[1], self.rows[1] + count)

    def begin_run(self) -> None:
        """Empty the statistics and the state; a fault of the last run's input is over."""
        self.stats = LayerStats()
        self.stateless = None
        self.drop_state()
        if self.disabled_run:
            self.disabled, self.disabled_run = None, False

    def drop_state(self) -> None:
        """Empty the state of every window and pass."""
        self._states.drop()

    def __repr__(self) -> str:
        return f"Layer({self.name!r}, index={self.index})"


def kinds_at(sites: Iterable[str], text: str) -> frozenset[str]:
    """Return the kinds of attention calls that some sites are.

    Args:
        sites: of :data:`SITES`.
        text: kind of the calls whose keys are or contain the text.
    """
    return frozenset(text if site == "text" else site for site in sites)


def layer_by_id(number: int) -> Layer:
    """Return the layer behind a handle.

    Raises:
        DitAttnError: it is gone: a graph was compiled before the package was loaded again.
    """
    layer = _LAYERS.get(number)
    if layer is None:
        raise DitAttnError(STALE)
    return layer
