"""What error control did in a run: the densities by layer and by step."""

from __future__ import annotations

from dataclasses import dataclass, field

from dit_attn.processors.core.call import AttentionCall

_SHOWN = 4  # layers that are listed, those with the highest densities


@dataclass
class LayerDensities:
    """The densities of one layer.

    Attributes:
        calls: calls whose density was chosen, dense ones included.
        low, mean, high: of their densities, 1 for dense attention.
    """

    calls: int = 0
    low: float = 1.0
    mean: float = 0.0
    high: float = 0.0

    def add(self, density: float) -> None:
        """Count a call."""
        self.mean = (self.mean * self.calls + density) / (self.calls + 1)
        self.calls += 1
        self.low, self.high = min(self.low, density), max(self.high, density)

    def __str__(self) -> str:
        return f"density {self.low:.3g} to {self.high:.3g}, mean {self.mean:.3g}"


@dataclass
class ErrorControlReport:
    """Error control in a run, part of a summary.

    Attributes:
        target_error: the bound.
        layers: by name.
        by_step: mean density of the calls of every step, by number.
        warnings: none.
    """

    target_error: float
    layers: dict[str, LayerDensities] = field(default_factory=dict)
    by_step: dict[int, float] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    _calls: dict[int, int] = field(default_factory=dict, repr=False)

    def add(self, layer: str, step: int, density: float) -> None:
        """Count a call of a layer at a step."""
        self.layers.setdefault(layer, LayerDensities()).add(density)
        calls = self._calls.get(step, 0)
        self.by_step[step] = (self.by_step.get(step, 0.0) * calls + density) / (calls + 1)
        self._calls[step] = calls + 1

    def __str__(self) -> str:
        layers = self.layers
        calls = sum(found.calls for found in layers.values())
        mean = sum(found.mean * found.calls for found in layers.values()) / calls
        low, high = min(x.low for x in layers.values()), max(x.high for x in layers.values())
        first, last = (self.by_step[step] for step in (min(self.by_step), max(self.by_step)))
        shown = sorted(layers, key=lambda name: -layers[name].mean)[:_SHOWN]
        return "\n".join(
            [
                f"target_error {self.target_error:g}: density {low:.3g} to {high:.3g}, mean {mean:.3g}, of the first "
                f"step {first:.3g}, of the last {last:.3g}",
                *(f"{name}: {layers[name]}" for name in shown),
            ]
        )


def report_of(call: AttentionCall, slug: str, target_error: float) -> ErrorControlReport:
    """Return the report of the run that a call belongs to."""
    report: ErrorControlReport = call.reports.setdefault(slug, ErrorControlReport(target_error))
    return report
