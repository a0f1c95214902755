"""Benchmark methods on a denoising step, on single attention calls, and by operator error at equal cost."""

from dit_attn.pipelines.benchmark.frozen_step import Competitor, make_competitor
from dit_attn.pipelines.benchmark.model_step import measure_step
from dit_attn.pipelines.benchmark.operator_error import (
    OperatorProbe,
    measure_operators,
    pipeline_source,
    synthetic_source,
)

__all__ = [
    "Competitor",
    "OperatorProbe",
    "make_competitor",
    "measure_operators",
    "measure_step",
    "pipeline_source",
    "synthetic_source",
]
