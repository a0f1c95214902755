"""CUDA backend: Triton kernels, forward and backward."""
