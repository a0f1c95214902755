"""Every kind of image people have, decoded to the colors it shows; broken ones refused with a reason."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from dit_attn.eval import media
from dit_attn.eval.media import Unreadable, decode, read_frames

RAMP = np.tile(np.linspace(0, 255, 48).round(), (32, 1))
COLORS = np.stack([RAMP, RAMP[:, ::-1], np.full_like(RAMP, 90)], -1).astype(np.uint8)


def shown(file: Path) -> np.ndarray:
    """(H, W, 3) of a single image."""
    frames = read_frames(file)
    assert frames.shape[:2] == (1, 3)
    return frames[0].permute(1, 2, 0).numpy()


def write_png16(file: Path, values: np.ndarray) -> None:
    """A 16-bit color PNG by hand: Pillow writes none."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    height, width = values.shape[:2]
    rows = b"".join(b"\0" + row.tobytes() for row in values.astype(">u2"))
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 16, 2, 0, 0, 0))
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b""))


@pytest.mark.parametrize("name", ["a.png", "a.bmp", "a.webp", "a.tif", "a.npy", "猫 schön.PNG"])
def test_color_comes_through_as_it_is(tmp_path: Path, name: str) -> None:
    file = tmp_path / name
    np.save(file, COLORS) if name.endswith("npy") else Image.fromarray(COLORS).save(file, lossless=True)
    assert (shown(file) == COLORS).all() and decode(file).changes == ()


@pytest.mark.parametrize("depth", [8, 16])
def test_gray_is_scaled_from_its_full_range(tmp_path: Path, depth: int) -> None:
    values = RAMP.astype(np.uint8) if depth == 8 else (RAMP * 257).astype(np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    assert np.abs(shown(tmp_path / "a.png").astype(int) - RAMP[..., None]).max() <= 1
    assert decode(tmp_path / "a.png").changes == ((media.GRAY,) if depth == 8 else (media.GRAY, media.DEEP))


def test_sixteen_bits_of_color_are_scaled_and_said(tmp_path: Path) -> None:
    write_png16(tmp_path / "a.png", COLORS.astype(np.uint16) * 257)
    assert np.abs(shown(tmp_path / "a.png").astype(int) - COLORS).max() <= 1
    assert decode(tmp_path / "a.png").changes == (media.DEEP,)


def test_floats_between_0_and_1_are_an_image(tmp_path: Path) -> None:
    Image.fromarray((RAMP / 255).astype(np.float32)).save(tmp_path / "a.tif")
    assert (shown(tmp_path / "a.tif")[..., 0] == RAMP).all()
    np.save(tmp_path / "a.npy", COLORS / 255)
    assert (shown(tmp_path / "a.npy") == COLORS).all()
    Image.fromarray(RAMP.astype(np.float32)).save(tmp_path / "b.tif")
    with pytest.raises(Unreadable, match=r"must be in \[0, 1\], got 0 to 255"):
        decode(tmp_path / "b.tif")


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_transparency_is_composed_on_white_and_said(tmp_path: Path, mode: str) -> None:
    alpha = np.where(np.arange(48) < 24, 0, 255) * np.ones((32, 1))
    glass = Image.fromarray(np.dstack([COLORS, alpha]).astype(np.uint8))
    if mode == "P":
        flat = Image.fromarray(np.where(np.arange(48) < 24, 0, 1).astype(np.uint8) * np.ones((32, 1), np.uint8))
        flat.putpalette([9, 9, 9, 200, 0, 0])
        flat.save(tmp_path / "a.png", transparency=0)
    else:
        glass.convert(mode).save(tmp_path / "a.png")
    found = shown(tmp_path / "a.png")
    assert (found[:, :24] == 255).all() and (found[:, 24:].mean() < 255)
    assert media.ALPHA in decode(tmp_path / "a.png").changes


def test_half_transparency_mixes_with_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 100, 200, 51)).save(tmp_path / "a.png")
    assert np.abs(shown(tmp_path / "a.png")[0, 0] - np.array([204, 224, 244])).max() <= 1


def test_an_alpha_channel_that_hides_nothing_is_no_change(tmp_path: Path) -> None:
    Image.fromarray(COLORS).convert("RGBA").save(tmp_path / "a.png")
    assert (shown(tmp_path / "a.png") == COLORS).all() and decode(tmp_path / "a.png").changes == ()


def test_palettes_cmyk_and_bits_become_the_colors_they_stand_for(tmp_path: Path) -> None:
    Image.fromarray(COLORS).quantize(64).save(tmp_path / "palette.png")
    Image.fromarray(COLORS).convert("CMYK").save(tmp_path / "cmyk.jpg", quality=95)
    Image.fromarray(RAMP.astype(np.uint8)).convert("1", dither=Image.Dither.NONE).save(tmp_path / "bits.png")
    assert np.abs(shown(tmp_path / "palette.png").astype(int) - COLORS).mean() < 5
    assert np.abs(shown(tmp_path / "cmyk.jpg").astype(int) - COLORS).mean() < 5
    assert decode(tmp_path / "cmyk.jpg").changes == (media.CMYK,)
    assert set(np.unique(shown(tmp_path / "bits.png"))) == {0, 255}


@pytest.mark.parametrize("tag, turns", [(1, 0), (6, -1), (3, 2), (8, 1)])
def test_images_stand_upright_as_exif_says(tmp_path: Path, tag: int, turns: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.fromarray(COLORS).save(tmp_path / "a.png", exif=exif)
    assert (shown(tmp_path / "a.png") == np.rot90(COLORS, turns)).all()
    assert decode(tmp_path / "a.png").changes == ((media.ROTATED,) if turns else ())


@pytest.mark.parametrize("ending", ["gif", "webp", "png", "npy"])
def test_animations_have_all_their_frames(tmp_path: Path, ending: str) -> None:
    frames = [np.full((16, 24, 3), value, np.uint8) for value in (0, 120, 250)]
    if ending == "npy":
        np.save(tmp_path / "a.npy", np.stack(frames))
    else:
        first, *rest = (Image.fromarray(frame) for frame in frames)
        first.save(tmp_path / f"a.{ending}", save_all=True, append_images=rest, duration=100, lossless=True)
    found = read_frames(tmp_path / f"a.{ending}")
    assert found.shape == (3, 3, 16, 24)
    assert np.abs(found[:, 0, 8, 8].numpy().astype(int) - [0, 120, 250]).max() <= 1


def test_a_gray_animation_keeps_its_width(tmp_path: Path) -> None:
    first, second = (Image.fromarray(np.roll(RAMP, shift).astype(np.uint8)) for shift in (0, 5))
    first.save(tmp_path / "a.gif", save_all=True, append_images=[second])
    assert read_frames(tmp_path / "a.gif").shape == (2, 3, 32, 48)


def test_only_the_first_page_of_a_document_is_taken_and_that_is_said(tmp_path: Path) -> None:
    pages = [Image.fromarray(COLORS), Image.fromarray(255 - COLORS)]
    pages[0].save(tmp_path / "a.tif", save_all=True, append_images=pages[1:])
    assert (shown(tmp_path / "a.tif") == COLORS).all() and decode(tmp_path / "a.tif").changes == (media.PAGES,)


@pytest.mark.parametrize(
    "array, words",
    [
        (np.full((8, 8, 3), np.nan), "NaN or infinity"),
        (np.full((2, 8, 8, 3), np.inf), "NaN or infinity"),
        (np.full((8, 8, 3), 2.0), r"must be in \[0, 1\], got 2 to 2"),
        (np.full((8, 8, 3), -0.5), r"must be in \[0, 1\], got -0.5"),
        (np.zeros((8, 8)), r"must be \(H, W, 3\) or \(F, H, W, 3\), got \(8, 8\)"),
        (np.zeros((0, 8, 3)), "got"),
        (np.zeros((8, 8, 3), np.int64), "must be uint8, or float"),
        (np.array([{}], dtype=object), "allow_pickle"),
    ],
)
def test_arrays_that_are_no_image_say_why(tmp_path: Path, array: np.ndarray, words: str) -> None:
    np.save(tmp_path / "a.npy", array)
    with pytest.raises(Unreadable, match=words):
        decode(tmp_path / "a.npy")


def write_video(file: Path, frames: int = 9) -> None:
    import imageio.v3 as iio

    noise = np.random.default_rng(0).integers(0, 256, (frames, 32, 48, 3), dtype=np.uint8)
    where = ["-movflags", "+faststart"]
    iio.imwrite(file, noise, plugin="FFMPEG", codec="libx264", fps=8, macro_block_size=2, output_params=where)


def test_a_video_that_was_cut_off_is_refused_and_not_taken_for_a_shorter_one(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4")
    assert read_frames(tmp_path / "a.mp4").shape == (9, 3, 32, 48)
    full = (tmp_path / "a.mp4").read_bytes()
    for share in (0.95, 0.8, 0.5, 0.1, 0.0):
        (tmp_path / "a.mp4").write_bytes(full[: int(share * len(full))])
        with pytest.raises(Unreadable, match=r"broken or cut off, ffmpeg says: .+$"):
            decode(tmp_path / "a.mp4")


@pytest.mark.parametrize("name", ["-y.mp4", "a:b.mp4", "猫 50%d.mp4"])
def test_videos_may_have_odd_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_video(tmp_path / "a.mp4", 3)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.mp4").rename(name)
    assert len(read_frames(Path(name))) == 3


@settings(deadline=None, max_examples=60)
@given(kind=st.sampled_from(["png", "jpg", "gif", "tif", "webp", "bmp", "npy"]), data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_broken_bytes_are_a_reason_and_never_a_crash(tmp_path_factory: pytest.TempPathFactory, kind, data) -> None:
    file = tmp_path_factory.getbasetemp() / f"broken.{kind}"
    small = COLORS[:8, :8]
    np.save(file, small) if kind == "npy" else Image.fromarray(small).save(file)
    full = bytearray(file.read_bytes())
    for place, value in data.draw(st.lists(st.tuples(st.integers(0, len(full) - 1), st.integers(0, 255)), max_size=6)):
        full[place] = value
    file.write_bytes(bytes(full[: data.draw(st.integers(0, len(full)))]))
    try:
        assert decode(file).frames.ndim == 4
    except Unreadable as error:
        assert str(error) and "\n" not in str(error)
