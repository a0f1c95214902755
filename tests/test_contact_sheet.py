"""Contact sheets: every item and its text is on the sheet, and no line is wider than its cell."""

from __future__ import annotations

import numpy as np
from PIL import Image

from dit_attn import contact_sheet


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (1, 16, 24, 3), dtype=np.uint8)


def test_a_sheet_shows_every_item_and_its_text() -> None:
    cells = [contact_sheet.tile(picture(i), f"prompt {i} " * 30, "note") for i in range(3)]
    video = contact_sheet.tile(np.concatenate([picture(i) for i in range(9)]), "video", strip=4)
    assert len(video.frames) == 4
    made = contact_sheet.flow([*cells, video], "heading", width=900)
    assert made.width >= video.width
    colors = {made.getpixel((8 + 4, y)) for y in range(made.height)}
    assert len(colors) > 10  # images, not only background


def test_a_strip_has_the_first_and_the_last_frame_and_keeps_small_pixels_sharp() -> None:
    video = np.concatenate([np.full((1, 8, 8, 3), 20 * i, dtype=np.uint8) for i in range(9)])
    strip = contact_sheet.tile(video, "t", height=32, strip=3)
    assert [frame.getpixel((16, 16)) for frame in strip.frames] == [(0, 0, 0), (80, 80, 80), (160, 160, 160)]
    checks = np.indices((8, 8)).sum(0)[None, ..., None].repeat(3, -1) % 2 * 255
    enlarged = contact_sheet.tile(checks.astype(np.uint8), "t", height=32).frames[0]
    assert {color for _, color in enlarged.getcolors() or ()} == {(0, 0, 0), (255, 255, 255)}


def test_a_border_is_drawn_around_the_images_of_its_cell_only() -> None:
    plain, marked = contact_sheet.tile(picture(), "t"), contact_sheet.tile(picture(), "t", border=(200, 30, 30))
    sheet = contact_sheet.grid([[plain, marked]])
    second = 8 + plain.width + 8
    assert sheet.getpixel((second, 8 + 100)) == (200, 30, 30) != sheet.getpixel((8, 8 + 100))


def test_parts_are_put_one_under_the_other() -> None:
    parts = [Image.new("RGB", (30, 10), "red"), Image.new("RGB", (50, 20), "blue")]
    made = contact_sheet.stack(parts)
    assert made.size == (50, 30) and made.getpixel((5, 5)) == (255, 0, 0) and made.getpixel((5, 15)) == (0, 0, 255)


def test_lines_under_a_cell_stay_within_its_width() -> None:
    for text in ("a " * 200, "x" * 500, "", "word " + "y" * 300):
        for line in contact_sheet._wrap(text, 150, 15):
            assert contact_sheet._font(15).getlength(line) <= 150
        assert len(contact_sheet._wrap(text, 150, 15)) <= 3


def test_a_title_of_a_column_is_wrapped_to_its_width() -> None:
    small = contact_sheet.tile(picture(), "t", height=64)
    short, long = (contact_sheet.grid([[small, small]], columns=(title, "b")) for title in ("a", "words and regions"))
    assert long.height > short.height and long.width == short.width
    gap = [long.getpixel((8 + small.width + x, y)) for x in range(8) for y in range(long.height - 64)]
    assert set(gap) == {(250, 250, 248)}
    over = contact_sheet.grid([[small, small]], columns=("words and regions", ""))
    assert over.height == short.height  # the place of the column without a title is taken
