"""`dit-attn bench`: measure kernels, full models and attention operators."""
