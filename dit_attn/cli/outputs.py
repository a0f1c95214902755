"""Writing what a pipeline made: PNG or MP4 and a JSON sidecar, each to a temporary name first."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dit_attn import files
from dit_attn.cli import video_file
from dit_attn.cli.output_address import lost, prepare_address
from dit_attn.errors import DitAttnError, RunStopped, reason
from dit_attn.pipelines.output import Sound, batch_of, sound_of
from dit_attn.remote import Place, RemotePath, Unreachable, is_address, local_copy, local_folder, parse_address

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


ENDINGS = (".png", ".mp4")
Facts = Callable[[str, str], dict[str, Any]]  # the content of a sidecar, by the output's name and SHA-256


@dataclass(frozen=True)
class Media:
    """One image or one video.

    Attributes:
        frames: (F, H, W, 3) uint8; F is 1 for an image.
        video: whether it is a video.
        sound: of a video, where the model makes sound.
    """

    frames: np.ndarray
    video: bool
    sound: Sound | None = None

    @property
    def ending(self) -> str:
        """File ending, with its dot."""
        return ".mp4" if self.video else ".png"


class NotFinite(RuntimeError):
    """The output has NaN or infinite values."""


def media_of(result: Any, pipe: Any = None) -> Media:
    """The first image or video of a pipeline's output, whatever its form (PIL, numpy, torch).

    Args:
        result: the output.
        pipe: the pipeline, which knows the rate of the sound; without it a video is silent.

    Raises:
        NotFinite: NaN or infinite values.
        RuntimeError: neither images nor frames.
    """
    import numpy as np

    made = batch_of(result)
    if made is None:
        raise RuntimeError(f"{type(result).__name__} holds neither images nor frames")
    item = made.items[0]
    parts = list(item) if made.video else [item]
    sound = sound_of(result, pipe) if made.video else None
    if sound is not None and not np.isfinite(sound.samples).all():
        raise NotFinite("the sound is NaN or infinite; nothing was saved. Try --dtype bf16 or fp32")
    return Media(np.stack([_array(part) for part in parts]), made.video, sound)


def _array(image: Any) -> np.ndarray:
    """(H, W, 3) uint8 from PIL, numpy (H, W, C) in [0, 1], or torch (C, H, W) in [0, 1]."""
    import numpy as np
    import torch

    if isinstance(image, torch.Tensor):
        image = image.detach().float().cpu().permute(1, 2, 0).numpy()
    values = np.asarray(image)
    if values.dtype != np.uint8:
        bad = ~np.isfinite(values)
        if bad.any():
            raise NotFinite(
                f"{100 * float(bad.mean()):.1f} % of the output is NaN or infinite; nothing was saved. "
                "Try --dtype bf16 or fp32, or leave out the method to see whether it is the cause"
            )
        values = (values.clip(0.0, 1.0) * 255).round().astype(np.uint8)
    if values.ndim == 2:
        values = values[..., None]
    return np.repeat(values, 3, axis=-1) if values.shape[-1] == 1 else values[..., :3]


def folder_of(given: str | None, default: Path) -> Path:
    """The folder of ``--output``.

    Raises:
        DitAttnError: an empty text.
    """
    if given is not None and not given.strip():
        raise DitAttnError(f"--output is empty; give a folder, or leave it out for {default}")
    return default if given is None else files.user_path(given, "--output")


def place_given(given: str | None, default: Path) -> Place:
    """The folder of ``--output`` where it may be an address.

    Raises:
        DitAttnError: an empty text, or an address that is none.
    """
    if given is not None and is_address(given):
        return parse_address(given, "--output")
    return folder_of(given, default)


def prepare_folder(folder: Place) -> None:
    """Make the output folder, try to write in it, and sweep what a killed run left.

    Raises:
        DitAttnError: it is a file, or cannot be written.
    """
    if isinstance(folder, RemotePath):
        prepare_address(folder)
        return
    if folder.exists() and not folder.is_dir():
        raise DitAttnError(f"--output {folder} is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f"{files.TEMPORARY}{uuid.uuid4().hex}"
        probe.write_bytes(b"x")
        probe.unlink()
        for left in folder.glob(f"{files.TEMPORARY}*"):
            if time.time() - left.stat().st_mtime > 3600:
                left.unlink(missing_ok=True)
    except (OSError, ValueError) as error:  # a zero byte in the name is a ValueError
        raise DitAttnError(f"cannot write to --output {folder} ({reason(error)}); choose another folder") from error


_UNRECOVERABLE = {
    getattr(errno, name) for name in ("ENOSPC", "EDQUOT", "EROFS", "EACCES", "EPERM", "EIO", "EFBIG", "ENOENT")
}


@contextmanager
def output_file(path: Place) -> Iterator[Path]:
    """Yield a temporary path that becomes ``path``, as :func:`dit_attn.files.atomic_path`.

    Raises:
        RunStopped: the disk is full or not writable.
    """
    with report_unrecoverable(path), files.atomic_path(path) as temporary:
        yield temporary


@contextmanager
def report_unrecoverable(path: Place, action: str = "write") -> Iterator[None]:
    """Turn an ``OSError`` that would meet the next item too into ``RunStopped``.

    Args:
        path: of the file.
        action: what is done with it.

    Raises:
        RunStopped: the disk is full or not writable, or the address cannot be reached.
    """
    try:
        yield
    except Unreachable as error:
        raise lost(path, action, error) from error
    except OSError as error:
        if error.errno in _UNRECOVERABLE:
            raise RunStopped(
                f"cannot {action} {path} ({reason(error)}); finished items are saved: free disk space or choose "
                "another --output, then run the same command with --resume"
            ) from error
        raise


def write_media(media: Media, path: Place, fps: int, text: dict[str, str]) -> None:
    """Save an image (with ``text`` as PNG chunks) or a video."""
    with output_file(path) as temporary:
        _encode(media, temporary, fps, text)


def _encode(media: Media, path: Path, fps: int, text: dict[str, str]) -> None:
    if media.video:
        video_file.write(media.frames, media.sound, path, fps)
    else:
        _write_png(media, path, text)


def _write_png(media: Media, path: Path, text: dict[str, str]) -> None:
    from PIL import Image
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    for key, value in text.items():
        info.add_text(key, value)
    Image.fromarray(media.frames[0]).save(path, pnginfo=info)


def write_json(data: dict[str, Any], path: Place) -> None:
    """Save JSON, atomically."""
    write_text(json.dumps(data, indent=1, default=str) + "\n", path)


def write_text(text: str, path: Place) -> None:
    """Save text as UTF-8, atomically."""
    with output_file(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_image(image: Image.Image, path: Place) -> None:
    """Save a Pillow image, atomically."""
    with output_file(path) as temporary:
        image.save(temporary)


def to_json(data: Any) -> str:
    """One line of JSON."""
    return json.dumps(data, default=str)


def read_sidecar(path: Place) -> dict[str, Any]:
    """A sidecar, or an empty dict when there is none, it cannot be read, or it is a link.

    Raises:
        RunStopped: the address cannot be reached, so that nobody knows.
    """
    try:
        data = files.parse_json(files.read_regular(path))
    except Unreachable as error:
        raise lost(path, "read", error) from error
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


def place(folder: Place, stem: str, digest: str) -> str:
    """``stem``, or ``stem`` with a piece of the job's hash when another job's output already has that name."""
    other = read_sidecar(folder / f"{stem}.json").get("job_hash")
    taken = other is None and any(_is_taken(folder / f"{stem}{ending}") for ending in ENDINGS)
    return f"{stem}_{digest[:8]}" if taken or other not in (None, digest) else stem


def _is_taken(path: Place) -> bool:
    return path.exists() if isinstance(path, RemotePath) else os.path.lexists(path)


def save(media: Media, folder: Place, stem: str, digest: str, fps: int, text: dict[str, str], facts: Facts) -> Place:
    """Save an output and its sidecar as one unit, under a name that no other job has.

    The output is encoded under a temporary name. Under the lock of the folder, so that no other process chooses the
    same name, the sidecar appears first and the output last: a process that is killed between the two leaves no output
    without a sidecar, and the next run makes the item under the same name. At an address, which has no lock, a new
    sidecar is created where there is none.

    Args:
        media: the output.
        folder, stem, digest: place, preferred name and hash of the job.
        fps: frames per second of a video.
        text: chunks of a PNG.
        facts: content of the sidecar, by name and SHA-256 of the output.

    Returns:
        The file.

    Raises:
        RunStopped: the disk is full or not writable, or the address cannot be reached.
    """
    if isinstance(folder, RemotePath):
        return _save_at_address(media, folder, stem, digest, fps, text, facts)
    temporary = folder / f"{files.TEMPORARY}{uuid.uuid4().hex[:8]}{media.ending}"
    try:
        with report_unrecoverable(folder / f"{stem}{media.ending}"):
            _encode(media, temporary, fps, text)
        with report_unrecoverable(folder / stem), files.locked(folder):
            path = folder / f"{place(folder, stem, digest)}{media.ending}"
            write_json(facts(path.name, sha256(temporary)), path.with_suffix(".json"))
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _save_at_address(
    media: Media, folder: RemotePath, stem: str, digest: str, fps: int, text: dict[str, str], facts: Facts
) -> RemotePath:
    with report_unrecoverable(folder / f"{stem}{media.ending}"), local_folder() as here:
        temporary = here / f"output{media.ending}"
        _encode(media, temporary, fps, text)
        path = folder / f"{place(folder, stem, digest)}{media.ending}"
        sidecar = json.dumps(facts(path.name, sha256(temporary)), indent=1, default=str) + "\n"
        if not path.with_suffix(".json").create(sidecar.encode()):  # it is this job's own, or was made since
            path = folder / f"{place(folder, stem, digest)}{media.ending}"
            write_json(facts(path.name, sha256(temporary)), path.with_suffix(".json"))
        path.put(temporary)
    return path


@dataclass(frozen=True)
class Finished:
    """An output that is there, and what its sidecar says of it.

    Attributes:
        path: the file.
        seconds: time of the pipeline call.
        density: attention computed over the run; ``None`` without a method.
        warnings: one line each.
        sidecar: all of it.
    """

    path: Place
    seconds: float | None
    density: float | None
    warnings: tuple[str, ...]
    sidecar: dict[str, Any] = field(repr=False)


def finished(folder: Place, stem: str, digest: str) -> Finished | None:
    """Find the output of a job that is done.

    Its sidecar has the job's hash and values of the right types, and the file of that very name is the one that was
    written. Anything else is made again.

    Raises:
        RunStopped: the address cannot be reached.
    """
    sidecar = read_sidecar(folder / f"{stem}.json")
    name, seconds, warnings = sidecar.get("file"), sidecar.get("seconds"), sidecar.get("warnings", [])
    summary = sidecar.get("summary") or {}
    density = summary.get("run_density") if isinstance(summary, dict) else summary
    if sidecar.get("job_hash") != digest or name not in [f"{stem}{ending}" for ending in ENDINGS]:
        return None
    if not all(value is None or is_number(value) for value in (seconds, density)):
        return None
    if not isinstance(warnings, list) or not all(isinstance(line, str) for line in warnings):
        return None
    try:
        data = files.read_regular(folder / str(name))
    except Unreachable as error:
        raise lost(folder / str(name), "read", error) from error
    except OSError:
        return None
    if hashlib.sha256(data).hexdigest() != sidecar.get("sha256"):
        return None
    return Finished(folder / str(name), seconds, density, tuple(warnings), sidecar)


def is_number(value: Any) -> bool:
    """Tell whether a value of a JSON file is a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def read_media(path: Place) -> Media:
    """A PNG or MP4 that was written before."""
    with local_copy(path) as copy:
        return _decode(copy)


def _decode(path: Path) -> Media:
    import imageio.v3 as iio
    import numpy as np
    from PIL import Image

    if path.suffix == ".mp4":
        return Media(np.stack(list(iio.imiter(path, plugin="FFMPEG"))), True)
    with Image.open(path) as image:
        return Media(np.asarray(image.convert("RGB"))[None], False)
