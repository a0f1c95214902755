"""Linear attention over chosen key blocks: one operator, its definition, matrix products, and Triton kernels."""
