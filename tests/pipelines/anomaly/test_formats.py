"""What is written is what readers of each format find: masks to the pixel, empty labels for normal images."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy.ndimage import binary_fill_holes

from dit_attn.errors import DitAttnError
from dit_attn.pipelines.anomaly.exports import FORMATS, Pair, components, export, outline, run_lengths


def _mask(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    canvas = Image.new("L", (40, 30))
    for _ in range(2):
        x, y, w, h = rng.integers(0, 20), rng.integers(0, 14), rng.integers(6, 18), rng.integers(6, 14)
        ImageDraw.Draw(canvas).ellipse([int(x), int(y), int(x + w), int(y + h)], fill=255)
    return np.asarray(canvas) > 0


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pairs")
    pairs = []
    for i, defect in enumerate(("hole", "hole", "scratch")):
        pixels = np.random.default_rng(i).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        row = {"product": "nut", "defect": defect, "number": i, "seed": i, "scores": {}, "source_image": "n.png"}
        pairs.append(Pair(folder / f"{i}.png", _mask(i), "nut", defect, row))
    Image.new("RGB", (40, 30)).save(folder / "normal.png")
    for name in FORMATS:
        export(folder, name, pairs, {"nut": [folder / "normal.png"]})
    return folder, pairs


def _decode(lengths: list[int], height: int, width: int) -> np.ndarray:
    values = np.repeat(np.arange(len(lengths)) % 2, lengths)
    return values.reshape(width, height).T.astype(bool)


def _inside(corners: np.ndarray, height: int, width: int) -> np.ndarray:
    """Pixels whose centers lie in a polygon of upright and level edges, by the even-odd rule."""
    inside = np.zeros((height, width), bool)
    ys, xs = np.mgrid[:height, :width] + 0.5
    for (x0, y0), (_, y1) in zip(corners, np.roll(corners, -1, 0)):
        if y0 != y1:
            inside ^= (xs < x0) & (min(y0, y1) < ys) & (ys < max(y0, y1))
    return inside


@pytest.mark.parametrize("seed", range(6))
def test_run_lengths_and_outlines_give_the_mask_back(seed):
    mask = _mask(seed)
    np.testing.assert_array_equal(_decode(run_lengths(mask), *mask.shape), mask)
    for part in components(mask):
        np.testing.assert_array_equal(_inside(np.array(outline(part)), *part.shape), binary_fill_holes(part))


@pytest.mark.parametrize("mask", [np.zeros((4, 5), bool), np.ones((4, 5), bool), np.eye(5, dtype=bool)])
def test_run_lengths_of_nothing_everything_and_corners(mask):
    np.testing.assert_array_equal(_decode(run_lengths(mask), *mask.shape), mask)
    assert len(components(mask)) == int(mask.any())
    if mask.any():
        assert len(outline(components(mask)[0])) >= 4


def test_every_format_has_a_manifest_row_per_pair(written):
    folder, pairs = written
    for name in FORMATS:
        rows = [json.loads(line) for line in (folder / name / "manifest.jsonl").read_text().splitlines()]
        assert [row["seed"] for row in rows] == [0, 1, 2]
        for row, pair in zip(rows, pairs):
            assert (folder / name / row["image"]).read_bytes() == pair.image.read_bytes()


def test_the_mvtec_tree_and_the_folder_of_anomalib_match_by_sorted_order(written):
    folder, pairs = written
    tree = folder / "mvtec" / "nut"
    assert [p.name for p in sorted((tree / "train/good").iterdir())] == ["000.png"]
    for defect, count in (("hole", 2), ("scratch", 1)):
        images, masks = (sorted((tree / place / defect).iterdir()) for place in ("test", "ground_truth"))
        assert len(images) == len(masks) == count
        assert all(image.stem in mask.stem for image, mask in zip(images, masks))
        assert np.isin(np.asarray(Image.open(masks[0])), [0, 255]).all()
    images, masks = (sorted((folder / "folder" / place).iterdir()) for place in ("abnormal", "mask"))
    assert [p.name for p in images] == [p.name for p in masks] and len(images) == 3
    np.testing.assert_array_equal(np.asarray(Image.open(masks[1])) > 0, pairs[1].mask)


def test_normal_photographs_become_png_in_the_mvtec_tree_and_stay_as_they_are_elsewhere(written, tmp_path):
    _, pairs = written
    photograph = tmp_path / "good.JPG"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 40, 3), dtype=np.uint8)).save(photograph)
    for name in ("mvtec", "folder"):
        export(tmp_path, name, pairs[:1], {"nut": [photograph]})
    tree = tmp_path / "mvtec/nut/train/good/000.png"  # anomalib's MVTecAD passes over other suffixes
    np.testing.assert_array_equal(np.asarray(Image.open(tree)), np.asarray(Image.open(photograph)))
    assert (tmp_path / "folder/normal/nut_good_000.jpg").read_bytes() == photograph.read_bytes()


def test_flat_masks_are_255_or_1_and_black_for_normal_images(written):
    folder, _ = written
    for name, on in (("flat", 255), ("flat01", 1)):
        for path in sorted((folder / name / "mask").iterdir()):
            values = set(np.unique(np.asarray(Image.open(path))).tolist())
            assert values == ({0} if "good" in path.name else {0, on})


def test_coco_annotations_are_the_parts_of_the_masks(written):
    folder, pairs = written
    data = json.loads((folder / "coco" / "annotations.json").read_text())
    assert [one["name"] for one in data["categories"]] == ["nut+hole", "nut+scratch"]
    for image in data["images"]:
        own = [one for one in data["annotations"] if one["image_id"] == image["id"]]
        merged = np.zeros((30, 40), bool)
        for one in own:
            part = _decode(one["segmentation"]["counts"], 30, 40)
            x, y, w, h = one["bbox"]
            assert part[y : y + h, x : x + w].sum() == part.sum() == one["area"]
            merged |= part
        if not own:
            assert "good" in image["file_name"]
        else:
            number = [i for i, name in enumerate(("hole_000", "hole_001", "scratch_000")) if name in image["file_name"]]
            np.testing.assert_array_equal(merged, pairs[number[0]].mask)


def test_pycocotools_reads_the_same_masks(written):
    coco = pytest.importorskip("pycocotools.coco", reason="pycocotools is not installed")
    folder, pairs = written
    found = coco.COCO(str(folder / "coco" / "annotations.json"))
    assert [one["name"] for one in found.loadCats(found.getCatIds())] == ["nut+hole", "nut+scratch"]
    read = {}
    for image in found.loadImgs(found.getImgIds()):
        parts = found.loadAnns(found.getAnnIds(imgIds=image["id"]))
        assert all(found.annToMask(one).sum() == one["area"] for one in parts)
        read[image["file_name"]] = np.any([np.zeros((30, 40)), *map(found.annToMask, parts)], 0)
        assert bool(parts) == ("good" not in image["file_name"])
    for name, pair in zip(("nut_hole_000", "nut_hole_001", "nut_scratch_000"), pairs):
        np.testing.assert_array_equal(read[f"images/{name}.png"], pair.mask)


def test_yolo_labels_are_polygons_in_the_unit_square_and_empty_for_normal_images(written):
    folder, pairs = written
    assert (folder / "yolo/labels/nut_good_000.txt").read_text() == ""
    assert '1: "nut+scratch"' in (folder / "yolo/data.yaml").read_text()
    for name, pair in zip(("nut_hole_000", "nut_hole_001", "nut_scratch_000"), pairs):
        read = np.zeros((30, 40), bool)
        for line in (folder / f"yolo/labels/{name}.txt").read_text().splitlines():
            kind, *values = line.split()
            points = np.array(values, float).reshape(-1, 2)
            assert int(kind) == (pair.defect == "scratch") and points.min() >= 0 and points.max() <= 1
            read |= _inside((points * [40, 30]).round(), 30, 40)
        np.testing.assert_array_equal(read, binary_fill_holes(pair.mask))


def test_an_unknown_format_is_one_line(tmp_path):
    with pytest.raises(DitAttnError, match=r"unknown format 'coc'.+Did you mean .coco."):
        export(tmp_path, "coc", [], {})
