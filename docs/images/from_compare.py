"""Draw one contact sheet from the folder of a ``dit-attn compare`` run: prompts are rows, competitors are columns.

python docs/images/from_compare.py outputs/compare docs/images/seg.png --items 0 3 --show "dense=plain guidance 2"
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image

from dit_attn.contact_sheet import Tile, grid
from dit_attn.eval.media import decode


def main() -> None:
    """Draw the sheet that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the --output of dit-attn compare")
    parser.add_argument("image", type=Path, help="file to write")
    parser.add_argument("--items", type=int, nargs="+", default=[0, 1, 2, 3], help="items to show, by number")
    parser.add_argument("--show", nargs="+", required=True, metavar="FOLDER=TITLE", help="competitors, in order")
    parser.add_argument("--height", type=int, default=192, help="pixels of an image (default: 192)")
    parser.add_argument("--frames", type=int, default=4, help="frames of a video (default: 4)")
    args = parser.parse_args()
    columns = dict(text.split("=", 1) for text in args.show)
    rows = [
        [tile(args.folder / name, item, args.height, args.frames, titled=not i) for i, name in enumerate(columns)]
        for item in args.items
    ]
    grid(rows, columns=tuple(columns.values())).save(args.image, optimize=True)


def tile(folder: Path, item: int, height: int, frames: int, titled: bool) -> Tile:
    """Return one item of one competitor.

    Args:
        folder: the competitor's folder.
        item: number of the item.
        height: pixels of its frames.
        frames: frames to show of a video, evenly spaced.
        titled: whether its prompt stands under it.
    """
    sidecar = next(folder.glob(f"{item:04d}_*.json"))
    media = next(path for path in folder.glob(f"{item:04d}_*") if path.suffix in (".png", ".mp4"))
    pixels = decode(media).frames
    count = min(frames, len(pixels))
    picks = [round(i * (len(pixels) - 1) / max(1, count - 1)) for i in range(count)]
    images = [Image.fromarray(pixels[pick].permute(1, 2, 0).numpy()) for pick in picks]
    size = (images[0].width * height // images[0].height, height)
    resized = tuple(image.resize(size, Image.Resampling.NEAREST) for image in images)
    return Tile(resized, json.loads(sidecar.read_text())["prompt"] if titled else "")


if __name__ == "__main__":
    main()
