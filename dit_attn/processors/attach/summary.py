"""Summarize the last run, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from dit_attn.processors.attach.guidance_summary import GuidanceSummary, summarize_guidance
from dit_attn.processors.attach.session import Session
from dit_attn.processors.attach.summary_parts import PositionsSummary, TwinSummary, positions_of, twin_of
from dit_attn.processors.attach.value_table import html_table, methods_text, percent, text_table
from dit_attn.processors.core.dispatch import ONLY_GUIDANCE
from dit_attn.processors.core.layer import LayerStats
from dit_attn.processors.core.remedies import with_remedy
from dit_attn.processors.methods.presets import PresetUse, preset_use

_CONTEXT = "with dit_attn.run_context(transformer"


@dataclass(frozen=True)
class LayerSummary:
    """One layer in the last run.

    Attributes:
        name: module path.
        calls: attention calls.
        sparse_calls: calls a method carried out.
        density: mean attention computed by the sparse calls, as a fraction of dense; ``None`` without one.
        seconds: time in sparse calls (host time).
        fallbacks: calls that took stock attention, by reason.
        error: relative L2 error on sampled rows of the first sparse call (the largest, where densities change over
            the run); ``None`` where no ``max_error`` or ``target_error`` is set.
        biased_calls: calls with a logit bias, sparse or dense.
        scaled_calls: calls with another softmax scale.
        replaced_calls: calls whose output a method replaced.
        dense_calls: calls in stock attention that were timed: those a sparse method left dense, on the CPU.
        dense_seconds: their time.
        measurements: of errors for ``target_error``.
        measuring: attention that they computed, as a fraction of that of a dense call, summed.
        kernels: sparse calls whose kernel was chosen for a property of this machine, by kernel and reason.
    """

    name: str
    calls: int
    sparse_calls: int
    density: float | None
    seconds: float
    fallbacks: dict[str, int]
    error: float | None = None
    biased_calls: int = 0
    scaled_calls: int = 0
    replaced_calls: int = 0
    dense_calls: int = 0
    dense_seconds: float = 0.0
    measurements: int = 0
    measuring: float = 0.0
    kernels: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, repr=False)
class Summary:
    """Report of the last run of one pipeline or transformer. Prints as a table; ``to_dict()`` gives JSON values.

    Printed settings are those that differ from the model's preset, or from the defaults; ``methods`` has all of them.

    Attributes:
        families: family of every transformer.
        methods: settings of the enabled methods.
        runs: runs seen since ``enable``.
        steps: steps of the last run that were reached.
        layers: one entry per layer of the self or joint attention.
        guidance: what a guidance method did, ``None`` without one.
        warnings: what a user should know of the run and what to do about it, e.g. guidance that was requested and did
            not happen.
        source: where steps and branches come from: ``pipeline call`` (the pipeline that ran), ``run_context``,
            ``cache_context`` (as given in a loop), or ``time steps`` (of the calls; the number of steps is unknown).
        cross_layers: one entry per layer of the cross attention, where a method applies to it; totals leave them out.
        presets: for methods whose settings are those of the model's preset, but for the ``changed`` ones.
        twin: passes that a method asked for in addition to the pipeline's, ``None`` without such a method.
        positions: where and how methods moved the positions of tokens, ``None`` where none was moved.
        reports: what methods say of the run, by slug.
    """

    families: tuple[str, ...]
    methods: tuple[dict[str, Any], ...]
    runs: int
    steps: int
    layers: tuple[LayerSummary, ...]
    guidance: GuidanceSummary | None = None
    warnings: tuple[str, ...] = ()
    source: str = ""
    cross_layers: tuple[LayerSummary, ...] = ()
    presets: tuple[PresetUse, ...] = ()
    twin: TwinSummary | None = None
    positions: PositionsSummary | None = None
    reports: dict[str, Any] = field(default_factory=dict)

    @property
    def calls(self) -> int:
        """Attention calls of all layers."""
        return sum(layer.calls for layer in self.layers)

    @property
    def sparse_calls(self) -> int:
        """Calls a method carried out."""
        return sum(layer.sparse_calls for layer in self.layers)

    @property
    def biased_calls(self) -> int:
        """Calls with a logit bias, sparse or dense."""
        return sum(layer.biased_calls for layer in self.layers)

    @property
    def density(self) -> float | None:
        """Mean attention computed by the sparse calls, as a fraction of dense; ``None`` without one."""
        weights = [(layer.sparse_calls, layer.density) for layer in self.layers if layer.density is not None]
        count = sum(n for n, _ in weights)
        return sum(n * d for n, d in weights) / count if count else None

    @property
    def run_density(self) -> float | None:
        """Attention computed over all calls, as a fraction of dense; fallbacks count as dense, measurements too."""
        if not self.calls:
            return None
        dense = self.calls - self.sparse_calls
        return (self.sparse_calls * (self.density or 0.0) + dense) / self.calls + self.measuring_share

    @property
    def measuring_share(self) -> float:
        """Attention computed to measure errors for ``target_error``, as a fraction of dense."""
        return sum(layer.measuring for layer in self.layers) / self.calls if self.calls else 0.0

    @property
    def seconds(self) -> float:
        """Time in sparse calls (host time)."""
        return sum(layer.seconds for layer in self.layers)

    @property
    def call_speedup(self) -> float | None:
        """Time of a dense call over that of a sparse one, in layers that ran both; ``None`` without a timed one."""
        both = [layer for layer in self.layers if layer.sparse_calls and layer.dense_calls]
        sparse = sum(layer.seconds / layer.sparse_calls for layer in both)
        return sum(layer.dense_seconds / layer.dense_calls for layer in both) / sparse if sparse else None

    @property
    def worst_error(self) -> tuple[float, str] | None:
        """Largest measured error and its layer, ``None`` when no method set ``max_error`` or ``target_error``."""
        found = [(layer.error, layer.name) for layer in self.layers if layer.error is not None]
        return max(found) if found else None

    @property
    def fallbacks(self) -> dict[str, int]:
        """Calls that took stock attention, by reason."""
        return _total(layer.fallbacks for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, totals included."""
        totals = ("calls", "sparse_calls", "biased_calls", "density", "run_density", "call_speedup", "fallbacks")
        return {**asdict(self), **{name: getattr(self, name) for name in totals}}

    def __repr__(self) -> str:
        found = [methods_text(self.methods, self.presets), f"runs {self.runs}" if self.runs else "no run yet"]
        if self.sparse_calls:
            found += [f"density {percent(self.density)} in sparse calls", f"{self.seconds:.2f} s in method"]
        elif self.runs and self.guidance is not None:
            found.append(f"{self.guidance.steps} guided steps")
        return f"<Summary: {', '.join(found)}>"

    def __str__(self) -> str:
        return text_table(self._rows())

    def _repr_html_(self) -> str:
        return html_table(self._rows())

    def _rows(self) -> list[tuple[str, str]]:
        rows = [
            ("family", ", ".join(self.families)),
            ("methods", methods_text(self.methods, self.presets)),
            *(("preset", str(use)) for use in self.presets),
        ]
        guidance = self.guidance.rows(self.steps) if self.guidance is not None else []
        warnings = [("warning", text) for text in self.warnings]
        if not self.runs:
            return [*rows, *guidance, ("runs", "none yet: call the pipeline, then ask again"), *warnings]
        rows.append(("runs", f"{self.runs} (last: {self.steps} steps)"))
        if self.source:
            rows.append(("known from", self.source))
        if self.guidance is None or set(self.fallbacks) != {ONLY_GUIDANCE}:
            rows += self._sparse_rows()
        if self.cross_layers:
            rows.append(("cross attention", _cross_text(self.cross_layers)))
        rows += [(name, str(part)) for name in ("positions", "twin") if (part := getattr(self, name)) is not None]
        rows += [(slug, str(report)) for slug, report in self.reports.items()]
        return [*rows, *guidance, *warnings]

    def _sparse_rows(self) -> list[tuple[str, str]]:
        sparse_layers = sum(layer.sparse_calls > 0 for layer in self.layers)
        gain = self.call_speedup
        compared = "" if gain is None else f"; a sparse call takes {1 / gain:.2f} of the time of a dense one"
        rows = [
            ("layers", f"{sparse_layers} of {len(self.layers)} sparse"),
            ("sparse calls", f"{self.sparse_calls} of {self.calls} attention calls"),
        ]
        if self.biased_calls:
            rows.append(("biased calls", f"{self.biased_calls} of {self.calls} attention calls, sparse or dense"))
        rows += [
            ("density", f"{percent(self.density)} in sparse calls, {percent(self.run_density)} over the run"),
            ("time in method", f"{self.seconds:.2f} s{compared}"),
            *(("kernel", f"{count} x {text}") for text, count in _total(one.kernels for one in self.layers).items()),
        ]
        if measured := sum(layer.measurements for layer in self.layers):
            rows.append(("measurements", f"{measured} of errors, {percent(self.measuring_share)} of dense attention"))
        if self.worst_error is not None:
            rows.append(("worst error", "{:.3g} of the norm, {}".format(*self.worst_error)))
        return rows + [("fallback", f"{count} x {with_remedy(reason)}") for reason, count in self.fallbacks.items()]


def _total(counts: Iterable[dict[str, int]]) -> dict[str, int]:
    """The sum of some counts, largest first."""
    total: Counter[str] = Counter()
    for each in counts:
        total.update(each)
    return dict(total.most_common())


def summarize(sessions: dict[str, Session]) -> Summary:
    """Summarize one pipeline's sessions.

    Args:
        sessions: by component; with several, layer names begin with the component.
    """
    first = next(iter(sessions.values()))
    clock = first.clock
    prefixes = {name: f"{name}." if len(sessions) > 1 else "" for name in sessions}
    return Summary(
        families=tuple(session.family.name for session in sessions.values()),
        methods=tuple(method.to_dict() for method in first.methods),
        runs=clock.run,
        steps=clock.step + 1 if clock.run else 0,
        layers=tuple(
            _layer(prefixes[name] + layer.name, layer.stats if session.ran else LayerStats())
            for name, session in sessions.items()
            for layer in session.layers
            if layer.kind == "self"
        ),
        guidance=summarize_guidance(sessions.values()),
        warnings=tuple(dict.fromkeys(text for session in sessions.values() for text in _warnings(session))),
        source=next((session.source for session in sessions.values() if session.ran), ""),
        cross_layers=tuple(
            _layer(prefixes[name] + layer.name, layer.stats if session.ran else LayerStats())
            for name, session in sessions.items()
            for layer in session.layers
            if layer.kind == "cross"
        ),
        presets=tuple(
            use for method in first.methods if (use := preset_use(method, first.model, pair=len(sessions) > 1))
        ),
        twin=twin_of(sessions),
        positions=positions_of(sessions),
        reports={key: report for run in sessions.values() if run.ran for key, report in run.reports.items()},
    )


def _cross_text(layers: tuple[LayerSummary, ...]) -> str:
    names = ("calls", "biased_calls", "replaced_calls")
    calls, biased, replaced = (sum(getattr(layer, name) for layer in layers) for name in names)
    reasons = _total(layer.fallbacks for layer in layers)
    stock = "".join(f"; {count} x {with_remedy(reason)}" for reason, count in reasons.items())
    return f"{biased} of {calls} calls biased, {replaced} replaced, {len(layers)} layers{stock}"


def _warnings(session: Session) -> list[str]:
    missing = _missing_guidance(session)
    reported = [text for report in session.reports.values() if session.ran for text in report.warnings]
    return [*([missing] if missing else ()), *_unknown(session), *session.notices, *reported]


def _unknown(session: Session) -> Iterator[str]:
    """Yield what could not be known of the run, for methods that need it."""
    if not session.ran or not session.methods:
        return
    if session.doubt is not None:
        yield (
            f"{session.doubt}: windows, tiles or branches that nobody named; nothing is stored from step to step since "
            f"then, and guidance stops. Name them: {_CONTEXT}, step=, steps=, branch=, window=)"
        )
    elif session.branch_doubt is not None and session.guider is not None:
        yield f"guidance was left out: {session.branch_doubt}. Name them: {_CONTEXT}, step=, steps=, branch=(..., ...))"
    if session.source == "time steps":
        yield (
            "the number of steps is unknown: fractions such as dense_steps=0.1 are of the noise that is removed, and "
            f"dense_last_steps has no effect. Give it: {_CONTEXT}, step=, steps=)"
        )


def _missing_guidance(session: Session) -> str | None:
    """Return the warning for a run with a guidance scale and without an unconditional branch, or ``None``."""
    if not session.clock.run or not session.ran or "uncond" in session.seen_branches:
        return None
    scale, name = session.scale, session.cfg.argument
    embedded = bool(getattr(session.model.config, "guidance_embeds", False))
    if scale is not None and scale > 1.0 and (name or not embedded):
        remedy = session.pipeline_call.remedy if name else "give a negative prompt, or leave the scale out"
        return f"{name or 'guidance_scale'} {scale:g} had no effect: the pipeline ran no unconditional branch; {remedy}"
    if (session.pipeline_call.embedded or 0.0) > 1.0 and not embedded:
        other = f", or give {name} and negative_prompt" if scale is not None else ""
        return (
            f"guidance_scale {session.pipeline_call.embedded:g} had no effect: this {type(session.model).__name__} "
            f"takes no guidance as an input; leave it out{other}"
        )
    return None


def _layer(name: str, stats: LayerStats) -> LayerSummary:
    density = float(stats.computed) / stats.sparse_calls if stats.sparse_calls else None
    return LayerSummary(
        name, stats.calls, stats.sparse_calls, density, stats.seconds, dict(stats.fallbacks), stats.error,
        stats.biased_calls, stats.scaled_calls, stats.replaced_calls, stats.dense_calls, stats.dense_seconds,
        stats.measurements, stats.measuring, dict(stats.kernels),
    )  # fmt: skip
