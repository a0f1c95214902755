"""The end of ``generate`` and ``edit``: contact sheet and ``run.json``, and what is printed of the items."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from dit_attn import contact_sheet
from dit_attn.cli import outputs, runner
from dit_attn.cli.run_record import ItemResult
from dit_attn.cli.subjects import write_page
from dit_attn.errors import RunStopped
from dit_attn.pipelines.run import Shard
from dit_attn.remote import Place, place_of

FILE = "run.json"


def write(
    report: dict[str, Any],
    folder: Place,
    tiles: Mapping[int, contact_sheet.Tile],
    argv: Sequence[str],
    as_json: bool,
    summary: Any = None,
    shard: Shard | None = None,
) -> None:
    """Write the contact sheet and the report, and print what became of the items of all processes.

    Args:
        report: of :func:`~dit_attn.cli.run_record.report`.
        folder: of the files.
        tiles: cells of the contact sheet; none, no sheet.
        argv: the command line.
        as_json: print the report alone.
        summary: of the methods, printed where there is one.
        shard: the part of the items that the report is of; it gets a file of its own.

    Raises:
        RunStopped: a file cannot be written; the items are reported all the same.
    """
    results = items_of(report)
    total = len(results) if shard is None else report["shard"]["items"]
    unwritten: RunStopped | None = None
    said: list[str] = []
    try:
        if tiles:
            outputs.write_image(contact_sheet.flow(list(tiles.values()), _heading(report)), folder / "sheet.png")
            said.append(f"contact sheet: {folder / 'sheet.png'}")
        outputs.write_json(report, folder / (FILE if shard is None else shard.file(FILE)))
        if shard is None and write_page(folder, results, argv):
            said.append(f"subjects: {folder / 'subjects.html'}")
    except RunStopped as error:  # the items are complete all the same: report them first
        unwritten = error
    if as_json:
        print(json.dumps(report, indent=1, default=str))
    else:
        print(*said, *([] if summary is None else [summary]), sep="\n", end="\n" if said or summary else "")
    runner.warn((text for item in results for text in item.warnings), total)
    failed = [item for item in results if item.status == "failed"]
    if failed:
        print(f"dit-attn: {len(failed)} of {len(results)} items failed:", file=sys.stderr)
        for item in failed:
            print(f"  {runner.describe_item(item, total)}", file=sys.stderr)
    if unwritten is not None:
        raise unwritten


def tiles_of(report: dict[str, Any]) -> dict[int, contact_sheet.Tile]:
    """Return a cell of the contact sheet for every item of two or more, from their files."""
    if len(report["items"]) < 2:
        return {}
    made = [(item, place_of(item.file)) for item in items_of(report) if item.file is not None]
    return {item.index: runner.tile_of(item, outputs.read_media(path)) for item, path in made}


def items_of(report: dict[str, Any]) -> list[ItemResult]:
    """Return the results of a report's items."""
    return [ItemResult(**{**item, "warnings": tuple(item["warnings"])}) for item in report["items"]]


def _heading(report: dict[str, Any]) -> str:
    names = ", ".join(method["method"] for method in report["methods"]) or "dense"
    return f"{report['model']}   {names}"
