"""Make images and clips above the native size of a model: native pass, upscale, then denoise the rest in windows."""

from dit_attn.pipelines.high_resolution.estimate import HighResolutionEstimate, StageEstimate
from dit_attn.pipelines.high_resolution.high_resolution import HighResolution, HighResolutionResult
from dit_attn.pipelines.high_resolution.native_pass import NativePass

__all__ = ["HighResolution", "HighResolutionEstimate", "HighResolutionResult", "NativePass", "StageEstimate"]
