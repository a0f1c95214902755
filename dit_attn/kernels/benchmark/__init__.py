"""Timing of `sparse_attention` against dense attention and third-party kernels."""
