"""Embedded trained pipelines in stock diffusers classes, and the recipes that trained them.

from dit_attn import models
pipe = models.load("tiny-image")
image = pipe("a large red circle at the left on white", **models.call_defaults("tiny-image")).images[0]
"""

from dit_attn.models.registry import ModelInfo, available, call_defaults, info, load

__all__ = ["ModelInfo", "available", "call_defaults", "info", "load"]
