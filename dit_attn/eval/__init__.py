"""Evaluation: the verifiable world, metrics, reports and the benchmark harness."""
