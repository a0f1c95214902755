"""Images and masks of any kind of file as plain arrays, each problem as one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dit_attn.errors import DitAttnError, reason

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
_SMALLEST = 8  # pixels along a side


@contextmanager
def _opened(path: Path, what: str) -> Iterator[Any]:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            yield image
    except DitAttnError:
        raise
    except Exception as error:  # decoders raise anything on damaged files
        raise DitAttnError(f"{what} {path} cannot be read ({reason(error)}); replace it or leave it out") from error


def read_image(path: Path) -> np.ndarray:
    """Read an image upright: (H, W, 3) uint8.

    16-bit values are scaled by their largest possible one, transparent pixels lie on white.

    Raises:
        DitAttnError: the file cannot be read, or is smaller than 8 pixels.
    """
    from PIL import Image, ImageOps

    with _opened(path, "image") as image:
        upright = ImageOps.exif_transpose(image)
        if upright.mode.startswith("I"):
            values = np.asarray(upright).astype(np.int64)
            gray = (values // 257 if values.max() > 255 else values).clip(0, 255).astype(np.uint8)
            pixels = np.repeat(gray[..., None], 3, axis=2)
        elif upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
            rgba = upright.convert("RGBA")
            pixels = np.asarray(Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba))[..., :3].copy()
        else:
            pixels = np.asarray(upright.convert("RGB")).copy()
    if min(pixels.shape[:2]) < _SMALLEST:
        raise DitAttnError(f"image {path} is {pixels.shape[1]} x {pixels.shape[0]} pixels; at least 8 x 8 are needed")
    return pixels


def read_mask(path: Path, image: Path) -> np.ndarray:
    """Read the mask of an image: (H, W) bool, upright as the image is.

    Masks with values 0 and 255, 0 and 1, 16 bits, a palette (index 0 is background) or colors on black are understood.

    Args:
        path: of the mask.
        image: of the image that it belongs to.

    Raises:
        DitAttnError: it cannot be read, has another size, is empty or covers everything.
    """
    from PIL import Image

    with _opened(path, "mask") as mask:
        if mask.mode == "P":
            values = np.asarray(mask)
        elif mask.mode in ("RGBA", "LA", "PA"):
            values = np.asarray(mask.convert("RGBA"))
            values = values[..., :3].max(-1) if values[..., :3].any() else values[..., 3]
        else:
            values = np.asarray(mask)
        values = values.max(-1) if values.ndim == 3 else values
        named = mask.mode == "P"
        rotation = mask.getexif().get(0x0112, 1)
        size = mask.size
    with _opened(image, "image") as picture:
        turned, stored = picture.getexif().get(0x0112, 1), picture.size
    found = values > 0 if named or values.max() <= 127 else values > int(values.max()) / 2
    if rotation == 1 and turned != 1 and size == stored:
        rotation = turned  # drawn on the pixels as they are stored
    upright = np.asarray(_turned(Image.fromarray(found.astype(np.uint8)), rotation)).astype(bool)
    wanted = stored if turned < 5 else (stored[1], stored[0])
    if upright.shape != (wanted[1], wanted[0]):
        raise DitAttnError(
            f"mask {path} is {upright.shape[1]} x {upright.shape[0]} pixels and its image {image.name} "
            f"{wanted[0]} x {wanted[1]}; they must be equal"
        )
    return checked(upright, f"mask {path}")


def checked(mask: np.ndarray, name: str) -> np.ndarray:
    """Return a mask that has a defect and something beside it.

    Raises:
        DitAttnError: it has not.
    """
    if not mask.any():
        raise DitAttnError(f"{name} is empty; draw the defect in it, or leave the image out")
    if mask.mean() > 0.95:
        raise DitAttnError(f"{name} covers {mask.mean():.0%} of the image; if it is inverted, swap black and white")
    return mask


def _turned(image: Any, orientation: int) -> Any:
    """An image with an EXIF orientation, upright."""
    from PIL import Image

    turns = Image.Transpose
    moves = {
        2: turns.FLIP_LEFT_RIGHT, 3: turns.ROTATE_180, 4: turns.FLIP_TOP_BOTTOM, 5: turns.TRANSPOSE,
        6: turns.ROTATE_270, 7: turns.TRANSVERSE, 8: turns.ROTATE_90,
    }  # fmt: skip
    return image.transpose(moves[orientation]) if orientation in moves else image


def polygon_mask(polygons: list[list[tuple[float, float]]], height: int, width: int) -> np.ndarray:
    """Fill polygons, lists of (x, y) in pixels: (height, width) bool."""
    from PIL import Image, ImageDraw

    canvas = Image.new("L", (width, height))
    for points in polygons:
        ImageDraw.Draw(canvas).polygon([(float(x), float(y)) for x, y in points], fill=1, outline=1)
    return np.asarray(canvas).astype(bool)


def write_png(path: Path, pixels: np.ndarray) -> None:
    """Write uint8 pixels, (H, W) or (H, W, 3), as a PNG, atomically.

    Raises:
        DitAttnError: the disk is full or the folder cannot be written.
    """
    from PIL import Image

    from dit_attn import files

    with files.report_os_error(f"write {path}", "free some space and go on with --resume"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic_path(path) as temporary:
            Image.fromarray(np.ascontiguousarray(pixels)).save(temporary, format="PNG")
