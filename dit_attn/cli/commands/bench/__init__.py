"""`dit-attn bench`: measure kernels, whole models and attention operators."""
