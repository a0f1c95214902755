"""Images, masks and layouts of any kind are read alike, and each problem is one line."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from dit_attn.errors import DitAttnError
from dit_attn.pipelines.anomaly.pixels import read_image, read_mask
from dit_attn.pipelines.anomaly.sources import from_folders, from_tree

MASK = np.zeros((12, 16), bool)
MASK[3:7, 4:9] = True


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "bild größe.png"
    Image.fromarray(np.full((12, 16, 3), 90, np.uint8)).save(path)
    return path


def _palette():
    image = Image.fromarray(MASK.astype(np.uint8), "P")
    image.putpalette([0, 0, 0, 128, 0, 0])
    return image


def _alpha():
    return Image.fromarray(np.dstack([np.zeros((12, 16, 3), np.uint8), MASK * np.uint8(255)]), "RGBA")


@pytest.mark.parametrize(
    "mask",
    [
        Image.fromarray(MASK.astype(np.uint8) * 255),
        Image.fromarray(MASK.astype(np.uint8)),
        Image.fromarray(MASK.astype(np.uint16) * 65535),
        Image.fromarray(np.repeat(MASK[..., None], 3, 2).astype(np.uint8) * np.array([200, 0, 0], np.uint8)),
        Image.fromarray(MASK),
        _palette(),
        _alpha(),
    ],
    ids=["255", "01", "16-bit", "color", "1-bit", "palette", "alpha"],
)
def test_masks_of_every_kind_are_the_same_mask(mask, image, tmp_path):
    mask.save(tmp_path / "mask.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", image), MASK)


@pytest.mark.parametrize("turned_mask", [False, True])
def test_a_rotated_photograph_and_its_mask_stand_upright_together(turned_mask, tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels = np.repeat(MASK[..., None], 3, 2).astype(np.uint8) * 255
    Image.fromarray(pixels).save(tmp_path / "image.png", exif=exif)
    mask = Image.fromarray(MASK.astype(np.uint8) * 255)
    if turned_mask:  # drawn on what a viewer shows
        mask = mask.transpose(Image.Transpose.ROTATE_270)
    mask.save(tmp_path / "mask.png")
    upright = read_image(tmp_path / "image.png")
    assert upright.shape == (16, 12, 3)
    np.testing.assert_array_equal(read_mask(tmp_path / "mask.png", tmp_path / "image.png"), upright[..., 0] > 0)


def test_16_bit_images_and_transparent_ones_are_8_bit_colors(tmp_path):
    Image.fromarray(np.full((9, 9), 257 * 100, np.uint16)).save(tmp_path / "deep.png")
    assert (read_image(tmp_path / "deep.png") == 100).all()
    Image.new("RGBA", (9, 9), (10, 20, 30, 0)).save(tmp_path / "clear.png")
    assert (read_image(tmp_path / "clear.png") == 255).all()


@pytest.mark.parametrize(
    ("mask", "says"),
    [
        (np.zeros((12, 16), np.uint8), "mask.png is empty"),
        (np.full((12, 16), 255, np.uint8), "covers 100% of the image; if it is inverted"),
        (np.zeros((12, 12), np.uint8), "12 x 12 pixels and its image .* 16 x 12; they must be equal"),
        (None, "mask.png cannot be read"),
    ],
)
def test_a_mask_that_cannot_be_used_is_one_line(mask, says, image, tmp_path):
    path = tmp_path / "mask.png"
    path.write_bytes(b"\x89PNG broken") if mask is None else Image.fromarray(mask).save(path)
    with pytest.raises(DitAttnError, match=says) as caught:
        read_mask(path, image)
    assert "\n" not in str(caught.value)


def _images(folder, count, name="{:03d}.png", size=(16, 12)):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.new("RGB", size, (90, 90, 90)).save(folder / name.format(i))
    return folder


def _masks(folder, count, name="{:03d}_mask.png"):
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        Image.fromarray(MASK.astype(np.uint8) * 255).save(folder / name.format(i))
    return folder


def test_folders_of_any_name_with_types_below(tmp_path):
    normal = _images(tmp_path / "gut", 2)
    for kind in ("kratzer", "loch"):
        _images(tmp_path / "schlecht" / kind, 2)
        _masks(tmp_path / "masken" / kind, 2)
    source = from_folders(normal, tmp_path / "schlecht", tmp_path / "masken", "teil", "")
    source.check()
    assert source.pairs == [("teil", "kratzer"), ("teil", "loch")]
    assert len(source.shots) == 4 and len(source.normals["teil"]) == 2


def test_labelme_files_and_boxes_stand_for_masks(tmp_path):
    normal, defects = _images(tmp_path / "normal", 1), _images(tmp_path / "defects", 1)
    shape = {"shape_type": "rectangle", "points": [[4, 3], [8, 6]]}
    (defects / "000.json").write_text(json.dumps({"shapes": [shape]}))
    source = from_folders(normal, defects, None, "p", "d")
    np.testing.assert_array_equal(source.shots[0].read()[1], MASK)
    (tmp_path / "boxes.csv").write_text("image,x,y,width,height\n000.png,4,3,5,4\n")
    source = from_folders(normal, defects, tmp_path / "boxes.csv", "p", "d")
    np.testing.assert_array_equal(source.shots[0].read()[1], MASK)


def test_images_without_a_mask_are_named(tmp_path):
    normal, defects = _images(tmp_path / "n", 1), _images(tmp_path / "d", 5)
    masks = _masks(tmp_path / "m", 1)
    with pytest.raises(DitAttnError, match=r"4 defect images have no mask in .*: 001.png, 002.png, 003.png and 1 more"):
        from_folders(normal, defects, masks, "p", "d")


@pytest.mark.parametrize("layout", ["mvtec", "product", "visa", "folder"])
def test_trees_are_recognized_and_two_thirds_are_left_alone(layout, tmp_path):
    root = tmp_path if layout == "product" else tmp_path / "nut"
    if layout in ("mvtec", "product"):
        _images(root / "train/good", 2)
        _images(root / "test/good", 2)
        _images(root / "test/scratch", 7)
        _masks(root / "ground_truth/scratch", 7)
    elif layout == "visa":
        _images(root / "Data/Images/Normal", 2)
        _images(root / "Data/Images/Anomaly", 7)
        _masks(root / "Data/Masks/Anomaly", 7, "{:03d}.png")
    else:
        _images(root / "normal", 2)
        _images(root / "abnormal", 7)
        _masks(root / "mask", 7, "{:03d}.png")
    source = from_tree(tmp_path)
    source.check()
    learned, held = ({shot.image.name for shot in shots} for shots in (source.shots, source.held_out))
    assert learned == {"000.png", "001.png"} and len(held) == 5 and not learned & held
    assert len(from_tree(tmp_path, shots=1).shots) == 1
    with pytest.raises(DitAttnError, match="there is no product 'bolt'"):
        from_tree(tmp_path, products=["bolt"])


def test_another_layout_says_which_ones_are_known(tmp_path):
    _images(tmp_path / "pictures", 1)
    with pytest.raises(DitAttnError, match="neither as MVTec AD"):
        from_tree(tmp_path)
