"""Implementations of `sparse_attention`, and the registry that chooses among them."""
