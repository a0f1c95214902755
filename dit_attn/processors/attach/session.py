"""State of the enabled methods on one transformer of a stock diffusers pipeline."""

from __future__ import annotations

import copy
import functools
import threading
import warnings
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach.components import component_name
from dit_attn.processors.attach.families import Family
from dit_attn.processors.attach.guider import PerturbedGuider
from dit_attn.processors.attach.learned import saved_files
from dit_attn.processors.attach.negative_text import NegativeText
from dit_attn.processors.attach.pipeline_call import on_run_end
from dit_attn.processors.attach.transformer_run import TransformerRun
from dit_attn.processors.attach.twin_pass import TwinRunner
from dit_attn.processors.core.clock import Clock
from dit_attn.processors.core.layer import PLAIN, Layer
from dit_attn.processors.core.parameters import LearnedModules
from dit_attn.processors.methods import saved
from dit_attn.processors.methods.base import Method

# By the clock that the transformers of a pipeline share: the session whose transformer was called last.
_LAST_CALLED: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()
_SESSIONS: weakref.WeakSet[Session] = weakref.WeakSet()

_NO_TAP = "no method applies, it has no softmax attention to tap; set the stock processor again"


class Session(TransformerRun):
    """State of the enabled methods on one transformer. Made by ``enable``; nothing in it needs to be reset by hand.

    Attributes:
        methods: the enabled methods, in order.
        installed: whether the layers run our processors.
        detached: whether it was removed from its transformer; processors of it that other code stored run stock.
        replaced: class and tap of the processors that other code has set since, by layer.
        recomputing: whether backward computes a checkpointed block again.
        moved_tables: rotary tables at the positions that the methods ask for, by the table they were made from.
        learned: the modules of the methods that learn: ``learned.parameters()`` for an optimizer,
            ``learned.requires_grad_(...)``.
        resampled: whether moved tokens get resampled rows of the table that the model adds to its tokens.
        guider: runs the enabled guidance method, ``None`` without one.
        twin: runs the twin passes of the method that asks for them, ``None`` without one.
        negative: appends the rows with a negative prompt for the method that asks for them, ``None`` without one.
    """

    methods: tuple[Method, ...]

    def __init__(
        self, model: torch.nn.Module, family: Family, methods: tuple[Method, ...], clock: Clock, pipe: Any = None
    ) -> None:
        super().__init__(model, family, methods, clock, pipe)
        self.installed = False
        self.detached = False
        self.recomputing = False
        self.resampled = False
        self.moved_tables = WeakIdKeyDictionary()
        self.replaced: dict[str, tuple[str, str | None]] = {}
        self.guider: PerturbedGuider | None = None
        self.twin: TwinRunner | None = None
        self.negative: NegativeText | None = None
        self.wrapper: Any = None  # the transformer as it was given, behind torch.compile
        self.learned = LearnedModules()
        self._awaited = 0  # number of the run whose end will be seen
        self._modules: weakref.WeakValueDictionary[str, torch.nn.Module] = weakref.WeakValueDictionary()
        self._thread = 0  # that made the last call
        self._lock = threading.Lock()
        _SESSIONS.add(self)

    def module(self, layer: Layer) -> Any:
        """Return a layer's attention module, also while a step cache has put another block in the place of its own."""
        found = self._modules.get(layer.name)
        if found is None:
            found = self._modules[layer.name] = self.model.get_submodule(layer.name)
        return found

    def on_forward(self, values: dict[str, Any]) -> None:
        """See the base class; the other transformer of the pipeline drops its state, once it has had its turn.

        Not where the two take turns within a step, each with a branch of the guidance.
        """
        before = self._step
        with self._lock:
            if self._awaited and self._awaited == self.clock.run:
                self.check_thread()
            self._thread = threading.get_ident()
            super().on_forward(values)
            if self.reduced is not None and self.pass_name == PLAIN:
                self.reduce_heads()
            if self.guider is not None and self.pass_name == PLAIN:
                self.guider.begin_pass()
            if self.pipe is not None and self._awaited != self.clock.run:
                end = functools.partial(_end_run, weakref.ref(self), self.clock.run)
                self._awaited = self.clock.run if on_run_end(self.pipe, end) else 0
        last = _LAST_CALLED.get(id(self.clock))
        if last is not self:
            if last is not None and not self.clock.call and before != last._step:
                last.drop_state()
            _LAST_CALLED[id(self.clock)] = self

    def reduce_heads(self) -> None:
        """Give every layer the heads that a method leaves it at the current step."""
        assert self.reduced is not None
        self.reduced.begin_call(self.clock, self.layers, self.module)
        self.reports.setdefault(self.reduced.method.slug, self.reduced.report(self.layers))

    def check_thread(self) -> None:
        """Refuse a call of another thread than the one whose run this is.

        Raises:
            DitAttnError: two threads run the transformer at once.
        """
        if self.methods and self._thread not in (0, threading.get_ident()):
            raise DitAttnError(
                "another thread is running this transformer; give each thread its own copy (copy.deepcopy), or run "
                "them in turns"
            )

    def drop_state(self) -> None:
        """See the base class; moved tables and guidance updates too."""
        super().drop_state()
        self.moved_tables.clear()
        if self.guider is not None:
            self.guider.drop_state()

    def note_replaced(self, layer: Layer, processor: Any, tap: str | None) -> None:
        """Note that other code has set a processor since the methods were enabled."""
        kind = type(processor).__name__
        if tap is None and (kind, None) not in self.replaced.values():
            warnings.warn(
                f"dit_attn: {layer.name} runs {kind}, set since enable: {_NO_TAP}",
                stacklevel=2,
            )
        self.replaced[layer.name] = (kind, tap)

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the method that learns: its settings, and its tensors of every transformer of the pipeline.

        ``enable(pipe, folder)`` brings it back. Where several methods learn, each has a folder of its name in it.

        Returns:
            The folder.

        Raises:
            DitAttnError: no enabled method learns, or the folder cannot be written.
        """
        for name, parts in self._files().items():
            saved.write(Path(folder, name), name or self._slugs, parts)
        return Path(folder)

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Upload what :meth:`save_pretrained` writes to the Hugging Face Hub, in one commit; returns its address.

        Args:
            repo_id: ``org/name``, made where it is missing; ``enable(pipe, "org/name")`` reads it.
            kwargs: of ``HfApi.create_commit``, e.g. ``revision`` or ``commit_message``.

        Raises:
            DitAttnError: no enabled method learns.
        """
        found = self._files()
        parts = {f"{name}/{file}".lstrip("/"): data for name, files in found.items() for file, data in files.items()}
        return saved.upload(repo_id, self._slugs, parts, **kwargs)

    @property
    def _slugs(self) -> str:
        return ", ".join(method.slug for method in self.learned.methods.values())

    def _files(self) -> dict[str, dict[str, bytes]]:
        """Files of the methods that learn, on all transformers of the pipeline."""
        others = [other for other in _SESSIONS if other.clock is self.clock and other.installed and not other.detached]
        return saved_files({component_name(run.owner, run.model): run.learned for run in (self, *others)})

    @property
    def notices(self) -> list[str]:
        """What a user should know of the session; part of the warnings of a summary."""
        found: list[str] = []
        if self.guider is not None and (aside := self.guider.training_calls):
            found.append(f"guidance stood aside in {aside} training calls; call eval() to sample")
        if self.guider is not None and (cached := self.guider.cached_passes):
            found.append(
                f"a step cache answered {cached} of {cached + self.guider.evaluations} passes that a guidance update "
                "would have been computed for; the last update was used there. Disable the cache for one at every step"
            )
        if self.guider is not None and (unmoved := self.guider.unmoved_steps):
            found.append(
                f"the guidance update was exactly 0 at {unmoved} of {self.guider.strength.steps} guided steps: a step "
                "cache may answer the perturbed passes; guide without it"
            )
        return found + [
            f"{count} layers run {kind}, set since enable: " + ("the methods apply to it" if tap else _NO_TAP)
            for (kind, tap), count in Counter(self.replaced.values()).items()
        ]

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        if id(self) in memo:
            return memo[id(self)]
        model = memo.get(id(self.model))
        if model is None:
            raise TypeError("a Session is copied with its transformer: deepcopy the transformer instead")
        pipe = memo.get(id(self.owner))
        session = Session(model, self.family, self.methods, copy.deepcopy(self.clock, memo), pipe)
        session.installed, session.resampled = self.installed, self.resampled
        memo[id(self)] = session
        for layer in self.layers:
            session.add_layer(layer.name, layer.calls)
        session.learned = copy.deepcopy(self.learned, memo)
        session.learned.bind(session.layers)
        if self.reduced is not None:
            session.reduced = self.reduced.copy()
        if self.guider is not None:
            session.guider = self.guider.copy_for(session)
        if self.twin is not None:
            session.twin = self.twin.copy_for(session)
        if self.negative is not None:
            session.negative = self.negative.copy_for(session)
        return session

    def __repr__(self) -> str:
        return f"Session({self.family.name}, {self.layer_count} layers, methods={list(self.methods)})"


def _end_run(reference: weakref.ref[Session], run: int) -> None:
    """Free what a session stored in a run that has ended, unless another one has begun."""
    session = reference()
    if session is not None and session.clock.run == run:
        session._awaited = 0
        session.drop_state()
