"""Find the images and videos of a folder by their names; nothing is decoded and nothing heavy is imported."""

from __future__ import annotations

from pathlib import Path

from dit_attn.errors import DitAttnError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".npy")
VIDEO_SUFFIXES = (".mp4", ".webm", ".mov", ".gif")
_NAMED = 6  # folders in a message


def media_files(path: Path) -> list[Path]:
    """List images and videos of a folder by name, without hidden files and the sheet of ``dit-attn generate``.

    Raises:
        DitAttnError: no such folder, or none in it; the message names its folders that have some.
    """
    what = f"images ({', '.join(IMAGE_SUFFIXES[:3])}, ...) or videos ({', '.join(VIDEO_SUFFIXES[:2])}, ...)"
    if not path.is_dir():
        raise DitAttnError(f"no folder {path}; give a folder of {what}")
    try:
        files = sorted(file for file in path.iterdir() if is_media(file))
    except OSError as error:
        raise DitAttnError(f"cannot look into {path} ({error.strerror}); check its permissions") from error
    if not files:
        raise DitAttnError(f"no image or video in {path}; {folders_with_media(path) or f'give a folder of {what}'}")
    return files


def folders_with_media(path: Path) -> str:
    """Return which folders of a folder hold images or videos, and a command to try; empty where none does."""
    try:
        found = sorted(sub for sub in path.iterdir() if sub.is_dir() and any(map(is_media, sub.iterdir())))
    except OSError:
        return ""
    if not found:
        return ""
    dense = next((sub for sub in found if sub.name.endswith("dense")), None)
    others = [sub for sub in found if sub is not dense and (dense is None or _kin(sub, dense))]
    against = f" --reference {dense}" if dense is not None and others else ""
    names = ", ".join(sub.name for sub in found[:_NAMED]) + (", ..." if len(found) > _NAMED else "")
    return f"its folders have some: {names}; try: dit-attn eval {(others or found)[0]}{against}"


def is_media(file: Path) -> bool:
    """Tell whether a file counts, by its name."""
    known = file.suffix.lower() in (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
    return known and not file.name.startswith(".") and file.stem != "sheet" and not file.is_dir()


def _kin(folder: Path, dense: Path) -> bool:
    """Whether two folders are of one model, as ``generate`` names them: ``MODEL-dense`` and ``MODEL-METHOD``."""
    return folder.name.startswith(dense.name.removesuffix("dense"))
