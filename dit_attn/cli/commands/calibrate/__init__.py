"""`dit-attn calibrate`: find densities by layer and part of the run."""
