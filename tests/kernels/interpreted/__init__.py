"""Cases for Triton's interpreter, which is chosen before Triton is imported: run by tests/kernels/test_triton_*."""
