"""Perturbations of attention and the heads they apply to."""
