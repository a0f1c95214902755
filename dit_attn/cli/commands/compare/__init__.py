"""`dit-attn compare`: measure methods against dense runs with the same seeds."""
