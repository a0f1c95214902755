"""Summarize the last run, layer by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from dit_attn.processors.attach.layer_shape import head_count
from dit_attn.processors.attach.session import Session
from dit_attn.processors.attach.value_table import html_table, methods_text, text_table
from dit_attn.processors.core.dispatch import ONLY_GUIDANCE
from dit_attn.processors.core.layer import LayerStats
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
            the run); ``None`` where no ``max_error`` is set.
        biased_calls: calls with a logit bias, sparse or dense.
        scaled_calls: calls with another softmax scale.
        replaced_calls: calls whose output a method replaced.
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


@dataclass(frozen=True)
class GuidanceSummary:
    """What a guidance method did in the last run.

    Attributes:
        evaluations: perturbed passes.
        steps: guided steps.
        reused: fraction of the blocks of these passes that was reused from the plain passes.
        parallel: equivalent guidance scale: what the update adds to the scale of classifier-free guidance, mean over
            the guided steps; ``None`` in runs without an unconditional branch.
        orthogonal: orthogonal component of the update, in units of ``|c - u|``; ``None`` likewise.
        relative: ``|D| / |c|``, mean over the guided steps; ``None`` where no step was guided.
        perturbed: what the perturbed pass changes: layers with their heads, or blocks that it skips.
    """

    evaluations: int
    steps: int
    reused: float
    parallel: float | None
    orthogonal: float | None
    relative: float | None
    perturbed: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = ["; ".join(self.perturbed)] if self.perturbed else []
        lines += [
            f"{self.evaluations} perturbed passes, {_percent(self.reused)} of their blocks reused, "
            f"{self.steps} guided steps"
        ]
        if self.parallel is not None and self.orthogonal is not None:
            lines.append(
                f"equivalent guidance scale {self.parallel:+.2f}; orthogonal component {self.orthogonal:.2f} |c - u|"
            )
        elif self.relative is not None:
            lines.append(f"guidance update {self.relative:.2f} |c| (no unconditional branch to compare with)")
        return "\n".join(lines)


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
        """Attention computed over all calls, as a fraction of dense; fallbacks count as dense."""
        if not self.calls:
            return None
        return (self.sparse_calls * (self.density or 0.0) + (self.calls - self.sparse_calls)) / self.calls

    @property
    def seconds(self) -> float:
        """Time in sparse calls (host time)."""
        return sum(layer.seconds for layer in self.layers)

    @property
    def worst_error(self) -> tuple[float, str] | None:
        """Largest measured error and its layer, ``None`` when no method set ``max_error``."""
        found = [(layer.error, layer.name) for layer in self.layers if layer.error is not None]
        return max(found) if found else None

    @property
    def fallbacks(self) -> dict[str, int]:
        """Calls that took stock attention, by reason."""
        total: Counter[str] = Counter()
        for layer in self.layers:
            total.update(layer.fallbacks)
        return dict(total.most_common())

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, totals included."""
        totals = ("calls", "sparse_calls", "biased_calls", "density", "run_density", "fallbacks")
        return {**asdict(self), **{name: getattr(self, name) for name in totals}}

    def __repr__(self) -> str:
        density = f"density {_percent(self.density)} in sparse calls, {self.seconds:.2f} s in method"
        return f"<Summary: {methods_text(self.methods, self.presets)}, runs {self.runs}, {density}>"

    def __str__(self) -> str:
        return text_table(self._rows())

    def _repr_html_(self) -> str:
        return html_table(self._rows())

    def _rows(self) -> list[tuple[str, str]]:
        sparse_layers = sum(layer.sparse_calls > 0 for layer in self.layers)
        rows = [
            ("family", ", ".join(self.families)),
            ("methods", methods_text(self.methods, self.presets)),
            *(("preset", str(use)) for use in self.presets),
            ("runs", f"{self.runs} (last: {self.steps} steps)"),
            *([("known from", self.source)] if self.source else ()),
        ]
        biased = self.biased_calls > 0
        sparse = [
            ("layers", f"{sparse_layers} of {len(self.layers)} sparse"),
            ("sparse calls", f"{self.sparse_calls} of {self.calls} attention calls"),
            *([("biased calls", f"{self.biased_calls} of {self.calls} attention calls, sparse or dense")] * biased),
            ("density", f"{_percent(self.density)} in sparse calls, {_percent(self.run_density)} over the run"),
            ("time in method", f"{self.seconds:.2f} s"),
            *(("worst error", f"{error:.3g} of the norm, {name}") for error, name in filter(None, [self.worst_error])),
            *(("fallback", f"{count} x {reason}") for reason, count in self.fallbacks.items()),
        ]
        if self.guidance is None or set(self.fallbacks) != {ONLY_GUIDANCE}:
            rows += sparse
        if self.cross_layers:
            rows.append(("cross attention", _cross_text(self.cross_layers)))
        rows += [("guidance", line) for line in (str(self.guidance).splitlines() if self.guidance else ())]
        rows += [("warning", text) for text in self.warnings]
        return rows


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
        guidance=_guidance(sessions),
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
    )


def _cross_text(layers: tuple[LayerSummary, ...]) -> str:
    names = ("calls", "biased_calls", "replaced_calls")
    calls, biased, replaced = (sum(getattr(layer, name) for layer in layers) for name in names)
    reasons: Counter[str] = Counter()
    for layer in layers:
        reasons.update(layer.fallbacks)
    stock = "".join(f"; {count} x {reason}" for reason, count in reasons.most_common())
    return f"{biased} of {calls} calls biased, {replaced} replaced, {len(layers)} layers{stock}"


def _guidance(sessions: dict[str, Session]) -> GuidanceSummary | None:
    guided = [session for session in sessions.values() if session.guider is not None and session.ran]
    guiders = [session.guider for session in guided if session.guider is not None]
    if not guiders:
        return None
    strengths = [guider.strength for guider in guiders]
    evaluations = sum(guider.evaluations for guider in guiders)
    blocks = sum(guider.evaluations * len(guider.blocks) for guider in guiders)

    def mean(name: str) -> float | None:
        values = [value for strength in strengths for value in getattr(strength, name)]
        return sum(values) / len(values) if values else None

    return GuidanceSummary(
        evaluations=evaluations,
        steps=sum(strength.steps for strength in strengths),
        reused=sum(guider.reused_blocks for guider in guiders) / blocks if blocks else 0.0,
        parallel=mean("parallel"),
        orthogonal=mean("orthogonal"),
        relative=mean("relative"),
        perturbed=tuple(dict.fromkeys(text for session in guided for text in _perturbed(session))),
    )


def _perturbed(session: Session) -> Iterator[str]:
    """Yield the layers and heads, or the blocks, that a guidance method changes in its pass."""
    assert session.guider is not None
    plan = session.guider.plan
    by_heads: dict[str, list[str]] = {}
    for name, strengths in plan.strengths.items():
        count = head_count(session.model.get_submodule(name))
        numbers = ", ".join(map(str, sorted(strengths)))
        heads = f"all {count} heads" if len(strengths) == count else f"heads {numbers}"
        by_heads.setdefault(heads.replace("all 1 heads", "its one head"), []).append(name)
    for heads, names in by_heads.items():
        yield f"perturbed: {', '.join(names)}, {heads}"
    if plan.skipped:
        yield f"skipped: {', '.join(plan.skipped)}"


def _warnings(session: Session) -> list[str]:
    missing = _missing_guidance(session)
    return [*([missing] if missing else ()), *_unknown(session), *session.notices]


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
        return (
            f"{name or 'guidance_scale'} {scale:g} had no effect: the pipeline ran no unconditional branch; {remedy}"
        )
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
        stats.biased_calls, stats.scaled_calls, stats.replaced_calls,
    )  # fmt: skip


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"
