"""Subjects of a picture: pieces of the prompt, each with the region where it belongs, from the formats people have.

A subject is a dictionary of JSON values, so that settings with subjects are saved and shared like any others:
``{"piece": "red cube", "box": [0.1, 0.2, 0.5, 0.8]}``. Boxes are (left, top, right, bottom) as fractions of the width
and height. A region is a ``box``, several ``boxes`` along a video, a ``mask``, or none: it is to be found then.
Nothing heavy is imported here.
"""

from __future__ import annotations

import base64
import binascii
import io
import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dit_attn import files
from dit_attn.errors import DitAttnError, reason, shorten, unknown

Subject = dict[str, Any]
Size = tuple[int, int]
"""Width and height in pixels."""

OVERLAPS = ("refuse", "share", "smaller")
"""What happens where regions overlap: an error, the tokens belong to both, or to the smaller one."""

_REGIONS = ("box", "bbox", "boxes", "mask")
_KEYS = ("piece", *_REGIONS, "from", "reference")
_SAME = {"phrase": "piece", "text": "piece", "label": "piece", "name": "piece"}
_LISTS = (("phrases", "boxes"), ("gligen_phrases", "gligen_boxes"))  # parallel lists, as GLIGEN's pipelines take them
_URL = "data:image/png;base64,"
_STEPS = 17  # points in time at which moving boxes are compared


def read_subjects(path: str | Path, size: Size | None = None, what: str = "subjects") -> tuple[Subject, ...]:
    """Read subjects from a JSON file; masks that it names are files next to it.

    Args:
        path: the file.
        size: pixels of the picture, for boxes in pixels where the file does not say.
        what: name of the file in messages.

    Raises:
        DitAttnError: no such file, no JSON, or as for :func:`parse_subjects`.
    """
    place = files.user_path(path, what)
    try:
        data = files.parse_json(place.read_bytes())
    except OSError as error:
        raise DitAttnError(f"cannot read {what} {path} ({reason(error)}); check the path") from error
    except ValueError as error:
        raise DitAttnError(f"{what} {path} is not JSON ({reason(error)})") from error
    return parse_subjects(data, size, str(path), place.parent)


def parse_subjects(
    data: Any, size: Size | None = None, where: str = "subjects", folder: Path | None = None
) -> tuple[Subject, ...]:
    """Return subjects in one form: pieces, with boxes as fractions and masks as PNG data.

    Args:
        data: a list of subjects; an object with them under ``subjects`` and the ``size`` of the picture; or parallel
            lists ``phrases`` and ``boxes``. A subject has a ``piece`` (or ``phrase``, ``text``, ``label``) and a
            ``box`` (left, top, right, bottom), a ``bbox`` (left, top, width, height, as in COCO), ``boxes`` along a
            video, a ``mask`` (a file, an image, an array), or none of them. Boxes are fractions, or pixels where a
            number is above 1. One that is to be moved has ``from``, the box that it comes from, and the number of the
            image, from 1, as ``reference`` where that is in a reference image.
        size: pixels of the picture.
        where: where the data come from, for messages.
        folder: of files of masks; default: the current one.

    Raises:
        DitAttnError: something else, a box that is empty, outside of the picture, or in pixels of an unknown size.
    """
    items, size = _listed(data, size, where)
    return tuple(_subject(item, size, _numbered(where, index, item), folder) for index, item in enumerate(items, 1))


def subjects_of(given: Any, where: str) -> tuple[Subject, ...]:
    """Return subjects of a setting: the name of a JSON file, or what :func:`parse_subjects` takes.

    Args:
        given: the setting.
        where: its name, for messages.

    Raises:
        DitAttnError: as for :func:`read_subjects` and :func:`parse_subjects`.
    """
    return read_subjects(given) if isinstance(given, str) else parse_subjects(given, where=where)


def check_overlap(subjects: Sequence[Subject]) -> None:
    """Refuse subjects whose boxes overlap, at one point in time or another.

    Raises:
        DitAttnError: so they do.
    """
    for a, b in itertools.combinations([one for one in subjects if boxes_of(one)], 2):
        for step in range(_STEPS):
            first, second = (box_at(boxes_of(one), step / (_STEPS - 1)) for one in (a, b))
            if all(min(first[i + 2], second[i + 2]) - max(first[i], second[i]) > 1e-6 for i in (0, 1)):
                raise DitAttnError(
                    f"the boxes of {shorten(a['piece'])} and {shorten(b['piece'])} overlap; move one, or set overlap "
                    "to share (tokens belong to both) or smaller (to the smaller one)"
                )


def box_at(boxes: Sequence[Sequence[float]], time: float) -> tuple[float, ...]:
    """Return the box at a time in [0, 1], between boxes that stand at equal distances in time."""
    place = time * (len(boxes) - 1)
    at = min(int(place), max(0, len(boxes) - 2))
    after = boxes[min(at + 1, len(boxes) - 1)]
    return tuple(a + (place - at) * (b - a) for a, b in zip(boxes[at], after))


def boxes_of(subject: Subject) -> list[list[float]]:
    """Return the boxes of a subject along the video, one where it does not move; none where it has none."""
    return subject.get("boxes") or ([subject["box"]] if subject.get("box") else [])


def shown_boxes(subject: Subject) -> list[Sequence[float]]:
    """Return the boxes of a subject, the one around its mask where it has one."""
    mask = mask_of(subject)
    if mask is None:
        return [*boxes_of(subject)]
    left, top, right, bottom = mask.getbbox() or (0, 0, 0, 0)
    return [(left / mask.width, top / mask.height, right / mask.width, bottom / mask.height)]


def has_region(subject: Subject) -> bool:
    """Return whether a subject has boxes or a mask."""
    return bool(boxes_of(subject)) or "mask" in subject


def mask_of(subject: Subject) -> Any:
    """Return the mask of a subject as a PIL image of mode 1, ``None`` where it has none."""
    text = subject.get("mask")
    return None if text is None else _image(base64.b64decode(text.removeprefix(_URL)), "mask").convert("1")


def check_mask_size(subjects: Sequence[Subject], size: Size, where: str = "subjects") -> None:
    """Refuse masks that have neither the size of the picture nor its proportions.

    Args:
        subjects: the subjects.
        size: of the picture, in pixels or in tokens.
        where: where they come from, for messages.

    Raises:
        DitAttnError: a mask of another size.
    """
    width, height = size
    for subject in subjects:
        mask = mask_of(subject)
        if mask is not None and abs(mask.width * height - mask.height * width) > max(mask.width, mask.height):
            raise DitAttnError(
                f"{where}: the mask of {shorten(subject['piece'])} has {mask.width} x {mask.height} pixels, which does "
                f"not fit {width} x {height}; draw it at the size of the picture, or in its proportions"
            )


def _numbered(where: str, index: int, item: Any) -> str:
    name = item.get("piece") if isinstance(item, Mapping) else None
    return f"{where}, subject {index}" + (f" ({shorten(name)})" if name else "")


def _listed(data: Any, size: Size | None, where: str) -> tuple[list[Any], Size | None]:
    """The subjects of some data, and the size that it says."""
    if isinstance(data, Mapping):
        rest = {str(key): value for key, value in data.items()}
        given = rest.pop("size", None)
        if given is not None:
            if not _is_row(given, 2, whole=True) or min(given) < 1:
                raise DitAttnError(f"{where}: size must be [width, height] in pixels, got {shorten(given)}")
            size = (int(given[0]), int(given[1]))
        for names, boxes in _LISTS:
            if names in rest and boxes in rest:
                rest["subjects"] = _paired(rest.pop(names), rest.pop(boxes), f"{where}: {names} and {boxes}")
        items = rest.pop("subjects", None)
        if rest:
            raise unknown(f"key in {where}:", next(iter(rest)), ("size", "subjects", "phrases", "boxes"))
    else:
        items = data
    if not isinstance(items, (list, tuple)):
        raise DitAttnError(
            f'{where} must be a list such as [{{"piece": "red cube", "box": [0.1, 0.2, 0.5, 0.8]}}], got '
            f"{shorten(items)}"
        )
    return list(items), size


def _paired(names: Any, boxes: Any, where: str) -> list[Subject]:
    if not all(isinstance(x, (list, tuple)) for x in (names, boxes)) or len(names) != len(boxes):
        raise DitAttnError(f"{where} must be two lists of the same length")
    return [{"piece": name, "box": box} for name, box in zip(names, boxes)]


def _subject(item: Any, size: Size | None, where: str, folder: Path | None) -> Subject:
    if not isinstance(item, Mapping):
        raise DitAttnError(f'{where} must be an object with a "piece" of the prompt, got {shorten(item)}')
    given = {_SAME.get(str(key), str(key)): value for key, value in item.items() if value is not None}
    for key in given:
        if key not in _KEYS:
            raise unknown(f"key in {where}:", key, _KEYS)
    regions = [key for key in _REGIONS if key in given]
    if len(regions) > 1:
        raise DitAttnError(f"{where} has {' and '.join(regions)}; give one of them")
    out: Subject = {"piece": _piece(given.get("piece"), where)}
    if "bbox" in given and _is_row(given["bbox"], 4):
        left, top, width, height = given["bbox"]
        given["box"] = [left, top, left + width, top + height]
    if "box" in given or "bbox" in given:
        out["box"] = _box(given.get("box", given.get("bbox")), size, where)
    elif "boxes" in given:
        if not isinstance(given["boxes"], (list, tuple)) or not given["boxes"]:
            raise DitAttnError(f"{where}: boxes must be a list of boxes, the first for the start of the video")
        out["boxes"] = [_box(box, size, where) for box in given["boxes"]]
    elif "mask" in given:
        out["mask"] = _encoded_mask(given["mask"], where, folder)
    return {**out, **_origin(given, out, size, where)}


def _origin(given: Subject, made: Subject, size: Size | None, where: str) -> Subject:
    """Where a subject comes from: a box of the picture, or of a reference image."""
    out: Subject = {}
    if "from" in given:
        out["from"] = _box(given["from"], size, f"{where}, from")
    if "reference" in given:
        number = given["reference"]
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise DitAttnError(f"{where}: reference must be the number of a reference image, from 1, got {number!r}")
        if "boxes" in made:
            raise DitAttnError(f"{where}: a reference goes to one box; give a box for the boxes along the video")
        out["reference"] = number
    if out and not boxes_of(made):
        raise DitAttnError(f"{where} has {next(iter(out))} and no box; add the box where the subject belongs")
    return out


def _piece(piece: Any, where: str) -> Any:
    if isinstance(piece, str) and piece.strip():
        return piece.strip()
    if _is_row(piece, 2, whole=True) and 0 <= piece[0] < piece[1]:
        return [int(piece[0]), int(piece[1])]
    raise DitAttnError(f'{where} needs a "piece": words of the prompt, or [start, end] in characters of it')


def _is_row(value: Any, length: int, whole: bool = False) -> bool:
    kinds = (int,) if whole else (int, float)
    return (
        isinstance(value, (list, tuple))
        and len(value) == length
        and all(isinstance(x, kinds) and not isinstance(x, bool) and math.isfinite(x) for x in value)
    )


def _box(box: Any, size: Size | None, where: str) -> list[float]:
    if not _is_row(box, 4):
        raise DitAttnError(f"{where}: a box must be [left, top, right, bottom], got {shorten(box)}")
    scaled = [float(x) for x in box]
    if max(scaled) > 1.0:
        if size is None:
            raise DitAttnError(
                f'{where}: the box {list(box)} is in pixels; give fractions of the picture, or "size": [width, height]'
            )
        scaled = [x / side for x, side in zip(scaled, (*size, *size))]
    left, top, right, bottom = scaled
    limits = "" if size is None else f" of {size[0]} x {size[1]} pixels"
    if min(left, top) < 0.0 or max(right, bottom) > 1.0 + 1e-6:
        raise DitAttnError(f"{where}: the box {list(box)} reaches outside of the picture{limits}; cut it at the border")
    if left >= right or top >= bottom:
        raise DitAttnError(f"{where}: the box {list(box)} is empty; write [left, top, right, bottom]")
    return [left, top, min(right, 1.0), min(bottom, 1.0)]


def _encoded_mask(mask: Any, where: str, folder: Path | None) -> str:
    """A mask as PNG data: of a file, of PNG data, a PIL image, or an (H, W) array or tensor."""
    from PIL import Image

    if isinstance(mask, str) and mask.startswith(_URL):
        try:
            image = _image(base64.b64decode(mask.removeprefix(_URL), validate=True), where)
        except binascii.Error as error:
            raise DitAttnError(f"{where}: the mask is no PNG data ({reason(error)})") from error
    elif isinstance(mask, (str, Path)):
        path = files.user_path((folder or Path()) / Path(mask).expanduser(), f"{where}: the mask")
        try:
            image = _image(path.read_bytes(), f"{where}: {mask}")
        except OSError as error:
            raise DitAttnError(f"{where}: cannot read the mask {mask} ({reason(error)}); check the path") from error
    elif isinstance(mask, Image.Image):
        image = mask
    else:
        image = _drawn(mask, where)
    drawn = image.convert("L").point(lambda value: 255 * (value > 127)).convert("1")
    if drawn.getbbox() is None:
        raise DitAttnError(f"{where}: the mask is black; the subject is where it is white")
    stream = io.BytesIO()
    drawn.save(stream, format="PNG", optimize=True)
    return _URL + base64.b64encode(stream.getvalue()).decode()


def _drawn(mask: Any, where: str) -> Any:
    """An array or tensor (H, W), or (1, H, W), of numbers or bool, as an image."""
    import numpy as np
    from PIL import Image

    try:
        values = np.asarray(mask.cpu() if hasattr(mask, "cpu") else mask)
    except (TypeError, ValueError):
        values = np.empty(0)
    values = values[0] if values.ndim == 3 and len(values) == 1 else values
    if values.ndim != 2 or values.dtype.kind not in "biuf" or not values.size:
        raise DitAttnError(f"{where}: a mask is a file, a PIL image or an (H, W) array, got {type(mask).__name__}")
    most = 255 if values.dtype.kind in "iu" and values.max() > 1 else 1
    return Image.fromarray(((values / most > 0.5) * 255).astype(np.uint8))


def _image(data: bytes, where: str) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        image = Image.open(io.BytesIO(data))
        image.load()
        return image
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DitAttnError(f"{where} is not a readable image ({reason(error)}); save it again as PNG") from error
