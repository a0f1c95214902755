"""Procedures that drive a stock pipeline, one folder per job.

Importing this package loads nothing heavy; the names below are loaded at first use. Each folder re-exports what a user
calls, such as ``from dit_attn.pipelines.compare import compare``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

_EXPORTS = {
    "AnomalyGenerator": "dit_attn.pipelines.anomaly",
    "Calibration": "dit_attn.pipelines.calibrate",
    "Comparison": "dit_attn.pipelines.compare",
    "HeadHunter": "dit_attn.pipelines.head_search",
    "HeadSet": "dit_attn.pipelines.head_search",
    "HighResolution": "dit_attn.pipelines.high_resolution",
    "Inspection": "dit_attn.pipelines.inspect",
    "MeasurementLog": "dit_attn.pipelines.measurement_log",
    "SearchConfig": "dit_attn.pipelines.head_search",
    "Variant": "dit_attn.pipelines.compare",
}

if TYPE_CHECKING:
    from dit_attn.pipelines.anomaly import AnomalyGenerator
    from dit_attn.pipelines.calibrate import Calibration
    from dit_attn.pipelines.compare import Comparison, Variant
    from dit_attn.pipelines.head_search import HeadHunter, HeadSet, SearchConfig
    from dit_attn.pipelines.high_resolution import HighResolution
    from dit_attn.pipelines.inspect import Inspection
    from dit_attn.pipelines.measurement_log import MeasurementLog

__all__ = [
    "AnomalyGenerator",
    "Calibration",
    "Comparison",
    "HeadHunter",
    "HeadSet",
    "HighResolution",
    "Inspection",
    "MeasurementLog",
    "SearchConfig",
    "Variant",
]


def __getattr__(name: str) -> object:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
