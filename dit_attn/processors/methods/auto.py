"""Pick the sparse method, its density and its dense steps for the run at hand, and stay dense where none would gain.

The candidates are the product's own methods with the settings of the model's preset, in the order in which they keep
videos and images closest to dense (docs/results.md). The first one is taken that a table of costs expects to be faster
than dense attention on calls of this shape; :mod:`dit_attn.kernels.cost` measures such tables. On a CPU every call is
timed as well, and sparse calls that are slower than dense ones end for the rest of the run.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from dit_attn.kernels.cost import CostTable, cost_table
from dit_attn.machine import free_memory
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.executor import MIN_TOKENS
from dit_attn.processors.methods.auto_choice import Decision, RunShape, choose
from dit_attn.processors.methods.auto_watch import Watch
from dit_attn.processors.methods.base import Method, Phase, setting
from dit_attn.processors.methods.presets import PROVENANCES, preset_for
from dit_attn.processors.methods.sparse import SparseMethod, as_sparse

CANDIDATES = ("re-ttention", "rectified-spaattn", "block-sparse")
VIDEO = ("re-ttention", "rectified-spaattn")
IMAGE = ("rectified-spaattn", "re-ttention")
_WATCH = "auto.watch"


@dataclass(frozen=True, kw_only=True)
class Auto(Method):
    """Enable the method that is expected to gain, with the density and dense steps of the model's preset.

    Attributes:
        candidates: methods to choose from, best first: ``re-ttention``, ``rectified-spaattn``, ``block-sparse``. None:
            Re-ttention before Rectified SpaAttn on videos, the other way round on images.
        preset: preset with the settings of the candidates: ``auto`` for the model's own, which ``enable`` fills in,
            ``none`` for the methods' defaults, or a name.
        min_gain: how many times as fast as a dense call a sparse one must be expected to be.
        few_steps: a run of fewer steps takes no method that stores statistics from step to step, has no dense steps,
            and bounds the error of every layer at every step by ``max_error`` instead.
        max_error: that bound, see :class:`~dit_attn.processors.methods.sparse.SparseMethod`. The default keeps nearly
            all layers of tiny-video at density 0.25 (benchmarks/operators/tiny-video.json).
        watch: time the calls on a CPU, and leave the rest of a run dense where sparse ones are slower. Off, a result
            never depends on times.

    Raises:
        DitAttnError: a value out of range, or an unknown preset.
    """

    slug: ClassVar[str] = "auto"
    role: ClassVar[str] = "sparse"
    min_tokens: ClassVar[int] = MIN_TOKENS

    candidates: tuple[str, ...] = setting((), "methods to choose from, best first; none: by video or image",
                                          choices=CANDIDATES)  # fmt: skip
    preset: str = setting("auto", "settings of the candidates: auto (the model's preset), none, or a name")
    min_gain: float = setting(1.1, "expected speed-up of a call from which it is sparse", low=1.0)
    few_steps: int = setting(10, "shorter runs bound the error instead of having dense steps", low=0)
    max_error: float = setting(0.1, "that bound, of a layer's output, relative", low=0.0)
    watch: bool = setting(True, "time the calls on a CPU, and go dense where sparse ones are slower")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.preset not in ("auto", "none"):
            preset_for(None, self.preset)

    def for_preset(self, name: str | None) -> Auto:
        """Return the method with the model's preset in the place of ``auto``; argument as in the base class."""
        return replace(self, preset=name or "none") if self.preset == "auto" else self

    def check_model(self, transformer: str, layers: int) -> None:
        """Refuse a model that a candidate's settings do not fit; arguments as in the base class.

        Raises:
            DitAttnError: so it is.
        """
        for method, _ in self._all():
            method.check_model(transformer, layers)

    def check_heads(self, transformer: str, heads: Sequence[int | None]) -> None:
        """Refuse budgets of another number of heads; arguments as in the base class.

        Raises:
            DitAttnError: so it is.
        """
        for method, _ in self._all():
            method.check_heads(transformer, heads)

    def cache_bytes(self, tokens: int, heads: int, head_dim: int, element: int) -> int:
        """Return the most that a candidate stores; arguments as in the base class."""
        return max(method.cache_bytes(tokens, heads, head_dim, element) for method, _ in self._all())

    def phases(self, steps: int) -> tuple[Phase, ...]:
        """Return none: they are those of the method that :meth:`decide` picks."""
        return ()

    def decide(self, shape: RunShape, table: CostTable | None = None, free: int | None = None) -> Decision:
        """Return what is done with the calls of a shape.

        Args:
            shape: of the calls, and of their run.
            table: costs; default: those of the device.
            free: bytes of memory that are free; default: those of the device.
        """
        device = torch.device(shape.device)
        return choose(
            [*self._ranked(shape)],
            shape,
            cost_table(device) if table is None else table,
            few_steps=self.few_steps,
            least_gain=self.min_gain,
            free=free_memory(device) if free is None and shape.devices == 1 else free,
        )

    def request(self, call: AttentionCall, request: Request) -> None:
        """Let the method that was picked plan the call, or decline it with the reason."""
        state, shape = call.shared.current, shape_of(call)
        decision = state.get(shape)
        if decision is None:
            decision = state[shape] = self.decide(shape)
            call.reports.setdefault(self.slug, AutoReport()).add(decision)
        if decision.method is None:
            request.decline("auto expects no gain")
            return
        if not self.watch or shape.device != "cpu" or shape.devices > 1:
            self._delegate(decision.method, call, request)
            return
        times = state.setdefault(_WATCH, Watch()).begin(shape, call.layer.stats, call.clock.step)
        period = sum(phase.count for phase in decision.method.phases(shape.steps or 0))
        if times.is_slow(call.clock.step, period):
            call.reports[self.slug].found_slow(shape, times.ratio)
            request.decline("sparse calls were slower than dense ones")
            return
        self._delegate(decision.method, call, request)
        if request.sparse and times.wait():
            request.go_dense()
            request.decline("dense calls are timed first")

    def _delegate(self, method: SparseMethod, call: AttentionCall, request: Request) -> None:
        if self._is_short(call.clock.total):
            call.layer.stats.measured.clear()  # the bound holds at every step
        method.request(call, request)

    def _is_short(self, steps: int | None) -> bool:
        return steps is not None and steps < self.few_steps

    def _ranked(self, shape: RunShape) -> Iterator[tuple[SparseMethod, str]]:
        """The candidates for a run, best first, and where their settings are from."""
        for slug in self.candidates or (VIDEO if shape.is_video else IMAGE):
            method, settings = _candidate(slug, self.preset)
            if self._is_short(shape.steps):
                bound = self.max_error if method.max_error is None else min(self.max_error, method.max_error)
                method = replace(method, dense_steps=0, dense_last_steps=0, max_error=bound)
            yield method, settings

    def _all(self) -> list[tuple[SparseMethod, str]]:
        return [_candidate(slug, self.preset) for slug in self.candidates or VIDEO]


@dataclass
class AutoReport:
    """What was decided in a run, part of a summary.

    Attributes:
        decisions: JSON values of every decision.
        warnings: what a user should know.
        lines: the decisions in words.
    """

    decisions: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    def add(self, decision: Decision) -> None:
        """Add a decision; one that says the same as another is not said again."""
        if decision.to_dict() not in self.decisions:
            self.decisions.append(decision.to_dict())
            self.lines += [line for line in decision.lines() if line not in self.lines]

    def found_slow(self, shape: RunShape, ratio: float | None) -> None:
        """Note that sparse calls were slower than dense ones."""
        found = f"a sparse call took {ratio:.2f} of the time of a dense one at {shape.tokens:,} tokens"
        line = f"measured: {found}; dense since then"
        if line not in self.lines:
            self.lines.append(line)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def as_auto(method: Method) -> Auto | None:
    """Return ``method`` where it leaves the choice of a method to the run, else ``None``."""
    return method if isinstance(method, Auto) else None


def shape_of(call: AttentionCall) -> RunShape:
    """Return what a decision about a call depends on."""
    assert call.tokens is not None
    spans, (batch, tokens, heads, size) = call.tokens.visual, call.q.shape
    trained = torch.is_grad_enabled() and call.q.requires_grad  # what earlier steps of a run stored is of no use there
    return RunShape(
        tokens=tokens,
        grid=next((span.grid for span in spans if span.grid is not None), (1, 1, tokens)),
        visual=call.visual.stop - call.visual.start,
        heads=heads,
        head_dim=size,
        dtype=str(call.q.dtype).removeprefix("torch."),
        device=call.q.device.type,
        steps=None if trained else call.clock.total,
        layers=call.layer_count,
        samples=max(2, batch),
        batch=batch,
        devices=call.shard[1],
    )


@functools.lru_cache(maxsize=64)
def _candidate(slug: str, preset: str) -> tuple[SparseMethod, str]:
    """A method with the settings of a preset, and where they are from."""
    found = None if preset in ("auto", "none") else preset_for(None, preset)
    settings = dict(found.methods.get(slug, {})) if found is not None else {}
    origin = PROVENANCES[settings.pop("provenance", "guess")]
    method = as_sparse(Method.from_dict({**settings, "method": slug}))
    assert method is not None
    return method, f"preset {found.name} ({origin})" if found and settings else "the method's defaults"
