"""Write image-mask pairs in the formats of segmenters: MVTec tree, anomalib Folder, flat, COCO, YOLO-seg, JSONL.

Every format is a folder of its own with copies of the images, lossless, and a ``manifest.jsonl`` with a row per image.
Masks are single-channel PNG files of 0 and 255 (0 and 1 for ``flat01``).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from dit_attn import files
from dit_attn.errors import DitAttnError, unknown
from dit_attn.pipelines.anomaly.pixels import read_image, write_png

_EIGHT = np.ones((3, 3), bool)


@dataclass(frozen=True)
class Pair:
    """An accepted image with its mask.

    Attributes:
        image: PNG file.
        mask: (H, W) bool.
        product, defect: names.
        row: what the manifest says of it.
    """

    image: Path
    mask: np.ndarray
    product: str
    defect: str
    row: dict[str, Any]


@dataclass(frozen=True)
class Export:
    """What is written.

    Attributes:
        folder: an empty folder.
        pairs: images with masks.
        normals: normal images by product.
    """

    folder: Path
    pairs: Sequence[Pair]
    normals: Mapping[str, Sequence[Path]]

    def numbered(self) -> list[tuple[str, Pair]]:
        """Return the pairs with numbers of their own within product and type, zero-padded: ``"000"``."""
        counts: dict[tuple[str, str], int] = {}
        out = []
        for pair in self.pairs:
            number = counts.setdefault((pair.product, pair.defect), 0)
            counts[pair.product, pair.defect] += 1
            out.append((f"{number:03d}" if len(self.pairs) <= 1000 else f"{number:06d}", pair))
        return out

    def copy(self, image: Path, name: str, only_png: bool = False) -> str:
        """Copy an image to ``name`` below the folder, with its own suffix; one that is stored turned becomes a PNG.

        ``only_png``: every other kind of file becomes a PNG too.
        """
        suffix = image.suffix.lower()
        anew = _orientation(image)[1] != 1 or (only_png and suffix != ".png")
        target = self.folder / f"{name}{'.png' if anew else suffix}"
        target.parent.mkdir(parents=True, exist_ok=True)
        if anew:
            write_png(target, read_image(image))
        else:
            shutil.copyfile(image, target)
        return target.relative_to(self.folder).as_posix()

    def mask(self, mask: np.ndarray, name: str, on: int = 255) -> str:
        """Write a mask as ``name``.png below the folder."""
        write_png(self.folder / f"{name}.png", mask.astype(np.uint8) * on)
        return f"{name}.png"

    def names(self) -> list[tuple[str, Pair]]:
        """Return the pairs with flat names, ``product_defect_000``."""
        return [(f"{pair.product}_{pair.defect}_{number}", pair) for number, pair in self.numbered()]

    def normal_names(self) -> list[tuple[str, Path]]:
        """Return the normal images with flat names, ``product_good_000``."""
        return [(f"{p}_good_{i:03d}", image) for p, images in self.normals.items() for i, image in enumerate(images)]


Rows = list[dict[str, Any]]


def _mvtec(out: Export) -> Rows:
    """MVTec AD is of PNG files alone, and its readers pass over all others without a word."""
    rows = []
    for product, images in out.normals.items():
        for i, source in enumerate(images):
            out.copy(source, f"{product}/train/good/{i:03d}", only_png=True)
    for number, pair in out.numbered():
        image = out.copy(pair.image, f"{pair.product}/test/{pair.defect}/{number}", only_png=True)
        mask = out.mask(pair.mask, f"{pair.product}/ground_truth/{pair.defect}/{number}_mask")
        rows.append({"image": image, "mask": mask, **pair.row})
    return rows


def _folder(out: Export) -> Rows:
    """anomalib matches images and masks by their sorted names; it knows one kind of defect, so types are in names."""
    for name, source in out.normal_names():
        out.copy(source, f"normal/{name}")
    rows = []
    for name, pair in out.names():
        image, mask = out.copy(pair.image, f"abnormal/{name}"), out.mask(pair.mask, f"mask/{name}")
        rows.append({"image": image, "mask": mask, **pair.row})
    return rows


def _flat(out: Export, on: int = 255) -> Rows:
    rows = []
    for name, source in out.normal_names():
        out.copy(source, f"image/{name}")
        out.mask(np.zeros(_size(source), bool), f"mask/{name}", on)
    for name, pair in out.names():
        image, mask = out.copy(pair.image, f"image/{name}"), out.mask(pair.mask, f"mask/{name}", on)
        rows.append({"image": image, "mask": mask, **pair.row})
    return rows


def _flat01(out: Export) -> Rows:
    return _flat(out, on=1)


def _coco(out: Export) -> Rows:
    kinds = sorted({f"{pair.product}+{pair.defect}" for pair in out.pairs})
    images: Rows = []
    annotations: Rows = []
    rows: Rows = []
    for name, source in out.normal_names():
        height, width = _size(source)
        file = out.copy(source, f"images/{name}")
        images.append({"id": len(images) + 1, "file_name": file, "height": height, "width": width})
    for name, pair in out.names():
        file = out.copy(pair.image, f"images/{name}")
        height, width = pair.mask.shape
        images.append({"id": len(images) + 1, "file_name": file, "height": height, "width": width})
        for part in components(pair.mask):
            ys, xs = np.nonzero(part)
            box = [int(xs.min()), int(ys.min()), int(np.ptp(xs)) + 1, int(np.ptp(ys)) + 1]
            annotations.append({
                "id": len(annotations) + 1, "image_id": len(images), "bbox": box, "area": int(part.sum()),
                "category_id": kinds.index(f"{pair.product}+{pair.defect}") + 1, "iscrowd": 0,
                "segmentation": {"size": [height, width], "counts": run_lengths(part)},
            })  # fmt: skip
        rows.append({"image": file, **pair.row})
    categories = [{"id": i + 1, "name": name, "supercategory": "defect"} for i, name in enumerate(kinds)]
    about = {"description": "generated image-mask pairs; scores and seeds are in manifest.jsonl"}
    data = {"info": about, "images": images, "annotations": annotations, "categories": categories}
    files.write_json(out.folder / "annotations.json", data, indent=None)
    return rows


def _yolo(out: Export) -> Rows:
    kinds = sorted({f"{pair.product}+{pair.defect}" for pair in out.pairs})
    for name, source in out.normal_names():
        out.copy(source, f"images/{name}")
        _label(out.folder / "labels" / f"{name}.txt", "")
    rows = []
    for name, pair in out.names():
        image = out.copy(pair.image, f"images/{name}")
        kind = kinds.index(f"{pair.product}+{pair.defect}")
        height, width = pair.mask.shape
        lines = []
        for part in components(pair.mask):
            points = outline(part)
            lines.append(" ".join([str(kind), *(f"{x / width:.6f} {y / height:.6f}" for x, y in points)]))
        _label(out.folder / "labels" / f"{name}.txt", "\n".join(lines) + "\n")
        rows.append({"image": image, "label": f"labels/{name}.txt", **pair.row})
    names = "".join(f"  {i}: {json.dumps(name, ensure_ascii=False)}\n" for i, name in enumerate(kinds))
    files.write_text(out.folder / "data.yaml", f"path: .\ntrain: images\nval: images\nnames:\n{names}")
    return rows


def _label(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(path, text)


def _jsonl(out: Export) -> Rows:
    rows = []
    for name, pair in out.names():
        image, mask = out.copy(pair.image, f"image/{name}"), out.mask(pair.mask, f"mask/{name}")
        rows.append({"image": image, "mask": mask, "texture+defect": f"{pair.product}+{pair.defect}", **pair.row})
    text = "".join(json.dumps({key: row[key] for key in ("image", "mask", "texture+defect")}) + "\n" for row in rows)
    files.write_text(out.folder / "data.jsonl", text)
    return rows


FORMATS: dict[str, Callable[[Export], Rows]] = {
    "mvtec": _mvtec,
    "folder": _folder,
    "flat": _flat,
    "flat01": _flat01,
    "coco": _coco,
    "yolo": _yolo,
    "jsonl": _jsonl,
}


def check_formats(names: Sequence[str]) -> None:
    """Refuse an unknown format.

    Raises:
        DitAttnError: one is not in ``FORMATS``.
    """
    for name in names:
        if name not in FORMATS:
            raise unknown("format", name, FORMATS)


def export(folder: Path, format: str, pairs: Sequence[Pair], normals: Mapping[str, Sequence[Path]]) -> Path:
    """Write pairs and normal images in one format, replacing what an earlier export wrote there.

    Args:
        folder: where the format's own folder is made.
        format: one of ``FORMATS``.
        pairs: images with masks.
        normals: normal images by product; empty to write none.

    Returns:
        The format's folder.

    Raises:
        DitAttnError: unknown format, or the disk is full.
    """
    check_formats([format])
    target = folder / format
    with files.report_os_error(f"write {target}", "free some space and go on with --resume"):
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        rows = FORMATS[format](Export(target, pairs, normals))
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        files.write_text(target / "manifest.jsonl", text)
    return target


def components(mask: np.ndarray) -> list[np.ndarray]:
    """Split a mask into its 8-connected parts, each (H, W) bool."""
    labels, count = ndimage.label(mask, _EIGHT)
    return [labels == i + 1 for i in range(count)]


def run_lengths(mask: np.ndarray) -> list[int]:
    """Encode a mask as COCO's uncompressed run lengths: column by column, zeros first."""
    flat = np.concatenate([[0], mask.T.reshape(-1).astype(np.int8), [0]])
    edges = np.flatnonzero(np.diff(flat))
    stops = np.concatenate([edges, [mask.size]]) if len(edges) == 0 or edges[-1] != mask.size else edges
    return [int(n) for n in np.diff(np.concatenate([[0], stops]))]


def outline(part: np.ndarray) -> list[tuple[int, int]]:
    """Trace the outer border of an 8-connected part along the edges of its pixels: corners (x, y), clockwise."""
    filled = np.pad(ndimage.binary_fill_holes(part), 1)
    y, x = (int(v[0]) for v in np.nonzero(filled))  # the top left pixel: its upper edge leads right
    start, direction = (y, x), 0
    steps = ((0, 1), (1, 0), (0, -1), (-1, 0))  # right, down, left, up
    here, points = start, []
    while True:
        # Pixels ahead of a corner, left and right of the way on.
        left, right = _ahead(filled, here, direction)
        turn = -1 if left else (0 if right else 1)
        if turn:
            points.append((here[1] - 1, here[0] - 1))
            direction = (direction + turn) % 4
        here = (here[0] + steps[direction][0], here[1] + steps[direction][1])
        if here == start and direction == 3:
            points.append((here[1] - 1, here[0] - 1))
            return points[1:] if points[0] == points[-1] else points


def _ahead(filled: np.ndarray, corner: tuple[int, int], direction: int) -> tuple[bool, bool]:
    """Whether the pixels ahead at the left and at the right of a corner (their top left is the pixel's) are filled."""
    y, x = corner
    around = {0: ((y - 1, x), (y, x)), 1: ((y, x), (y, x - 1)), 2: ((y, x - 1), (y - 1, x - 1)),
              3: ((y - 1, x - 1), (y - 1, x))}[direction]  # fmt: skip
    return bool(filled[around[0]]), bool(filled[around[1]])


def _size(image: Path) -> tuple[int, int]:
    """(height, width) of an image, upright."""
    (width, height), orientation = _orientation(image)
    return (width, height) if orientation >= 5 else (height, width)


def _orientation(image: Path) -> tuple[tuple[int, int], int]:
    """(width, height) as stored, and the EXIF orientation."""
    from PIL import Image

    try:
        with Image.open(image) as opened:
            return opened.size, int(opened.getexif().get(0x0112, 1))
    except OSError as error:
        raise DitAttnError(f"image {image} cannot be read; replace it or leave it out") from error
