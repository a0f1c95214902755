"""Tests of dropped heads."""
