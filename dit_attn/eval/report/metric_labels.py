"""How the metrics of a comparison are called and written, in the page and in tables."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Column:
    """One metric in a table.

    Attributes:
        title: its heading.
        better: ``"higher"`` or ``"lower"``.
        digits: after the point.
    """

    title: str
    better: str
    digits: int = 3


COLUMNS = {
    "ms-ssim": Column("MS-SSIM to dense", "higher"),
    "lpips": Column("LPIPS to dense", "lower"),
    "fid": Column("FID to dense", "lower", 2),
    "kid": Column("KID to dense", "lower"),
    "clip": Column("CLIP score", "higher", 1),
    "fid-world": Column("FID-world to dense", "lower", 2),
    "kid-world": Column("KID-world to dense", "lower"),
    "clip-world": Column("CLIP-world score", "higher", 1),
    "saturation": Column("over-saturated pixels", "lower"),
    "artifact-rate": Column("share with artifacts", "lower"),
}
