"""Measure what attention does in a run."""
