"""The tables of prompts followed after fine-tuning, made from the records.

``python -m tests._support.finetune_tables`` writes them.
"""

from __future__ import annotations

from dataclasses import dataclass

from tests._support.page_tables import PageTable, markdown
from tests._support.selector_tables import record_of

ARMS = {
    "dense": "dense",
    "rectified": "Rectified SpaAttn",
    "block-sparse": "block-sparse",
    "sla": "SLA",
    "mass": 'SLA without training, `combine="mass"`',
}


@dataclass(frozen=True)
class CurveTable(PageTable):
    """Held-out prompts followed, by arm and training steps.

    Attributes:
        record: under benchmarks/finetune.
    """

    record: str

    def text(self) -> str:
        """Return the table in Markdown, with 95 % Wilson intervals."""
        data = record_of(f"finetune/{self.record}")
        points, (density,) = data["config"]["points"], data["config"]["densities"]
        rows = []
        for arm, title in ARMS.items():
            names = [arm] if arm == "dense" else [f"{arm} {density:g} @ {point}" for point in points]
            found = [data["rows"].get(name) for name in names]
            cells = [
                _cell(row["whole_caption"]) if row else "" for row in (*found, *[None] * (len(points) - len(found)))
            ]
            rows.append([title, f"{next(filter(None, found))['computed']:.0%}", *cells])
        return markdown(["", "computed", *(f"{point} steps" for point in points)], rows)


def _cell(found: dict[str, object]) -> str:
    low, high = found["ci95"]  # type: ignore[misc]
    return f"{found['right']} of {found['of']} [{low:.2f}, {high:.2f}]"


TABLES = (CurveTable("finetune.md", "curves_tiny-video_0.1", "tiny-video_0.1"),)

if __name__ == "__main__":
    for table in TABLES:
        table.write()
