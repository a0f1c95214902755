"""``dit-attn models``: the embedded models, and the families of real checkpoints that methods can be put on."""

from __future__ import annotations

import argparse
import json
from typing import Any

NOTE = (
    "Checkpoints of the Hugging Face Hub carry their own licences, some with limits on use or region: read the model's "
    "page before you use one. The embedded models share the licence of this package."
)


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``models`` and return its parser."""
    parser = subparsers.add_parser(
        "models",
        help="list the embedded models and the supported families",
        description="List the embedded models and the families of checkpoints that methods can be put on.",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Print the lists. Returns 0."""
    import dit_attn
    from dit_attn import models

    data: dict[str, Any] = {
        "embedded": [_entry(entry) for entry in models.available().values()],
        "families": dit_attn.supported(),
        "note": NOTE,
    }
    print(json.dumps(data, indent=1) if args.json else _text(data))
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


def _text(data: dict[str, Any]) -> str:
    lines = ["Embedded models (--model NAME; nothing is downloaded):", ""]
    for entry in data["embedded"]:
        lines += [
            f"  {entry['name']:<12} {entry['description']}",
            f"  {'':<12} {entry['pipeline']}, {entry['tokens']:,} tokens, {entry['megabytes']} MB{_quality(entry)}",
            f'  {"":<12} try: "{entry["example"]}"',
        ]
    lines += ["", "Families (--model org/name or a local diffusers folder):", ""]
    width = max(len(name) for name in data["families"])
    for name, row in data["families"].items():
        what = f"no methods: {row['refused']}" if row["refused"] else ", ".join(row["methods"])
        lines += [f"  {name:<{width}}  {row['models']}", f"  {'':<{width}}  {what}"]
    return "\n".join([*lines, "", NOTE])


def _quality(entry: dict[str, Any]) -> str:
    overall = (entry["figures"] or {}).get("all_attributes")
    return (
        f", {100 * overall['accuracy']:.0f} % of attributes right on {overall['of']} held-out checks" if overall else ""
    )
