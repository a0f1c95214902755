"""Find normal images, defect images and masks in the layouts that inspection data come in."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dit_attn import files
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.anomaly.pixels import SUFFIXES, checked, polygon_mask, read_image, read_mask

_MASK_ENDINGS = ("", "_mask", "-mask", "_gt", "_label", "_seg", "_pixels0")
_NORMAL = ("good", "normal", "ok", "Normal")
_DEFECT = ("defects", "defect", "abnormal", "anomaly", "bad", "ng", "Anomaly")
_MASKS = ("masks", "mask", "ground_truth", "gt")


@dataclass(frozen=True)
class Shot:
    """An image with a defect, and where the defect is.

    Attributes:
        image: file.
        product, defect: names.
        mask: file of the mask; ``None`` with ``polygons``.
        polygons: lists of (x, y) in pixels.
    """

    image: Path
    product: str
    defect: str
    mask: Path | None = None
    polygons: tuple[tuple[tuple[float, float], ...], ...] = ()

    def read(self) -> tuple[np.ndarray, np.ndarray]:
        """Read the image, (H, W, 3) uint8, and the mask, (H, W) bool.

        Raises:
            DitAttnError: one of them cannot be used.
        """
        pixels = read_image(self.image)
        if self.mask is not None:
            return pixels, read_mask(self.mask, self.image)
        drawn = polygon_mask([list(points) for points in self.polygons], *pixels.shape[:2])
        return pixels, checked(drawn, f"the shapes of {self.image.name}")


@dataclass
class Source:
    """What was found.

    Attributes:
        normals: files of normal images, by product.
        shots: defect images to learn from.
        held_out: defect images that are left alone.
    """

    normals: dict[str, list[Path]] = field(default_factory=dict)
    shots: list[Shot] = field(default_factory=list)
    held_out: list[Shot] = field(default_factory=list)

    def check(self) -> None:
        """Read every shot and one normal image of each product.

        Raises:
            DitAttnError: a file cannot be used, or a product has no normal images.
        """
        for shot in self.shots:
            shot.read()
            if not self.normals.get(shot.product):
                raise DitAttnError(f"there are no normal images of {shot.product!r}; give --normal DIR")
        for images in self.normals.values():
            read_image(images[0])

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(product, defect) of the shots, each once, in order."""
        return list(dict.fromkeys((shot.product, shot.defect) for shot in self.shots))


def images_in(folder: Path) -> list[Path]:
    """List the image files of a folder in natural order (2 before 10), not those of its subfolders."""
    if not folder.is_dir():
        raise DitAttnError(f"there is no folder {folder}; check the path")
    found = [path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and path.is_file()]
    return sorted((path for path in found if not path.name.startswith(".")), key=natural)


def natural(path: Path) -> list[Any]:
    """Return the key of a natural order: numbers inside names count as numbers."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part.lower()) for part in re.split(r"(\d+)", path.name)]


def from_folders(normal: Path, defects: Path | None, masks: Path | None, product: str, defect: str) -> Source:
    """Find images in folders of any layout.

    Args:
        normal: folder of normal images.
        defects: folder of defect images; subfolders with images are defect types. ``None``: none are needed.
        masks: folder of mask images or of labelme files, or a CSV file of boxes (image,x,y,width,height); ``None``:
            labelme files beside the images.
        product, defect: names; ``defect`` where there are no subfolders.

    Raises:
        DitAttnError: nothing is there, or images without a mask.
    """
    source = Source({product: images_in(normal)})
    if not source.normals[product]:
        raise DitAttnError(f"{normal} has no images ({', '.join(SUFFIXES)}); check --normal")
    if defects is None:
        return source
    groups = {defect: images_in(defects)}
    groups |= {child.name: images_in(child) for child in sorted(defects.iterdir()) if child.is_dir()}
    groups = {name: images for name, images in groups.items() if images}
    if not groups:
        raise DitAttnError(f"{defects} has no images ({', '.join(SUFFIXES)}); check --defects")
    for name, images in groups.items():
        inside = masks
        if masks is not None and masks.is_dir() and (masks / name).is_dir():
            inside = masks / name
        source.shots += _shots(images, inside, product, name)
    return source


def _shots(images: Sequence[Path], masks: Path | None, product: str, defect: str) -> list[Shot]:
    if masks is not None and masks.suffix.lower() == ".csv":
        boxes = _read_boxes(masks)
        missing = [image.name for image in images if image.name not in boxes]
        _refuse(missing, f"boxes in {masks.name}")
        return [Shot(image, product, defect, polygons=tuple(boxes[image.name])) for image in images]
    folder = masks if masks is not None else images[0].parent
    by_stem = {path.stem: path for path in (images_in(folder) if masks is not None else [])}
    out, missing = [], []
    for image in images:
        drawn = next((by_stem[image.stem + end] for end in _MASK_ENDINGS if image.stem + end in by_stem), None)
        label = next((p for p in (folder / f"{image.stem}.json", image.with_suffix(".json")) if p.is_file()), None)
        if drawn is not None:
            out.append(Shot(image, product, defect, mask=drawn))
        elif label is not None:
            out.append(Shot(image, product, defect, polygons=tuple(_read_labelme(label))))
        else:
            missing.append(image.name)
    _refuse(missing, f"a mask in {folder}")
    return out


def _refuse(missing: Sequence[str], what: str) -> None:
    if missing:
        names = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise DitAttnError(
            f"{len(missing)} defect images have no {what.removeprefix('a ')}: {names}; a mask has the name of its "
            "image, with or without _mask, or is a labelme .json"
        )


def _read_labelme(path: Path) -> list[tuple[tuple[float, float], ...]]:
    """Polygons, rectangles and circles of a labelme file."""
    try:
        shapes = files.parse_json(path.read_bytes())["shapes"]
        found = [_outline(shape["shape_type"], [(float(x), float(y)) for x, y in shape["points"]]) for shape in shapes]
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        raise DitAttnError(f"{path} is not a labelme file ({type(error).__name__}); export it again") from error
    return [points for points in found if points]


def _outline(kind: str, points: list[tuple[float, float]]) -> tuple[tuple[float, float], ...]:
    if kind == "rectangle":
        (x0, y0), (x1, y1) = points[:2]
        return ((x0, y0), (x1, y0), (x1, y1), (x0, y1))
    if kind == "circle":
        (x, y), edge = points[0], points[1]
        radius = float(np.hypot(edge[0] - x, edge[1] - y))
        turns = np.linspace(0, 2 * np.pi, 48, endpoint=False)
        return tuple((float(x + radius * np.cos(t)), float(y + radius * np.sin(t))) for t in turns)
    return tuple(points) if kind == "polygon" and len(points) > 2 else ()


def _read_boxes(path: Path) -> dict[str, list[tuple[tuple[float, float], ...]]]:
    """Boxes of a CSV file with the columns image, x, y, width, height, by file name."""
    out: dict[str, list[tuple[tuple[float, float], ...]]] = {}
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            for row in csv.DictReader(stream):
                x, y, w, h = (float(row[name]) for name in ("x", "y", "width", "height"))
                box = ((x, y), (x + w - 1, y), (x + w - 1, y + h - 1), (x, y + h - 1))
                out.setdefault(Path(row["image"]).name, []).append(box)
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DitAttnError(
            f"{path} is no file of boxes ({type(error).__name__}: {error}); its columns are image,x,y,width,height"
        ) from error
    return out


def from_tree(
    root: Path, shots: int | None = None, products: Iterable[str] = (), defects: Iterable[str] = ()
) -> Source:
    """Find images in a tree laid out as MVTec AD, VisA or anomalib's Folder.

    Of every type the first images, in natural order, are the shots; the others are left alone for tests.

    Args:
        root: the data set, or one product of it.
        shots: images per type; ``None`` for a third of them, at least one.
        products, defects: names to take; all where empty.

    Raises:
        DitAttnError: no known layout, a name that is not there, or images without masks.
    """
    if not root.is_dir():
        raise DitAttnError(f"there is no folder {root}; check --data")
    found = {folder.name: _product(folder) for folder in (root, *sorted(p for p in root.iterdir() if p.is_dir()))}
    layouts = {name: layout for name, layout in found.items() if layout is not None}
    if not layouts:
        raise DitAttnError(
            f"{root} is laid out neither as MVTec AD (train/good, test/TYPE, ground_truth/TYPE), VisA (Data/Images) "
            "nor anomalib's Folder (normal, abnormal, mask); give --normal, --defects and --masks"
        )
    chosen = _chosen("product", list(layouts), list(products))
    source = Source()
    for name in chosen:
        normals, types = layouts[name]
        source.normals[name] = images_in(normals)
        wanted = [kind for kind in types if not defects or kind in set(defects)]
        for kind in wanted:
            all_shots = _shots(images_in(types[kind][0]), types[kind][1], name, kind)
            count = max(1, len(all_shots) // 3) if shots is None else min(shots, len(all_shots))
            source.shots += all_shots[:count]
            source.held_out += all_shots[count:]
    if not source.shots:
        kinds = {kind for _, types in layouts.values() for kind in types}
        _chosen("defect", sorted(kinds), list(defects))
    return source


def _chosen(what: str, there: list[str], wanted: list[str]) -> list[str]:
    missing = [name for name in wanted if name not in there]
    if missing:
        raise DitAttnError(f"there is no {what} {missing[0]!r}; there is {', '.join(there)}")
    return wanted or there


def _product(folder: Path) -> tuple[Path, dict[str, tuple[Path, Path]]] | None:
    """Folder of the normal images, and by type those of defect images and masks; ``None`` for another layout."""
    if (folder / "train" / "good").is_dir():
        types = [p for p in sorted((folder / "test").glob("*")) if p.is_dir() and p.name != "good"]
        return folder / "train" / "good", {p.name: (p, folder / "ground_truth" / p.name) for p in types}
    images, masks = folder / "Data" / "Images", folder / "Data" / "Masks"
    if images.is_dir() and masks.is_dir():
        return images / "Normal", {"anomaly": (images / "Anomaly", masks / "Anomaly")}
    normal, defect, mask = (_first(folder, names) for names in (_NORMAL, _DEFECT, _MASKS))
    if normal and defect and mask:
        types = [p for p in sorted(defect.iterdir()) if p.is_dir() and images_in(p)]
        if types:
            return normal, {p.name: (p, mask / p.name if (mask / p.name).is_dir() else mask) for p in types}
        return normal, {"defect": (defect, mask)}
    return None


def _first(folder: Path, names: Iterable[str]) -> Path | None:
    return next((folder / name for name in names if (folder / name).is_dir()), None)
