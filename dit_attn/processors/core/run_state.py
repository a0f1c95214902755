"""State of one transformer's run: its layers, the parts of its sequence, its step, and the branch of every row."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.core.call import AttentionCall, CallMethod, CallPerturbation, Request
from dit_attn.processors.core.cfg import SEPARATE, CFGRule
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.layer import KINDS, PLAIN, STALE, Layer, PassStates, kinds_at, new_handle, next_id
from dit_attn.processors.core.tokens import TokenLayout, Tokens

Observer = Callable[[AttentionCall, Request, torch.Tensor], None]
_RUNS: weakref.WeakValueDictionary[int, RunState] = weakref.WeakValueDictionary()


class RunState:
    """What an attention call needs to know of the run it belongs to. A host fills it in; nothing here knows the host.

    Attributes:
        methods: the enabled methods, in order.
        clock: step and branch; shared by the transformers of one pipeline.
        cfg: how the run does classifier-free guidance.
        mask_rule: see :class:`~dit_attn.processors.core.call.AttentionCall`.
        text_kind: kind of the attention calls whose keys are or contain the text, see
            :data:`~dit_attn.processors.core.layer.KINDS`.
        layers: the wrapped layers.
        layout: parts of the sequence of the current input, ``None`` before the first call.
        layout_error: reason why they are unknown, or ``None``.
        observers: called after every attention call with the call, its request (``layout`` is ``None`` where no sparse
            method applied, ``biases`` is empty where no bias did) and the result (B, S, H, Dv); see
            :func:`dit_attn.observing`.
        perturbed: what the current pass perturbs, ``None`` in plain passes.
        first_perturbed: first batch row that is perturbed in it.
        negative_rows: rows of the branch ``"negative"`` at the end of the batch, see :meth:`append_negative`.
        pass_name: ``"plain"``, ``"perturbed"`` or ``"twin"``: what the current pass through the transformer is for.
        shared: what methods store for all layers together.
        given: what the code around the runs hands to methods, by slug; it stays until it is replaced.
        reports: what methods say of the last run, by slug, as dataclasses of JSON values with ``warnings``; emptied
            when a new one begins.
        handle: names the run inside compiled graphs.
    """

    def __init__(
        self,
        methods: Sequence[CallMethod],
        clock: Clock,
        cfg: CFGRule = SEPARATE,
        mask_rule: str = "key",
        text_kind: str = "self",
    ) -> None:
        self.methods, self.clock, self.cfg, self.mask_rule = tuple(methods), clock, cfg, mask_rule
        self.text_kind = text_kind
        self._methods = {kind: tuple(m for m in methods if kind in kinds_at(m.sites, text_kind)) for kind in KINDS}
        self._guided = {kind: all(m.role == "guidance" for m in found) for kind, found in self._methods.items()}
        self._counts: Counter[str] = Counter()
        self.layers: list[Layer] = []
        self.shared = PassStates()
        self.given: dict[str, Any] = {}
        self.reports: dict[str, Any] = {}
        self.layout: TokenLayout | None = None
        self.layout_error: str | None = None
        self.observers: list[Observer] = []
        self.perturbed: CallPerturbation | None = None
        self.first_perturbed = 0
        self.negative_rows = 0
        self.pass_name = PLAIN
        self._pass_branches: tuple[str, ...] = ()  # of every row, in a pass that is not the plain one
        self.id = next_id()
        self.handle = new_handle(self.id)
        self._batch = 1
        self._all_perturbed = False
        self._tokens: dict[tuple[int, int], Tokens | None] = {}
        self._named: tuple[Any, tuple[str, ...]] = (None, ())  # branches of every row, and of which call
        _RUNS[self.id] = self

    @property
    def layer_count(self) -> int:
        """Number of wrapped self-attention layers."""
        return self.count("self")

    def count(self, kind: str) -> int:
        """Return the number of wrapped layers of a kind, ``"self"`` or ``"cross"``."""
        return self._counts[kind]

    def methods_for(self, kind: str) -> tuple[CallMethod, ...]:
        """Return the enabled methods that apply to attention calls of a kind."""
        return self._methods[kind]

    def only_guidance(self, kind: str) -> bool:
        """Return whether all methods that apply to attention calls of a kind work on the perturbed pass alone."""
        return self._guided[kind]

    @property
    def window(self) -> Hashable:
        """Window of the sample that the current call is for, ``None`` where there is only one."""
        return self.clock.position.window if self.clock.position is not None else None

    def add_layer(self, name: str, calls: Sequence[str] = ("self",)) -> Layer:
        """Register the next layer; ``calls`` as for :class:`~dit_attn.processors.core.layer.Layer`."""
        layer = Layer(name, 0, calls)
        layer.index = self._counts[layer.kind]
        self._counts[layer.kind] += 1
        self.layers.append(layer)
        return layer

    def remove_layers(self, layers: Sequence[Layer]) -> None:
        """Forget the layers that were registered last."""
        for layer in layers:
            self.layers.remove(layer)
            self._counts[layer.kind] -= 1

    def set_layout(self, layout: TokenLayout | None, error: str | None = None) -> None:
        """Set the parts of the sequence of the transformer call that is about to start, or why they are unknown."""
        self.layout, self.layout_error, self._tokens = layout, error, {}

    def layout_of(self, layer: Layer | None) -> TokenLayout | None:
        """Return the parts of the sequence of a layer, by default of most, ``None`` when they are unknown."""
        return self.layout if self.layout is None or layer is None else self.layout.of_layer(layer.name)

    def tokens(self, seq_len: int, layer: Layer | None = None) -> Tokens | None:
        """Return the parts of ``seq_len`` tokens, ``None`` when they are unknown or do not add up.

        Args:
            seq_len: length of the sequence.
            layer: whose sequence; default: that of most layers.
        """
        layout = self.layout_of(layer)
        if layout is None:
            return None
        key = (id(layout), seq_len)
        if key not in self._tokens:
            self._tokens[key] = layout.resolve(seq_len)
        return self._tokens[key]

    def begin_call(self, rows: int) -> None:
        """Note that a transformer call of ``rows`` batch rows begins."""
        self._batch, self._named = rows, (None, ())
        self.shared.begin_call(self.window, self.pass_name)
        for layer in self.layers:
            layer.begin_call(self.window, self.pass_name)

    def drop_state(self) -> None:
        """Free what methods stored from step to step."""
        self.shared.drop()
        for layer in self.layers:
            layer.drop_state()

    def branches(self, batch: int, first: int = 0) -> tuple[str, ...]:
        """Return the guidance branch of every row of an attention call.

        Args:
            batch: rows of the call.
            first: first batch row of the model in the call; counts in models that attend sample by sample.
        """
        rows = max(batch, self._batch)
        names = self._branch_names(rows)
        return tuple(names[(first + row) % rows] for row in range(batch))

    def samples(self, batch: int, first: int = 0) -> tuple[int, ...]:
        """Return which sample every row of an attention call is of, counted within its guidance branch.

        Args:
            batch, first: as for :meth:`branches`.
        """
        rows = max(batch, self._batch)
        names = self._branch_names(rows)
        at = [(first + row) % rows for row in range(batch)]
        return tuple(names[:row].count(names[row]) for row in at)

    def rows_by_branch(self) -> tuple[str, ...]:
        """Return the guidance branch of every batch row of the current transformer call."""
        return self._branch_names(self._batch)

    @contextmanager
    def perturbing(self, perturbation: CallPerturbation, rows: int) -> Iterator[None]:
        """Run a pass over ``rows`` batch rows, all of them perturbed."""
        self.perturbed = perturbation
        try:
            with self.in_pass("perturbed", ("perturbed",) * rows):
                yield
        finally:
            self.perturbed = None

    @contextmanager
    def in_pass(self, name: str, branches: Sequence[str]) -> Iterator[None]:
        """Run a pass beside the plain one: it has layer states of its own, and the clock stands still.

        Args:
            name: ``"perturbed"`` or ``"twin"``.
            branches: guidance branch of every batch row of the pass.
        """
        before = self._batch
        self.pass_name, self._pass_branches = name, tuple(branches)
        self.begin_call(len(branches))
        try:
            yield
        finally:
            self.pass_name, self._pass_branches = PLAIN, ()
            self.begin_call(before)

    def append_perturbed(self, perturbation: CallPerturbation, rows: int) -> None:
        """Add ``rows`` perturbed rows to the call that is about to start."""
        self.perturbed, self.first_perturbed = perturbation, self._batch
        self.begin_call(self._batch + rows)

    def drop_perturbed(self) -> None:
        """Note that the call with perturbed rows is over."""
        self.begin_call(self.first_perturbed)
        self.perturbed, self.first_perturbed = None, 0

    def append_negative(self, rows: int) -> None:
        """Add ``rows`` rows of the branch ``"negative"`` to the call that is about to start."""
        self.negative_rows = rows
        self.begin_call(self._batch + rows)

    def drop_negative(self) -> None:
        """Note that the call with rows of a negative prompt is over."""
        plain, self.negative_rows = self._batch - self.negative_rows, 0
        self.begin_call(plain)

    def find_piece(self, call: AttentionCall, piece: str | tuple[int, int]) -> torch.Tensor:
        """Return which keys of a call are tokens of a piece of the prompt; see :meth:`AttentionCall.prompt_tokens`."""
        raise DitAttnError("the prompts of this run are not known: nothing shows them")

    def find_prompts(self, call: AttentionCall) -> tuple[str, ...]:
        """Return the prompt of every row of a call; see :meth:`AttentionCall.prompts`."""
        raise DitAttnError("the prompts of this run are not known: nothing shows them")

    def branch_count(self, rows: int) -> int | None:
        """Return the guidance branches of the current step, 1 without guidance, ``None`` where nothing says.

        Args:
            rows: batch rows that are not perturbed.
        """
        return None

    def _branch_names(self, rows: int) -> tuple[str, ...]:
        clock = self.clock
        key = (rows, clock.run, clock.step, clock.call, clock.context, clock.position)
        if self._named[0] != key:  # asked at every layer
            self._named = key, self._find_branch_names(rows)
        return self._named[1]

    def _find_branch_names(self, rows: int) -> tuple[str, ...]:
        if self._all_perturbed:
            return ("perturbed",) * rows
        if self._pass_branches:
            return tuple(name for name in self._pass_branches for _ in range(rows // len(self._pass_branches)))
        appended = "negative" if self.negative_rows else "perturbed"
        plain = rows if self.perturbed is None else self.first_perturbed
        if self.negative_rows:  # a call may have several rows for each of the batch
            plain = rows - self.negative_rows * rows // self._batch
        names = self.clock.branches(plain, self.cfg, self.branch_count(plain)) if plain else ()
        return (*names, *(appended,) * (rows - plain))


def run_by_handle(handle: torch.Tensor) -> RunState:
    """Return the run behind the 0-d tensor that names it in compiled graphs.

    Raises:
        DitAttnError: it is gone: a graph was compiled before the package was loaded again.
    """
    run = _RUNS.get(int(handle))
    if run is None:
        raise DitAttnError(STALE)
    return run
