"""Tests of the fine-tuning with a sparse method."""
