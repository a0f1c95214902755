"""How methods get onto a stock diffusers pipeline and off it again."""
