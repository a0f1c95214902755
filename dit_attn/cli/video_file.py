"""Writing an MP4, with its sound where it has one."""

from __future__ import annotations

import errno
import math
import os
import shutil
import subprocess
import tempfile
import wave
from pathlib import Path
from typing import TYPE_CHECKING

from dit_attn.errors import RunStopped, cut, reason

if TYPE_CHECKING:
    import numpy as np

    from dit_attn.pipelines.output import Sound


def write(frames: np.ndarray, sound: Sound | None, path: Path, fps: int) -> None:
    """Save a video.

    Args:
        frames: (F, H, W, 3) uint8.
        sound: that goes with it.
        path: of the file, by the ending of which ffmpeg knows its format.
        fps: frames per second.

    Raises:
        RunStopped: imageio or ffmpeg is missing.
        OSError: ffmpeg did not write all of it.
    """
    from diffusers.utils import export_to_video
    from PIL import Image

    height, width = frames.shape[1:3]
    block = max(2, math.gcd(math.gcd(height, width), 16))
    try:
        export_to_video([Image.fromarray(frame) for frame in frames], str(path), fps=fps, macro_block_size=block)
    except (ImportError, AttributeError) as error:
        raise RunStopped(
            f"videos need imageio and imageio-ffmpeg ({reason(error)}): `pip install imageio imageio-ffmpeg`"
        ) from error
    _check_video(path, len(frames))
    if sound is not None:
        _add_sound(sound, path)


def _add_sound(sound: Sound, path: Path) -> None:
    """Put the sound of a video into its file; the pictures are not encoded again."""
    import imageio_ffmpeg

    with tempfile.TemporaryDirectory() as folder:
        waves, both = Path(folder) / "sound.wav", Path(folder) / f"both{path.suffix}"
        with wave.open(str(waves), "wb") as file:
            file.setnchannels(sound.samples.shape[1])
            file.setsampwidth(2)
            file.setframerate(sound.rate)
            file.writeframes((sound.samples.clip(-1.0, 1.0) * 32767).round().astype("<i2").tobytes())
        words = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error", "-i", str(path), "-i", str(waves)]
        done = subprocess.run([*words, "-c:v", "copy", "-c:a", "aac", str(both)], capture_output=True, text=True)
        if done.returncode:
            raise OSError(errno.EIO, f"ffmpeg could not add the sound: {cut(done.stderr.strip(), 200)}")
        shutil.copyfile(both, path)


def _check_video(path: Path, count: int) -> None:
    """ffmpeg writes in its own process and its failures (a full disk) can go unnoticed: count what it wrote."""
    import imageio_ffmpeg

    try:
        written = imageio_ffmpeg.count_frames_and_secs(str(path))[0] if path.is_file() and path.stat().st_size else 0
    except RuntimeError:
        written = 0
    if written != count:
        full = shutil.disk_usage(path.parent).free < 1 << 20
        raise OSError(
            errno.ENOSPC if full else errno.EIO,
            f"{os.strerror(errno.ENOSPC)}" if full else f"ffmpeg wrote {written} of {count} frames",
        )
