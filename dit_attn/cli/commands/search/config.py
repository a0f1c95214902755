"""DOC"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    pass


PAGE = "search.html"


def reference_frames(options: dict[str, Any]) -> Any:
    """``--reference`` as uint8 (N, 3, H, W), of one size; ``None`` without it."""
    if "reference" not in options:
        return None
    from dit_attn.eval.folders import read_folder

    return read_folder(Path(options["reference"]).expanduser()).images(64)
