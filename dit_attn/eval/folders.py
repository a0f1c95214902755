"""Folders of pictures and clips as tensors: what cannot be read is named and left out, never guessed."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dit_attn.errors import DitAttnError

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".npy")
CLIPS = (".mp4", ".webm", ".mov", ".gif")


@dataclass
class Folder:
    """What a folder holds.

    Attributes:
        path: the folder.
        names: stems of the files that were read, sorted.
        frames: uint8 (F, 3, H, W) of each; one frame for a picture.
        captions: of each, ``None`` where there is none.
        skipped: (file name, reason) of every file that could not be read.
    """

    path: Path
    names: list[str] = field(default_factory=list)
    frames: list[torch.Tensor] = field(default_factory=list)
    captions: list[str | None] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)

    @property
    def clips(self) -> bool:
        """Whether any of the files has several frames."""
        return any(len(frames) > 1 for frames in self.frames)

    def images(self, size: int | None = None) -> torch.Tensor:
        """uint8 (N, 3, H, W), all frames of all files in order, resized to ``size`` squared when it is given.

        Raises:
            DitAttnError: the files differ in size and no size is given.
        """
        frames = self.frames if size is None else [resized(x, size) for x in self.frames]
        shapes = sorted({(x.shape[3], x.shape[2]) for x in frames})
        if len(shapes) > 1:
            some = ", ".join(f"{w} x {h}" for w, h in shapes[:4])
            raise DitAttnError(f"the files of {self.path} differ in size ({some}); give --size N to bring them to one")
        return torch.cat(frames)


def read_folder(path: Path, captions: Path | None = None) -> Folder:
    """Every picture and clip of a folder, by name, with the captions that belong to them.

    Captions come from ``captions`` (.jsonl with ``file`` and ``prompt``, or .txt with one line per file in the order of
    names), else from a JSON sidecar with a ``prompt`` beside each file, as ``dit-attn generate`` writes it.

    Raises:
        DitAttnError: no such folder, nothing readable in it, or captions that do not fit.
    """
    if not path.is_dir():
        raise DitAttnError(f"no folder {path}; give a folder of pictures ({', '.join(PICTURES[:3])}) or clips (.mp4)")
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in (*PICTURES, *CLIPS))
    files = [file for file in files if not file.name.startswith(".") and file.stem != "sheet"]
    folder = Folder(path)
    given = None if captions is None else _captions(captions, files)
    for file in files:
        try:
            frames = read_frames(file)
        except (OSError, ValueError, SyntaxError, RuntimeError) as error:  # Pillow and the decoders raise all of these
            lines = str(error).strip().splitlines()
            folder.skipped.append((file.name, lines[0] if lines else type(error).__name__))
            continue
        folder.names.append(file.stem)
        folder.frames.append(frames)
        folder.captions.append(_sidecar(file) if given is None else given.get(file.name))
    if not folder.names:
        bad = f"; {len(folder.skipped)} could not be read, first {folder.skipped[0][0]}" if folder.skipped else ""
        raise DitAttnError(f"no picture or clip in {path}{bad}")
    return folder


def read_frames(file: Path) -> torch.Tensor:
    """uint8 (F, 3, H, W) of a picture or clip; grey becomes colour, transparency white, 16 bits 8.

    Raises:
        ValueError: an array that is not finite or not (H, W, 3) in [0, 1].
        OSError: the file cannot be decoded.
    """
    if file.suffix.lower() in CLIPS:
        import imageio.v3 as iio

        return _tensor(np.stack([frame[..., :3] for frame in iio.imiter(file)]))
    if file.suffix.lower() == ".npy":
        return _from_array(np.load(file, allow_pickle=False))
    from PIL import Image

    with Image.open(file) as opened:
        picture: Image.Image = opened
        picture.load()
        if picture.mode.startswith("I") or picture.mode == "F":
            wide = np.asarray(picture, dtype=np.float64)
            return _from_array(np.repeat((wide / 65535.0)[..., None], 3, 2))
        if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
            picture = picture.convert("RGBA")
            background = Image.new("RGBA", picture.size, "white")
            picture = Image.alpha_composite(background, picture)
        return _tensor(np.asarray(picture.convert("RGB"))[None])


def _from_array(values: np.ndarray) -> torch.Tensor:
    if not np.isfinite(values).all():
        raise ValueError("it holds NaN or infinity")
    if values.ndim != 3 or values.shape[2] != 3 or values.min() < 0 or values.max() > 1:
        raise ValueError(f"an array must be (H, W, 3) in [0, 1], got {values.shape} up to {values.max():.3g}")
    return _tensor((values * 255).round().astype(np.uint8)[None])


def _tensor(frames: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.ascontiguousarray(frames, dtype=np.uint8)).permute(0, 3, 1, 2).contiguous()


def resized(frames: torch.Tensor, size: int) -> torch.Tensor:
    """(F, 3, size, size) uint8, bicubic with anti-aliasing."""
    values = torch.nn.functional.interpolate(frames.float(), (size, size), mode="bicubic", antialias=True)
    return values.round().clamp(0, 255).to(torch.uint8)


def pairs(folder: Folder, reference: Folder) -> tuple[Folder, Folder, list[str]]:
    """Both folders cut down to the names they share, and the names only one of them has.

    Raises:
        DitAttnError: they share none.
    """
    both = [name for name in folder.names if name in set(reference.names)]
    if not both:
        raise DitAttnError(
            f"{folder.path} and {reference.path} share no file name; pairs are matched by name, e.g. 0001.png in both"
        )
    alone = sorted(set(folder.names) ^ set(reference.names))
    return _only(folder, both), _only(reference, both), alone


def _only(folder: Folder, names: list[str]) -> Folder:
    places = [folder.names.index(name) for name in names]
    cut = Folder(folder.path, names, [folder.frames[i] for i in places], [folder.captions[i] for i in places])
    return cut


def _sidecar(file: Path) -> str | None:
    path = file.with_suffix(".json")
    if not path.is_file():
        return None
    try:
        prompt = json.loads(path.read_text(encoding="utf-8")).get("prompt")
    except (ValueError, AttributeError):
        return None
    return prompt if isinstance(prompt, str) else None


def _captions(path: Path, files: list[Path]) -> dict[str, str]:
    """Caption by file name."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise DitAttnError(f"cannot read captions {path}: {error}; give a UTF-8 .txt or .jsonl file") from error
    if path.suffix == ".jsonl":
        found = {}
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                found[str(entry["file"])] = str(entry["prompt"])
            except (ValueError, KeyError, TypeError) as error:
                raise DitAttnError(
                    f'{path} line {number} is not {{"file": "0001.png", "prompt": "a cat"}}: {line[:60]}'
                ) from error
        return found
    if len(lines) != len(files):
        raise DitAttnError(
            f"{path} has {len(lines)} captions for {len(files)} files; give one line per file in the order of names"
        )
    return {file.name: line for file, line in zip(files, lines)}
