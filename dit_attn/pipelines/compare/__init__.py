"""Measure methods against dense runs with the same seeds."""
