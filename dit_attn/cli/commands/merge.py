"""``dit-attn merge``: one report from those of the parts of a run."""

from __future__ import annotations

import argparse
import shlex
from typing import Any

from dit_attn import files
from dit_attn.cli import options as flags
from dit_attn.cli import parser as parsers
from dit_attn.errors import DitAttnError
from dit_attn.remote import Place, check_reachable, is_address, names_in, parse_address, place_of

GROUPS = {
    "parts": (
        flags.Flag("folder", "the --output that all parts have written to, or that they were copied to",
                   default="required", positional=True, metavar="FOLDER", exists=True, address=True),
    ),
    "output": flags.only(flags.OUTPUT, "json"),
}  # fmt: skip
COMPARED = "results.json"  # of compare
_EXAMPLES = """examples:
  for i in 1 2; do
      dit-attn generate --model tiny-image --prompts prompts.txt \\
          --output outputs/mine --shard $i/2
  done
  dit-attn merge outputs/mine
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``merge``."""
    parsers.describe(
        parser,
        "merge FOLDER [--json]",
        "Join the reports of the parts that --shard made: run.json and the contact sheet of generate and edit; "
        "results.json, with the metrics of all items, and the page of compare.",
        _EXAMPLES,
    )
    parsers.add_groups(parser, GROUPS)


def run(args: argparse.Namespace) -> int:
    """Join the reports. Returns 0, 1 when items failed.

    Raises:
        DitAttnError: parts that are missing, damaged, overlap or belong to different jobs; files that are missing.
    """
    from dit_attn.cli import item_report
    from dit_attn.cli.shard_reports import read_shards

    options = flags.merge(args, GROUPS)
    folder = _folder(options["folder"])
    name, parts = read_shards(folder, (item_report.FILE, COMPARED))
    if name == COMPARED:
        from dit_attn.cli.commands.compare import command, shards

        return command.report(shards.joined(folder, parts), folder, bool(options.get("json")))
    report = join(folder, parts)
    tiles = item_report.tiles_of(report)
    item_report.write(report, folder, tiles, shlex.split(report["command"])[1:], bool(options.get("json")))
    return 1 if report["failed"] else 0


def _folder(given: str) -> Place:
    if not is_address(given):
        return files.user_path(given, "FOLDER")
    place = parse_address(given, "FOLDER")
    check_reachable(place, "FOLDER")
    return place


def join(folder: Place, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the report of all items.

    Raises:
        DitAttnError: an item's file is not in the folder.
    """
    present = names_in(folder)
    items = sorted((item for part in parts for item in part["items"]), key=lambda item: int(item["index"]))
    for item in items:
        if item["file"] is None:
            continue
        place = folder / place_of(item["file"]).name
        if place.name not in present:
            raise DitAttnError(f"{place} is missing; copy the files of all parts into {folder}")
        item["file"] = str(place)
    shared = {name: value for name, value in parts[0].items() if name != "shard"}
    counts = {name: sum(part[name] for part in parts) for name in ("done", "skipped", "failed")}
    devices = ", ".join(dict.fromkeys(part["device"] for part in parts))
    seconds = round(sum(part["seconds"] for part in parts), 3)
    return {**shared, **counts, "folder": str(folder), "seconds": seconds, "device": devices, "items": items}
