"""``dit-attn anomaly``: learn defects from a few shots, make image-mask pairs of them."""
