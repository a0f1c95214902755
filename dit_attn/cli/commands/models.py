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
        "steps_trained": training.get("steps_done"),
        "figures": training.get("figures") or None,
    }


def _show(data: dict[str, Any]) -> None:
    embedded = Table(
        ("name", "what it makes", "pipeline", ">tokens", ">size", "try"),
        [
            (
                entry["name"], entry["description"] + _quality(entry), entry["pipeline"], f"{entry['tokens']:,}",
                f"{entry['megabytes']} MB", f'"{entry["example"]}"',
            )
            for entry in data["embedded"]
        ],
        title="Embedded models (--model NAME; nothing is downloaded):\n",
        folded=("what it makes", "try"),
    )  # fmt: skip
    families = Table(
        ("family", "models", "methods"),
        [
            (name, row["models"], f"none: {row['refused']}" if row["refused"] else ", ".join(row["methods"]))
            for name, row in data["families"].items()
        ],
        title="Families (--model org/name or a local diffusers folder):\n",
        folded=("models", "methods"),
    )
    show(embedded, "", families, "", NOTE)


def _quality(entry: dict[str, Any]) -> str:
    overall = (entry["figures"] or {}).get("all_attributes")
    return (
        f", {100 * overall['accuracy']:.0f} % of attributes right on {overall['of']} held-out checks" if overall else ""
    )
