"""Make images and clips above the native size of a model: native pass, upscale, then denoise the rest in windows."""

from dit_attn.pipelines.high_resolution.high_resolution import HighResolution, HighResolutionResult

__all__ = ["HighResolution", "HighResolutionResult"]
