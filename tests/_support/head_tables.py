"""The tables of what is lost without some heads, made from the records.

``python -m tests._support.head_tables`` writes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from dit_attn.pipelines.compare.statistics import mean_figure
from tests._support.page_tables import PageTable, markdown
from tests._support.selector_tables import record_of

ARMS = {
    "ours, refit": "ours, refit",
    "ours, no refit": "ours, chosen without refit",
    "ours, refit removed": "ours, refit removed",
    "random, refit": "random, refit",
    "random, no refit": "random",
    "search, refit": "the first of a search, refit",
    "search, no refit": "the first of a search",
    "search, its last, refit": "the last of a search, refit",
    "search, its last, no refit": "the last of a search",
}


@dataclass(frozen=True)
class HeadTable(PageTable):
    """PSNR to dense outputs and prompts followed, by heads left out and way to choose them.

    Attributes:
        model: embedded model, and the captions of its profile where they are not 4.
    """

    model: str

    def text(self) -> str:
        """Return the table in Markdown; the last row compares pairs of the same prompt and noise."""
        data = record_of(f"heads/{self.model}")
        cells = {(row["arm"], row["dropped"]): row for row in data["table"]}
        counts = sorted({count for _, count in cells} - {0})
        total = data["rows"][0]["of"]
        rows = [
            [title, *(_cell(cells[arm, count]) for count in counts)]
            for arm, title in ARMS.items()
            if (arm, counts[0]) in cells
        ]
        rows.append(["ours over random, both refitted", *(_gain(data["rows"], count) for count in counts)])
        return markdown(["", *(f"{count} of {total}" for count in counts)], rows)


def _cell(row: dict[str, Any]) -> str:
    return f"{row['psnr']['value']:.1f} dB, {row['followed']['value']:.0%}"


def _gain(rows: list[dict[str, Any]], count: int) -> str:
    """Mean difference of a prompt's PSNR, over the random sets too, with its interval."""
    mine = {row["arm"]: row for row in rows if row["dropped"] == count}
    sets = [row["psnr"] for arm, row in mine.items() if arm.startswith("random") and arm.endswith(", refit")]
    changes = [[a - b for a, b in zip(mine["ours, refit"]["psnr"], each, strict=True)] for each in sets]
    prompts = [prompt for each in changes for prompt in range(len(each))]
    found = mean_figure([value for each in changes for value in each], prompts)
    assert found is not None
    low, high = found["ci95"]
    return f"{found['value']:+.1f} dB [{low:+.1f}, {high:+.1f}]"


MODELS = ("tiny-image", "tiny-joint", "tiny-image_24", "tiny-joint_24")
TABLES = tuple(HeadTable("methods/head_drop.md", f"heads_{model}", model) for model in MODELS)

if __name__ == "__main__":
    for table in TABLES:
        table.write()
