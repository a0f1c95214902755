"""What anomalib finds in exported folders, as JSON; runs in anomalib's own environment, without this package.

``python -m tests.readers.anomalib_reader FOLDER`` prints, for every data module, its items: file, split, label, and the
digests of pixels and mask.
"""

from __future__ import annotations

import hashlib
import json
import sys
import sysconfig
from pathlib import Path
from typing import Any

import numpy as np

from tests._support.torchvision import declare_operators


def digest(values: np.ndarray) -> str:
    """Shape and digest of an array of bytes."""
    return f"{values.shape} {hashlib.sha256(np.ascontiguousarray(values, np.uint8).tobytes()).hexdigest()}"


def items(module: Any, folder: Path) -> list[dict[str, Any]]:
    """Every item of a data module after its ``setup``, as its data sets give them."""
    module.setup()
    found = []
    for split in ("train", "test"):
        data = getattr(module, f"{split}_data")
        for item in (data[i] for i in range(len(data))):
            pixels = (item.image.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
            found.append({
                "file": Path(item.image_path).relative_to(folder).as_posix(), "split": split,
                "label": int(item.gt_label), "pixels": digest(pixels),
                "mask": "" if item.gt_mask is None else digest(item.gt_mask.numpy()),
            })  # fmt: skip
    return found


def batches(module: Any) -> list[list[int]]:
    """Shapes of the masks of every batch of the test loader: what a model is given."""
    return [list(batch.gt_mask.shape) for batch in module.test_dataloader()]


def main() -> int:
    """Load the folders ``mvtec`` and ``folder`` below the given one and print what is found."""
    declare_operators(Path(sysconfig.get_path("purelib")))
    import anomalib
    import lightning
    import torch
    import torchvision
    from anomalib.data import Folder, MVTecAD

    folder = Path(sys.argv[1])
    loading: dict[str, Any] = {"val_split_mode": "none", "num_workers": 0, "eval_batch_size": 2}
    modules = {
        f"mvtec/{place.name}": MVTecAD(root=folder / "mvtec", category=place.name, **loading)
        for place in sorted((folder / "mvtec").iterdir()) if place.is_dir()
    }  # fmt: skip
    modules["folder"] = Folder(
        "pairs", root=folder / "folder", normal_dir="normal", abnormal_dir="abnormal", mask_dir="mask", **loading
    )
    found = {name: {"items": items(module, folder), "batches": batches(module)} for name, module in modules.items()}
    libraries = (anomalib, torch, torchvision, lightning)
    versions = {library.__name__: library.__version__ for library in libraries}
    print(json.dumps({"versions": versions, "modules": found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
