"""Exported pairs in anomalib's own data modules: ``make test-readers``.

Writes synthetic pairs with the exporters of ``anomaly generate``, lets anomalib's ``MVTecAD`` and ``Folder`` load them
in an environment of its own, and compares counts, splits, labels, pixels and masks. The result is one JSON file.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from dit_attn.pipelines.anomaly.exports import Pair, export
from dit_attn.pipelines.anomaly.pixels import read_image
from tests._support.other_environment import ROOT, write_record
from tests.readers.anomalib_reader import digest

FORMATS = ("mvtec", "folder")
KINDS = (("nut", "hole"), ("nut", "hole-deep"), ("nut", "scratch"), ("leather", "stain"))  # names that sort closely
PAIRS, NORMALS = 12, 10  # of every kind, of every product; 12: names of two digits
_SIZE = (48, 40)  # width, height


def mask_of(number: int) -> np.ndarray:
    """A mask (H, W) bool: two blobs, or a line of one pixel that reaches the border."""
    rng = np.random.default_rng(number)
    canvas = Image.new("L", _SIZE)
    draw = ImageDraw.Draw(canvas)
    if number % 3 == 0:
        draw.line([0, int(rng.integers(40)), 47, int(rng.integers(40))], fill=255, width=1)
    else:
        for _ in range(2):
            x, y = (int(value) for value in rng.integers(0, 30, 2))
            draw.ellipse([x, y, x + 8, y + 6], fill=255)
    return np.asarray(canvas) > 0


def write_pairs(folder: Path) -> tuple[list[Pair], dict[str, list[Path]]]:
    """Write images as a run leaves them, and normal images as users have them: JPEG, BMP, gray, capital suffixes."""
    folder.mkdir(parents=True)
    pairs = []
    for number, (product, defect) in enumerate(KINDS * PAIRS):
        pixels = np.random.default_rng(number).integers(0, 255, (*_SIZE[::-1], 3), dtype=np.uint8)
        image = folder / f"{number:03d}.png"
        Image.fromarray(pixels).save(image)
        pairs.append(Pair(image, mask_of(number), product, defect, {"number": number}))
    normals: dict[str, list[Path]] = {product: [] for product, _ in KINDS}
    for product, images in normals.items():
        for number in range(NORMALS):
            gray = np.random.default_rng(number).integers(0, 255, _SIZE[::-1], dtype=np.uint8)
            image = folder / f"{product} {number}{('.JPG', '.png', '.bmp')[number % 3]}"
            Image.fromarray(gray).save(image)
            images.append(image)
    return pairs, normals


def expected(folder: Path, pairs: list[Pair], normals: dict[str, list[Path]]) -> dict[str, dict[str, dict[str, Any]]]:
    """What every data module should give, by its name and the file."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    by_pixels = {digest(read_image(pair.image)): pair for pair in pairs}
    for path in sorted(path for name in FORMATS for path in (folder / name).rglob("*.*") if path.suffix != ".jsonl"):
        name = path.relative_to(folder).as_posix()
        if "mask" in name or "ground_truth" in name:
            continue
        module = "/".join(name.split("/")[:2]) if name.startswith("mvtec") else "folder"
        pixels = read_image(path)
        pair = by_pixels.get(digest(pixels))
        mask = np.zeros(pixels.shape[:2], bool) if pair is None else pair.mask
        label = {"label": int(pair is not None), "pixels": digest(pixels), "mask": digest(mask)}
        found.setdefault(module, {})[name] = label
    count = sum(len(one) for one in found.values())
    if count != len(FORMATS) * (len(pairs) + sum(map(len, normals.values()))):
        raise SystemExit(f"the exporters wrote {count} images, which is not every pair and normal image once a format")
    return found


def compare(wanted: dict[str, dict[str, Any]], given: dict[str, Any]) -> dict[str, Any]:
    """Counts of one data module, and the items that are not as written."""
    by_file = {item["file"]: item for item in given["items"]}
    problems = [f"{file}: not loaded" for file in wanted if file not in by_file]
    problems += [f"{file}: never written as an image" for file in by_file if file not in wanted]
    if len(by_file) != len(given["items"]):
        problems.append("an image is loaded twice")
    for file, item in by_file.items():
        for key, value in wanted.get(file, {}).items():
            if item[key] != value:
                problems.append(f"{file}: {key} {item[key]}, written {value}")
        if item["label"] and item["split"] != "test":
            problems.append(f"{file}: a defect in {item['split']}")
    shapes = [shape for shape in given["batches"] if shape[1:] != [*_SIZE[::-1]]]
    problems += [f"a batch of masks is {shape}" for shape in shapes]
    labels = [item["label"] for item in given["items"]]
    masks = sum(bool(item["label"]) and item["mask"] == wanted.get(file, {}).get("mask") for file, item in
                by_file.items())  # fmt: skip
    return {"normal": labels.count(0), "abnormal": labels.count(1), "masks_equal": masks, "problems": problems}


def read(python: Path, folder: Path) -> dict[str, Any]:
    """What anomalib finds, by the interpreter of its environment."""
    command = [str(python), "-m", "tests.readers.anomalib_reader", str(folder)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"anomalib ended with {done.returncode}; see above")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    """Export, load, compare and write the JSON file; 1 where something differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", type=Path, required=True, help="interpreter of an environment with anomalib")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/readers_anomalib.json"))
    options = parser.parse_args()
    python = options.python.absolute()  # a link, which must not be followed out of its environment
    with tempfile.TemporaryDirectory(prefix="readers-") as scratch:
        folder = Path(scratch, "parts 01")
        pairs, normals = write_pairs(folder / "made")
        for name in FORMATS:
            export(folder, name, pairs, normals)
        wanted, found = expected(folder, pairs, normals), read(python, folder)
    results = {name: compare(wanted.get(name, {}), one) for name, one in found["modules"].items()}
    missing = sorted(set(wanted) - set(results))
    write_record(
        options.output,
        "make test-readers",
        {
            "what": "pairs in the formats mvtec and folder of `anomaly generate`, loaded by anomalib's MVTecAD and "
            "Folder; labels, pixels and masks are compared one by one",
            "versions": found["versions"], "results": results,
        },
    )  # fmt: skip
    for name, result in results.items():
        print(f"{name}: {result['normal']} normal, {result['abnormal']} abnormal, {result['masks_equal']} masks equal")
        for problem in result["problems"][:20]:
            print(f"  {problem}")
    return int(bool(missing) or any(result["problems"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
