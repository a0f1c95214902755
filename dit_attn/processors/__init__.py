"""Attention methods for diffusion transformers, and how they get onto a stock diffusers pipeline."""
