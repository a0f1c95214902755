"""What a pipeline's call gives, under all the names that pipelines give it: images, videos or latents, and sound."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

_IMAGES = ("images", "image")  # the latter: Kandinsky 5
_SOUNDS = ("audio", "sound")
# What says the samples a second: the configuration of the part that makes the sound, else the pipeline (that of LTX-2
# has the rate of what goes into its vocoder).
_PARTS = (("vocoder", "output_sampling_rate"), ("sound_tokenizer", "sampling_rate"))
_RATES = ("audio_sampling_rate", "audio_sample_rate")


@dataclass(frozen=True)
class Batch:
    """Images or videos, of pixels or latents.

    Attributes:
        items: one per sample, in the form that was asked for: a tensor, an array, or a list.
        video: whether they are videos.
    """

    items: Any
    video: bool


@dataclass(frozen=True)
class Sound:
    """The sound of one video.

    Attributes:
        samples: (N, C) float in [-1, 1].
        rate: samples a second.
    """

    samples: np.ndarray
    rate: int


def batch_of(result: Any) -> Batch | None:
    """Return the images or videos of a pipeline's output, ``None`` where it has neither."""
    if getattr(result, "frames", None) is not None:
        return Batch(result.frames, True)
    one = getattr(result, "video", None)  # Cosmos 3: one video, an image as one of a frame, or latents (1, C, F, H, W)
    if one is not None:
        if getattr(one, "ndim", 4) == 5:
            return Batch(one, True)
        return Batch([one if len(one) > 1 else one[0]], len(one) > 1)
    found = next((value for name in _IMAGES if (value := getattr(result, name, None)) is not None), None)
    return None if found is None else Batch(found, False)


def sound_of(result: Any, pipe: Any) -> Sound | None:
    """Return the sound of the first video of a pipeline's output; ``None`` for silence, and for sound of unknown rate.

    Args:
        result: the output.
        pipe: the pipeline, which knows how many samples a second there are.
    """
    import numpy as np
    import torch

    found = next((value for name in _SOUNDS if (value := getattr(result, name, None)) is not None), None)
    rate = getattr(result, "sampling_rate", None) or _rate(pipe)
    if found is None or not rate:
        return None
    values = found.detach().float().cpu().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
    if values.ndim == 3:  # (B, C, N)
        values = values[0]
    elif getattr(result, "sound", None) is None:  # (B, N); the sound of Cosmos 3 is (C, N)
        values = values[:1]
    return Sound(values.T, int(rate))


def _rate(pipe: Any) -> int | None:
    configs = ((getattr(getattr(pipe, part, None), "config", None), name) for part, name in _PARTS)
    found = [getattr(config, name) for config, name in configs if hasattr(config, name)]
    return next(iter(found + [getattr(pipe, name) for name in _RATES if hasattr(pipe, name)]), None)
