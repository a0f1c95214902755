"""Make images and clips above the native size of a model: native pass, upscale, then denoise the rest in windows."""

from dit_attn.pipelines.high_resolution.estimate import HighResolutionEstimate, StageEstimate
from dit_attn.pipelines.high_resolution.high_resolution import HighResolution
from dit_attn.pipelines.high_resolution.native_pass import NativePass
from dit_attn.pipelines.high_resolution.stages import HighResolutionResult

__all__ = ["HighResolution", "HighResolutionEstimate", "HighResolutionResult", "NativePass", "StageEstimate"]
