"""The tables of the results page, made from the records: ``python -m tests._support.result_tables`` writes them."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

from dit_attn import models
from dit_attn.cli.model_source import fingerprint
from dit_attn.models.rates import interval
from tests._support.page_tables import ROOT, markdown

COMPARISON = ("<!-- comparison: begin -->", "<!-- comparison: end -->")
BASELINES = ("<!-- baselines: begin -->", "<!-- baselines: end -->")
RECORDS = ("benchmarks/methods/tiny-image.json", "benchmarks/methods/tiny-video.json")
MODELS = ("tiny-image", "tiny-video", "tiny-joint")
OF_MODELS = {  # tables of pages, by the records that they are made of
    "[embedded models](models.md#how-well-they-do)": "models/{}",
    "[guidance](methods/softpag.md#measured), more captions": "guidance/{}_[0-9]*",
    "[guidance](methods/softpag.md#measured), all competitors": "guidance/{}",
    "[block-sparse](methods/block_sparse.md#measured)": "quality/{}",
    "the sparse methods, above": "methods/{}",
    "[Re-ttention](methods/re_ttention.md#measured), more densities": "readers/{}",
}
PAGE = "docs/results.md"
EXACT = "rectified-spaattn:density=0.25, exact where measured masks are refreshed"
EARLIER = " †"  # behind what was measured with weights that a model no longer ships with


def table() -> str:
    """Return the Markdown table of every row of the records."""
    found = rows()
    shown = {label: "dense" if label == "dense" else f"`{label}`" for label in found[0]}
    head = ["", "attention computed, % of dense", "images: PSNR to dense, dB", "prompt followed, %"]
    head += ["videos: PSNR to dense, dB", "prompt followed, %"]
    lines = []
    for label, title in shown.items():
        both = [record.get(label) for record in found]
        shares = ", ".join(f"{100 * row['attention_flops']['value']:.0f}" for row in both if row)
        cells = [cell for row in both for cell in ((_psnr(row), _followed(row)) if row else ("", ""))]
        lines.append([title, shares, *cells])
    return markdown(head, lines)


def rows() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the rows of the image and of the video record by label, settings by their names of today."""
    image, video = (json.loads((ROOT / name).read_text())["headline"] for name in RECORDS)
    return {_renamed(row["label"]): row for row in image}, {_renamed(row["label"]): row for row in video}


def _renamed(label: str) -> str:
    return EXACT if ",densities=" in label else label.replace(",select=", ",selector=")


def _psnr(row: dict[str, Any]) -> str:
    return _interval(row["psnr"], 1.0, 1) if row["psnr"] else ""


def _followed(row: dict[str, Any]) -> str:
    return _interval(_rate(row), 100.0, 0)


def _rate(row: dict[str, Any]) -> dict[str, Any]:
    """How often the prompt is followed, with Wilson's interval: resampling knows none where all are."""
    found = row["verifier"]["whole"]
    return {**found, "ci95": interval(round(found["value"] * found["n"]), found["n"])}


def _interval(estimate: dict[str, Any], factor: float, digits: int) -> str:
    low, high = (factor * value for value in estimate["ci95"])
    return f"{factor * estimate['value']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def baselines() -> str:
    """Return the Markdown table of the dense rows of every record, by model."""
    lines = [[title, *(_baseline(pattern.format(name)) for name in MODELS)] for title, pattern in OF_MODELS.items()]
    return markdown(["table", *(f"`{name}`" for name in MODELS)], lines)


def dense(pattern: str) -> dict[str, Any] | None:
    """Return how often dense follows the prompt in a record; ``None`` without one.

    ``value``, ``ci95``, ``n``, and ``earlier``: whether the record is of weights that the model no longer ships with.
    """
    for path in sorted((ROOT / "benchmarks").glob(f"{pattern}.json")):
        data = json.loads(path.read_text())
        if "whole_caption" in data:
            found = data["whole_caption"]
            return {"value": found["accuracy"], "ci95": found["ci95"], "n": found["of"], "earlier": False}
        found = next(_rate(row) for row in data["headline"] if row["label"] == "dense")
        return {**found, "earlier": data["model"]["fingerprint"] != shipped(data["model"]["model"])}
    return None


@cache
def shipped(name: str) -> str:
    """Return the fingerprint of the weights that a model ships with."""
    return fingerprint(models.info(name).folder)


def _baseline(pattern: str) -> str:
    found = dense(pattern)
    return f"{_interval(found, 100.0, 0)} of {found['n']}{EARLIER * found['earlier']}" if found else ""


def current(marks: tuple[str, str] = COMPARISON) -> str:
    """Return the table that the page shows now between two marks."""
    text = (ROOT / PAGE).read_text()
    return text[text.index(marks[0]) + len(marks[0]) : text.index(marks[1])].strip()


def main() -> None:
    """Write the tables between their marks."""
    for (begin, end), made in ((COMPARISON, table()), (BASELINES, baselines())):
        text = (ROOT / PAGE).read_text()
        start, stop = text.index(begin) + len(begin), text.index(end)
        (ROOT / PAGE).write_text(text[:start] + "\n" + made + "\n" + text[stop:])


if __name__ == "__main__":
    main()
