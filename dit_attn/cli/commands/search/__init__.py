"""`dit-attn search`: find attention heads worth perturbing."""
