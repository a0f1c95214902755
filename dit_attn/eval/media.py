"""Decode one image or video file to 8-bit RGB, and report every conversion that was needed."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from dit_attn.eval.listing import VIDEO_SUFFIXES

if TYPE_CHECKING:
    from PIL import Image

GRAY = "gray became RGB"
ALPHA = "transparency was composed on white"
DEEP = "more than 8 bits a channel became 8"
ROTATED = "rotated as its EXIF tag says"
CMYK = "CMYK became RGB"
PAGES = "only the first page was read"

_ANIMATED = ("GIF", "WEBP", "PNG")
_WIDE = ("I", "I;16", "I;16B", "I;16L", "I;16N")


class Unreadable(ValueError):
    """A file that is no image or video, or a broken one; the message is the reason."""


@dataclass(frozen=True)
class Decoded:
    """One file.

    Attributes:
        frames: uint8 (F, 3, H, W); one frame for an image.
        changes: conversions that were needed for 8-bit RGB, in words.
    """

    frames: torch.Tensor
    changes: tuple[str, ...] = ()


def decode(file: Path) -> Decoded:
    """Decode an image, an animation, an array or a video, by its suffix.

    Arrays (.npy) are (H, W, 3) or (F, H, W, 3), uint8 or float in [0, 1]. Images of more than 8 bits are scaled
    from their full range to 8 bits, transparent ones are composed on white, EXIF orientation is applied.

    Raises:
        Unreadable: broken, not finite, or not one of these.
    """
    ending = file.suffix.lower()
    read = _video if ending in VIDEO_SUFFIXES and ending != ".gif" else _array_file if ending == ".npy" else _image
    try:
        return read(file)
    except (ImportError, MemoryError):
        raise
    except Exception as error:  # decoders raise anything on broken bytes: OSError, IndexError, struct.error, ...
        lines = str(error).strip().splitlines()
        raise Unreadable(lines[0] if lines else type(error).__name__) from error


def read_frames(file: Path) -> torch.Tensor:
    """Decode a file to its frames only: uint8 (F, 3, H, W), see :func:`decode`.

    Raises:
        Unreadable: broken, not finite, or not one of these.
    """
    return decode(file).frames


def _video(file: Path) -> Decoded:
    import imageio.v3 as iio

    check_video(file)
    return Decoded(_tensor(np.stack([frame[..., :3] for frame in iio.imiter(file.absolute(), plugin="FFMPEG")])))


def check_video(file: Path) -> None:
    """Decode a video to check it in full: imageio reads a truncated file as a shorter video and raises nothing.

    Raises:
        ValueError: with the decoder's first complaint.
    """
    import imageio_ffmpeg

    place = file.absolute()  # a bare name with a colon would be taken for a protocol
    words = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-xerror", "-i", str(place), "-map", "0:v:0"]
    done = subprocess.run([*words, "-f", "null", "-"], capture_output=True, text=True, errors="replace")
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        said = lines[0].split("] ", 1)[-1].removeprefix(f"{place}: ").strip()
        raise ValueError(f"broken or cut off, ffmpeg says: {said}")


def _array_file(file: Path) -> Decoded:
    values = np.load(file, allow_pickle=False)
    if values.ndim not in (3, 4) or values.shape[-1] != 3 or not values.size:
        raise ValueError(f"an array must be (H, W, 3) or (F, H, W, 3), got {values.shape}")
    if values.dtype != np.uint8:
        values = _to_bytes(values)
    return Decoded(_tensor(values if values.ndim == 4 else values[None]))


def _to_bytes(values: np.ndarray) -> np.ndarray:
    """uint8 from floats in [0, 1]."""
    if not np.issubdtype(values.dtype, np.floating):
        raise ValueError(f"values must be uint8, or float in [0, 1], got {values.dtype}")
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinity")
    if values.min() < 0 or values.max() > 1:
        raise ValueError(f"floats must be in [0, 1], got {values.min():.3g} to {values.max():.3g}")
    return (values.astype(np.float64) * 255).round().astype(np.uint8)


def _image(file: Path) -> Decoded:
    from PIL import Image, ImageSequence

    with Image.open(file) as opened:
        several = getattr(opened, "n_frames", 1) > 1
        animated = several and opened.format in _ANIMATED
        changes = {PAGES} if several and opened.format == "TIFF" else set()
        if _is_deep(opened):
            changes.add(DEEP)
        frames = []
        for frame in ImageSequence.Iterator(opened) if animated else [opened]:
            frame.load()
            color, found = _rgb(frame)
            frames.append(color)
            changes |= found
    return Decoded(_tensor(np.stack(frames)), tuple(sorted(changes)))


def _is_deep(opened: Image.Image) -> bool:
    """Whether the file stores 16 bits a channel: Pillow hands out 8 of them without a word when there is color."""
    layouts = [tile[3] if isinstance(tile[3], tuple) else (tile[3],) for tile in getattr(opened, "tile", ())]
    return any(isinstance(word, str) and word.endswith((";16B", ";16L", ";16N")) for words in layouts for word in words)


def _rgb(image: Image.Image) -> tuple[np.ndarray, set[str]]:
    """Convert to uint8 (H, W, 3); also the conversions that were needed."""
    from PIL import Image, ImageOps

    changes = set()
    upright = ImageOps.exif_transpose(image)
    if image.getexif().get(0x0112, 1) not in (0, 1):
        changes.add(ROTATED)
    if upright.mode == "F" or upright.mode in _WIDE:
        values = np.asarray(upright)
        if upright.mode != "F":
            if values.min() < 0 or values.max() > 65535:
                raise ValueError(f"whole numbers up to {values.max()} have no known white; save it with 8 or 16 bits")
            values = values / 65535.0
        return np.repeat(_to_bytes(values)[..., None], 3, 2), changes | {GRAY, DEEP}
    if upright.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in upright.info:
        changes |= {GRAY} if upright.mode in ("LA", "La") else set()
        upright = upright.convert("RGBA")
        if np.asarray(upright)[..., 3].min() < 255:
            changes.add(ALPHA)
        upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
    changes |= {GRAY} if upright.mode in ("L", "1") else {CMYK} if upright.mode == "CMYK" else set()
    return np.asarray(upright.convert("RGB")), changes


def _tensor(frames: np.ndarray) -> torch.Tensor:
    """uint8 (F, 3, H, W) from (F, H, W, 3)."""
    return torch.from_numpy(np.array(frames, dtype=np.uint8)).permute(0, 3, 1, 2).contiguous()
