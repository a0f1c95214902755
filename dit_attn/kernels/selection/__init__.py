"""Choosing key blocks from pooled queries and keys."""
