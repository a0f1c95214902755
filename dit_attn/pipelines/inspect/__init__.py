"""Inspect what attention does in a run of a stock pipeline."""

from dit_attn.pipelines.inspect.capture import capture_call
from dit_attn.pipelines.inspect.collector import Collector
from dit_attn.pipelines.inspect.inspection import Inspection, inspect, inspect_run

__all__ = ["Collector", "Inspection", "capture_call", "inspect", "inspect_run"]
