"""`dit-attn eval`: score a folder of images or videos."""
