"""Run state of the methods on one transformer: which layers, which tokens, which step, and what happened."""

from __future__ import annotations

import copy
import itertools
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from dit_attn.processors.asked import Asked, asked
from dit_attn.processors.clock import Clock, Guidance
from dit_attn.processors.families import Family
from dit_attn.processors.inject import Guide
from dit_attn.processors.method import Method
from dit_attn.processors.perturb import Perturbation
from dit_attn.processors.tokens import TokenLayout, Tokens

Observer = Callable[[Any, Any, torch.Tensor], None]  # AttentionCall, Request, result
_ids = itertools.count(1)
_SITES: weakref.WeakValueDictionary[int, Site] = weakref.WeakValueDictionary()
_SESSIONS: weakref.WeakValueDictionary[int, Session] = weakref.WeakValueDictionary()


@dataclass
class SiteStats:
    """What one layer did in the current run.

    Attributes:
        calls: attention calls that reached the layer.
        engaged: calls that a method carried out.
        declined: calls that took the stock path, by reason.
        kept: sum over engaged calls of the executed share of the map (all rows, all keys).
        seconds: time spent in engaged calls (host time; on an accelerator it is the time to enqueue them).
        error: relative L2 error measured on sampled rows of the first engaged call, the largest where densities change
            over the run; ``None`` where no bound is set.
        measured: densities whose error was measured.
    """

    calls: int = 0
    engaged: int = 0
    declined: Counter[str] = field(default_factory=Counter)
    kept: float | torch.Tensor = 0.0
    seconds: float = 0.0
    error: float | None = None
    measured: set[float | None] = field(default_factory=set)


class Site:
    """One socketed attention layer.

    Attributes:
        name: module path in the transformer, e.g. ``"blocks.3.attn1"``.
        index: position among the socketed layers, from 0.
        session: the session it belongs to.
        token: 0-d int64 CPU tensor that names the layer inside compiled graphs, where tensors are not guarded by value.
        broken: reason why this layer stays dense for the rest of the session (a failed kernel, NaN), or ``None``.
        rows: first and last + 1 of the model's batch rows in the current attention call; some models attend to their
            samples one by one.
        memory: what a method remembers of this layer from step to step; emptied when a new run begins.
    """

    def __init__(self, name: str, index: int, session: Session) -> None:
        self.name, self.index, self.session = name, index, session
        self.id = next(_ids)
        self.token = torch.tensor(self.id, dtype=torch.int64, device="cpu")
        self.stats = SiteStats()
        self.broken: str | None = None
        self.checked_run = 0
        self.rows = (0, 0)
        self.memory: dict[Any, Any] = {}
        _SITES[self.id] = self

    def take_rows(self, count: int) -> None:
        """An attention call of ``count`` batch rows begins."""
        self.rows = (self.rows[1], self.rows[1] + count)

    def __deepcopy__(self, memo: dict[int, Any]) -> Site:
        session = copy.deepcopy(self.session, memo)
        return session.sites[self.index]

    def __repr__(self) -> str:
        return f"Site({self.name!r}, index={self.index})"


def site_by_id(site_id: int) -> Site:
    """The layer behind the token of a compiled graph."""
    return _SITES[site_id]


def session_by_token(token: torch.Tensor) -> Session:
    """The session behind the 0-d tensor that names it in compiled graphs."""
    return _SESSIONS[int(token)]


class Session:
    """State of the enabled methods on one transformer. Made by ``enable``; nothing in it needs to be reset by hand.

    Attributes:
        family: the transformer's row of the family table.
        methods: the enabled methods, in order.
        clock: step and branch; shared by the transformers of one pipeline.
        sites: the socketed layers.
        layout: parts of the current input's sequence, ``None`` before the first call.
        context: what the pipeline said of the call through ``cache_context``.
        installed: whether the layers run our processors.
        observers: called after every attention call with the call, its request (``request.layout`` is ``None`` where
            the stock path was taken) and the result (B, S, H, Dv); see :func:`dit_attn.observing`.
        guide: state of the enabled guidance method, ``None`` without one.
        perturbed: what the current pass perturbs, ``None`` in plain passes.
        first_perturbed: first batch row that is perturbed in it.
        seen: guidance branches met in this run.
    """

    def __init__(
        self, model: torch.nn.Module, family: Family, methods: tuple[Method, ...], clock: Clock, pipe: Any = None
    ) -> None:
        self._model = weakref.ref(model)
        self._pipe = weakref.ref(pipe) if pipe is not None else None
        self.family, self.methods, self.clock = family, methods, clock
        self.sites: list[Site] = []
        self.layout: TokenLayout | None = None
        self.context: Any = None
        self.installed = False
        self.observers: list[Observer] = []
        self.guide: Guide | None = None
        self.perturbed: Perturbation | None = None
        self.first_perturbed = 0
        self.seen: set[str] = set()
        self.asked = Asked()
        self.id = next(_ids)
        self.token = torch.tensor(self.id, dtype=torch.int64, device="cpu")
        _SESSIONS[self.id] = self
        self.layout_error: str | None = None
        self._seen_run = 0
        self._stacked = 1
        self._own, self._samples = False, 0
        self._batch = 1
        self._tokens: dict[int, Tokens | None] = {}

    @property
    def model(self) -> torch.nn.Module:
        """The transformer."""
        model = self._model()
        if model is None:
            raise ReferenceError("the transformer of this session no longer exists")
        return model

    @property
    def pipe(self) -> Any:
        """The pipeline given to ``enable``, or ``None``."""
        return self._pipe() if self._pipe is not None else None

    @property
    def ran(self) -> bool:
        """Whether the transformer was called in the clock's current run: the second of two may not be."""
        return self._seen_run == self.clock.run

    @property
    def layer_count(self) -> int:
        """Number of socketed layers."""
        return len(self.sites)

    def add_site(self, name: str) -> Site:
        """Register the next layer."""
        site = Site(name, len(self.sites), self)
        self.sites.append(site)
        return site

    def observe(self, values: dict[str, Any]) -> None:
        """Read the arguments of a transformer call that is about to start: advance the clock, learn the token layout.

        Args:
            values: the forward arguments named by the family row.
        """
        if self.perturbed is not None and not self.first_perturbed:
            return  # a compiled transformer shows its perturbed passes too
        timestep = values.get(self.family.timestep)
        value = float(timestep.max()) if isinstance(timestep, torch.Tensor) else float(timestep or 0.0)
        self.clock.tick(
            value,
            self.family.guidance,
            grows=self.family.time_grows,
            scheduler=getattr(self.pipe, "scheduler", None),
            context=self.context,
            length=getattr(self.pipe, "_num_timesteps", None),
        )
        self._own = bool(values.get(self.family.guidance.own))
        if fresh := self._seen_run != self.clock.run:
            self._seen_run = self.clock.run
            self.seen, self._samples = set(), 0
            self.asked = asked(self.pipe, self.family.guidance)
            for site in self.sites:
                site.stats = SiteStats()
                site.memory.clear()
        self.perturbed, self.first_perturbed = None, 0
        rows = _rows(values.get("hidden_states", values.get("x")))
        if fresh:
            samples = self.asked.samples if self.family.guidance.longer else None
            stacked = _stacked(values.get("hidden_states"), self.family.guidance)
            self._stacked = rows // samples if samples else stacked
            self._samples = rows // (self._branch_count(rows) or 1)
        self._begin(rows)
        self.seen |= set(self.rows_by_branch())
        try:
            self.layout, self.layout_error = self.family.layout(self.model.config, values), None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            self.layout, self.layout_error = None, f"layout of {self.family.name}: {type(error).__name__}: {error}"
        self._tokens = {}

    def tokens(self, seq_len: int) -> Tokens | None:
        """The parts of a sequence of ``seq_len`` tokens in the current call, ``None`` when they do not add up."""
        if self.layout is None:
            return None
        if seq_len not in self._tokens:
            self._tokens[seq_len] = self.layout.resolve(seq_len)
        return self._tokens[seq_len]

    def branches(self, batch: int, first: int = 0) -> tuple[str, ...]:
        """Guidance branch of every row of an attention call.

        Args:
            batch: rows of the call.
            first: where the call's rows begin in the model's batch; counts in models that attend sample by sample.
        """
        rows = max(batch, self._batch)
        names = self._names(rows)
        return tuple(names[(first + row) % rows] for row in range(batch))

    def rows_by_branch(self) -> tuple[str, ...]:
        """Guidance branch of every batch row of the current transformer call."""
        return self._names(self._batch)

    @contextmanager
    def perturbing(self, plan: Perturbation, rows: int) -> Iterator[None]:
        """A pass over ``rows`` batch rows, all of them perturbed."""
        before = self._batch
        self.perturbed = plan
        self._begin(rows)
        try:
            yield
        finally:
            self.perturbed = None
            self._begin(before)

    def append_perturbed(self, plan: Perturbation, rows: int) -> None:
        """The call that is about to start has ``rows`` more rows, which are perturbed."""
        self.perturbed, self.first_perturbed = plan, self._batch
        self._begin(self._batch + rows)

    def drop_perturbed(self) -> None:
        """That call is over."""
        self._begin(self.first_perturbed)
        self.perturbed, self.first_perturbed = None, 0

    def guidance_scale(self) -> float | None:
        """The scale s of ``u + s (c - u)`` the pipeline was called with, 1 for none, ``None`` where it does not say."""
        rule = self.family.guidance
        name = rule.scale
        if name and getattr(self.pipe, "transformer_2", None) is self.model:
            name = f"{name}_2"
        told = self.asked.scale if rule.argument else None
        value = getattr(self.pipe, name, None) if name else told
        if value is None:
            return None
        return rule.scale_of(float(value))

    def reset(self) -> None:
        """Forget the run: clock, statistics, layers marked broken. Never needed between runs."""
        self.clock.__init__()  # type: ignore[misc]
        self._seen_run = 0
        for site in self.sites:
            site.stats, site.broken, site.checked_run, site.memory = SiteStats(), None, 0, {}

    def _begin(self, rows: int) -> None:
        """A transformer call of ``rows`` batch rows begins."""
        self._batch = rows
        for site in self.sites:
            site.rows = (0, 0)

    def _names(self, rows: int) -> tuple[str, ...]:
        plain = rows if self.perturbed is None else self.first_perturbed
        if self._own:
            return ("perturbed",) * rows
        names = self.clock.branches(plain, self.family.guidance, self._branch_count(plain)) if plain else ()
        return (*names, *("perturbed",) * (rows - plain))

    def _branch_count(self, rows: int) -> int | None:
        """Branches of the guidance at this step, 1 without: as the pipeline or its call says, and where neither does by
        the shape of the batch, which samples of the same noise fool."""
        guidance = self.family.guidance
        told = getattr(self.pipe, "do_classifier_free_guidance", None) if self.asked.running else None
        if guidance.style == "separate":
            return None if told is None else len(guidance.order) if told else 1
        if told is None and self.asked.scale is not None:
            told = self.asked.scale > guidance.off
        if told is None or guidance.longer:
            return self._stacked
        return len(guidance.order) if told and rows != self._samples else 1

    def __deepcopy__(self, memo: dict[int, Any]) -> Session:
        if id(self) in memo:
            return memo[id(self)]
        model = memo.get(id(self.model))
        if model is None:
            raise TypeError("a Session is copied with its transformer: deepcopy the transformer instead")
        pipe = memo.get(id(self.pipe))
        session = Session(model, self.family, self.methods, copy.deepcopy(self.clock, memo), pipe)
        session.installed = self.installed
        memo[id(self)] = session
        for site in self.sites:
            session.add_site(site.name)
        if self.guide is not None:
            session.guide = Guide(self.guide.method, session)
        return session

    def __repr__(self) -> str:
        return f"Session({self.family.name}, {len(self.sites)} layers, methods={list(self.methods)})"


def _rows(latents: Any) -> int:
    """Batch rows of (B, ...) latents or of a list of samples, 1 where they are neither."""
    return latents.shape[0] if isinstance(latents, torch.Tensor) else len(latents or (None,))


def _stacked(latents: Any, guidance: Guidance) -> int:
    """How many equal parts a batch is made of, if it is as many as the guidance has branches: pipelines batch the
    branches by repeating the latents. 1 otherwise."""
    for count in (len(guidance.longer), len(guidance.order)):
        if count > 1 and isinstance(latents, torch.Tensor) and latents.shape[0] % count == 0:
            first, *rest = latents.chunk(count)
            if all(torch.equal(first, part) for part in rest):
                return count
    return 1
