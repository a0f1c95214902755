"""Tests of `dit-attn finetune`."""
