"""Contact sheets: many labelled images in one, videos as strips of frames.

cells = [tile(frames, prompt, note) for frames, prompt, note in items]
flow(cells, "heading").save("sheet.png")
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

Color = tuple[int, int, int]

_BACKGROUND, _INK, _FAINT, _FRAME = (250, 250, 248), (25, 25, 25), (110, 110, 110), (200, 200, 198)
_GAP, _TEXT = 8, 15


@dataclass(frozen=True)
class Tile:
    """One cell: images in a row and the lines under them.

    Attributes:
        frames: the images, already scaled.
        title: first lines, wrapped to the cell's width.
        note: lines after the title, in gray.
        border: color of the line around every image.
    """

    frames: tuple[Image, ...]
    title: str
    note: str = ""
    border: Color = _FRAME

    @property
    def width(self) -> int:
        """Width of the row of images in pixels."""
        return sum(frame.width for frame in self.frames) + 2 * (len(self.frames) - 1)


def tile(
    frames: np.ndarray,
    title: str,
    note: str = "",
    height: int | None = None,
    strip: int = 6,
    border: Color = _FRAME,
) -> Tile:
    """Make a cell from an image or video.

    Args:
        frames: (F, H, W, 3) uint8; F is 1 for an image.
        title, note: the lines under it.
        height: pixels of the images; default 256 for an image, 160 for the frames of a video.
        strip: most frames of a video that are shown, evenly spaced, first and last included.
        border: color of the line around every image.
    """
    from PIL import Image as pil

    height = height or (160 if len(frames) > 1 else 256)
    count = min(strip, len(frames))
    shown = []
    for i in range(count):
        frame = pil.fromarray(frames[round(i * (len(frames) - 1) / max(1, count - 1))])
        # Small images are enlarged without smoothing; large ones are averaged down.
        how = pil.Resampling.NEAREST if frame.height * 2 <= height else pil.Resampling.LANCZOS
        shown.append(frame.resize((max(1, round(frame.width * height / frame.height)), height), how))
    return Tile(tuple(shown), title, note, border)


def grid(rows: Sequence[Sequence[Tile]], heading: str = "", columns: Sequence[str] = ()) -> Image:
    """Draw rows of cells as one image.

    Args:
        rows: cells; the columns of a row are aligned with those of the others.
        heading: line at the top.
        columns: titles of the columns, wrapped to their width and that of columns without a title behind them.
    """
    from PIL import Image as pil
    from PIL import ImageDraw

    count = max(len(row) for row in rows)
    widths = [max((row[i].width for row in rows if i < len(row)), default=0) for i in range(count)]
    heights = [max(_height(cell, width) for cell, width in zip(row, widths)) for row in rows]
    titles = [_wrap(title, _room(columns, widths, i), _TEXT + 1) for i, title in enumerate(columns)]
    begin = _GAP + (_TEXT + 12 if heading else 0)
    top = begin + max((len(lines) for lines in titles), default=0) * (_TEXT + 5) + (3 if columns else 0)
    size = (sum(widths) + (count + 1) * _GAP, top + sum(heights) + len(rows) * _GAP)
    sheet = pil.new("RGB", (max(size[0], 200), size[1]), _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    if heading:
        draw.text((_GAP, _GAP), heading, fill=_INK, font=_font(_TEXT + 3))
    lefts = [_GAP + sum(widths[:i]) + i * _GAP for i in range(count)]
    for left, lines in zip(lefts, titles):
        for place, line in enumerate(lines):
            draw.text((left, begin - 3 + place * (_TEXT + 5)), line, fill=_INK, font=_font(_TEXT + 1))
    for row, height in zip(rows, heights):
        for cell, left, width in zip(row, lefts, widths):
            _draw(sheet, draw, cell, left, top, width)
        top += height + _GAP
    return sheet


def stack(parts: Sequence[Image]) -> Image:
    """Put images one under the other."""
    from PIL import Image as pil

    sheet = pil.new("RGB", (max(part.width for part in parts), sum(part.height for part in parts)), _BACKGROUND)
    top = 0
    for part in parts:
        sheet.paste(part, (0, top))
        top += part.height
    return sheet


def flow(cells: Sequence[Tile], heading: str = "", width: int = 1600) -> Image:
    """Draw cells of any shape in rows of about ``width`` pixels."""
    per_row = max(1, width // (max(cell.width for cell in cells) + _GAP))
    return grid([cells[i : i + per_row] for i in range(0, len(cells), per_row)], heading)


def _room(columns: Sequence[str], widths: Sequence[int], at: int) -> int:
    """Pixels that the title of a column has: up to the next column that has one."""
    after = next((i for i in range(at + 1, len(columns)) if columns[i]), len(widths))
    return sum(widths[at:after]) + (after - at - 1) * _GAP


def _height(cell: Tile, width: int) -> int:
    return cell.frames[0].height + 4 + sum(size + 4 for _, size, _ in _lines(cell, width))


def _draw(sheet: Image, draw: Any, cell: Tile, left: int, top: int, width: int) -> None:
    x = left
    for frame in cell.frames:
        sheet.paste(frame, (x, top))
        box = (x, top, x + frame.width - 1, top + frame.height - 1)
        draw.rectangle(box, outline=cell.border, width=1 if cell.border == _FRAME else 3)
        x += frame.width + 2
    y = top + cell.frames[0].height + 4
    for line, size, color in _lines(cell, width):
        draw.text((left, y), line, fill=color, font=_font(size))
        y += size + 4


def _lines(cell: Tile, width: int) -> list[tuple[str, int, Color]]:
    """(text, size, color) of the lines under a cell."""
    title = [(line, _TEXT, _INK) for line in _wrap(cell.title, width, _TEXT)]
    return title + [(line, _TEXT - 2, _FAINT) for line in _wrap(cell.note, width, _TEXT - 2)]


def _wrap(text: str, width: int, size: int, most: int = 3) -> list[str]:
    """``text`` in at most ``most`` lines of ``width`` pixels; what does not fit is cut and marked."""
    font, lines = _font(size), [""]
    for word in text.split():
        joined = f"{lines[-1]} {word}".strip()
        if font.getlength(joined) <= width or not lines[-1]:
            lines[-1] = joined
        else:
            lines.append(word)
    if len(lines) > most:
        lines = [*lines[: most - 1], lines[most - 1] + " ..."]
    for index, line in enumerate(lines):
        while line and font.getlength(line) > width:
            line = line.rstrip(". ")[:-1] + "..." if len(line) > 4 else ""
        lines[index] = line
    return [line for line in lines if line]


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)
