"""Tests of linear attention over key blocks."""
