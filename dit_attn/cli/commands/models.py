"""``dit-attn models``: the embedded models, and the families of checkpoints that methods can be enabled on."""

from __future__ import annotations

import argparse
import json
from typing import Any

from dit_attn.cli import options as flags
from dit_attn.cli import parser as parsers
from dit_attn.cli.progress import loading_libraries
from dit_attn.cli.table import Table, show

NOTE = (
    "Checkpoints of the Hugging Face Hub carry their own licences, some with limits on use or region: read the model's "
    "page before you use one. The embedded models share the licence of this package."
)
GROUPS = {"output": flags.only(flags.OUTPUT, "json")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``models``."""
    parsers.describe(
        parser,
        "models [--json]",
        "List the embedded models and the families of checkpoints that methods can be enabled on.",
    )
    parsers.add_groups(parser, GROUPS)


def run(args: argparse.Namespace) -> int:
    """Print the lists. Returns 0."""
    import dit_attn
    from dit_attn import models

    options = flags.merge(args, GROUPS)
    with loading_libraries(not options.get("json")):
        families = dit_attn.supported()
    data: dict[str, Any] = {
        "embedded": [_entry(entry) for entry in models.available().values()],
        "families": families,
        "note": NOTE,
    }
    if options.get("json"):
        print(json.dumps(data, indent=1))
    else:
        _show(data)
    return 0


def _entry(entry: Any) -> dict[str, Any]:
    training = entry.training
    return {
        "name": entry.name,
        "pipeline": entry.pipeline,
        "description": entry.description,
        "tokens": entry.tokens,
        "megabytes": round(entry.size_bytes / 1e6, 1),
        "call_defaults": entry.call_defaults,
        "example": entry.example,
        "steps_trained": entry.steps_trained,
        "figures": training.get("figures") or None,
    }


def _show(data: dict[str, Any]) -> None:
    embedded = Table(
        ("name", "what it makes", ">right", ">tokens", ">size", "pipeline", "try"),
        [
            (
                entry["name"], entry["description"], _score(entry), f"{entry['tokens']:,}",
                f"{entry['megabytes']} MB", entry["pipeline"], f'"{entry["example"]}"',
            )
            for entry in data["embedded"]
        ],
        title="Embedded models (--model NAME; nothing is downloaded):\n",
        folded=("what it makes", "try"),
    )  # fmt: skip
    slugs = sorted({slug for row in data["families"].values() for slug in row["methods"]})
    families = Table(
        ("family", "models", "methods"),
        [(name, row["models"], _methods(row, slugs)) for name, row in data["families"].items()],
        title="Families (--model org/name or a local diffusers folder), all of them with the methods "
        f"{', '.join(slugs)}, where nothing else is said:\n",
        folded=("models", "methods"),
    )
    show(embedded, "", families.without_empty(), "", NOTE)


def _methods(row: dict[str, Any], slugs: list[str]) -> str:
    """What is to be said of the methods of a family: nothing where it takes all of them."""
    if row["refused"]:
        return f"none: {row['refused']}"
    missing = [slug for slug in slugs if slug not in row["methods"]]
    if len(missing) > len(row["methods"]):
        return ", ".join(row["methods"])
    return f"all but {', '.join(missing)}" if missing else ""


def _score(entry: dict[str, Any]) -> str:
    """How many attributes of held-out captions an embedded model draws right, how many defects it paints, or edits."""
    figures = entry["figures"] or {}
    if overall := figures.get("all_attributes"):
        return f"{100 * overall['accuracy']:.0f} % of {overall['of']:,} attributes"
    if "held_out_pairs" in figures:
        groups = [figures[name] for name in ("seen_pairs", "held_out_pairs")]
        count, passed = sum(group["of"] for group in groups), sum(group["word"]["passed"] for group in groups)
        return f"{100 * passed / count:.0f} % of {count:,} defects"
    if "pieces" in figures:
        cells = figures["pieces"].values()
        count, right = sum(cell["of"] for cell in cells), sum(cell["right"] for cell in cells)
        return f"{100 * right / count:.0f} % of {count:,} edits"
    return "not recorded"
