"""``dit-attn eval``: metrics of a folder of images or videos, against references or captions."""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from dit_attn.cli import options as flags
from dit_attn.cli import parser as parsers
from dit_attn.cli.commands.eval.items import ITEM_METRICS, judged, report_skipped
from dit_attn.cli.progress import loading_libraries
from dit_attn.cli.source_index import constant
from dit_attn.cli.table import Table, show
from dit_attn.errors import DitAttnError, unknown
from dit_attn.eval.listing import folders_with_media, media_files

GROUPS = {
    "files": (
        flags.Flag("folder", "images or videos", default="required", metavar="FOLDER", positional=True),
        flags.Flag("reference", "folder to compare with; pairs are matched by file name", metavar="FOLDER",
                   exists=True),
        flags.Flag("captions", ".jsonl (file, prompt) or .txt (a line per file)",
                   default="the JSON files that generate writes", metavar="FILE", exists=True),
    ),
    "metrics": (
        flags.Flag("metric", "metrics; repeatable", default="all that need no network and fit", many=True,
                   short=("--metrics",), metavar="NAME,NAME"),
        flags.Flag("size", "bring everything to N x N pixels first", int, "as it is", low=1),
        flags.Flag("inception", "weights of the Inception network", default="torchvision's cache", metavar="FILE",
                   exists=True),
        flags.Flag("clip", "folder or Hub name of a CLIP model", default="openai/clip-vit-large-patch14",
                   metavar="MODEL"),
        flags.Flag("lpips", "backbone of LPIPS: alex, vgg, squeeze", default="alex", metavar="NET"),
        flags.Flag("lpips-weights", "torchvision's weights of that backbone", default="its cache", metavar="FILE",
                   exists=True),
    ),
    "export": (
        flags.Flag("export", "measure nothing; give the videos the names of another benchmark", choices=("vbench",)),
        flags.Flag("vbench-info", "VBench_full_info.json: count what VBench's own prompts still lack", metavar="FILE",
                   exists=True),
    ),
    "output": (
        flags.Flag("output", "write the JSON here; with --export, the folder to fill", short=("-o",), metavar="PATH"),
        flags.Flag("json", "print JSON instead of a table", bool),
    ),
    "run": (flags.DEVICE,),
}  # fmt: skip
_EXAMPLES = """examples:
  dit-attn eval outputs/tiny-image-block-sparse \\
      --reference outputs/tiny-image-dense
  dit-attn eval outputs/wan --export vbench --output outputs/vbench
"""
_FILES = ("folder", "reference", "captions", "inception", "lpips_weights", "vbench_info", "output")


class Unit(NamedTuple):
    """How a score is written: ``digits`` after the point, times ``scale``, with ``name`` behind it."""

    digits: int = 3
    scale: float = 1.0
    name: str = ""

    def text(self, value: float) -> str:
        """Return a value with its unit."""
        return f"{self.scale * value:.{self.digits}f}{self.name}"


_PERCENT = Unit(0, 100.0, " %")
UNITS = {
    "psnr": Unit(1, name=" dB"),
    "fid": Unit(2),
    "fid-world": Unit(2),
    "is": Unit(2),
    "clip": Unit(1),
    "clip-world": Unit(1),
    "temporal": Unit(2),
    "verifier": _PERCENT,
    "saturation": Unit(1, 100.0, " %"),
    "artifact-rate": _PERCENT,
    "edge-width": Unit(2, name=" px"),
    "detail": _PERCENT,
}


@dataclass(frozen=True)
class EvalConfig:
    """One measurement of a folder, or one export.

    Attributes:
        folder: what is measured.
        reference: what it is compared with.
        captions: file of captions; ``None``: those of the JSON files.
        metrics: names; none: those that fit.
        size: bring everything to so many pixels; ``None`` leaves it.
        inception, clip, lpips, lpips_weights: networks of the metrics.
        export: ``"vbench"``, or ``None`` to measure.
        vbench_info: prompts of VBench.
        output: file of the record, or folder of the export.
        device: name.
        json: print JSON.
    """

    folder: Path
    reference: Path | None = None
    captions: Path | None = None
    metrics: tuple[str, ...] = ()
    size: int | None = None
    inception: Path | None = None
    clip: str | None = None
    lpips: str = "alex"
    lpips_weights: Path | None = None
    export: str | None = None
    vbench_info: Path | None = None
    output: Path | None = None
    device: str = "auto"
    json: bool = False

    @classmethod
    def from_options(cls, options: flags.Options) -> EvalConfig:
        """Check the flags.

        Raises:
            DitAttnError: an unknown metric, flags of measuring and of exporting together, an output that cannot be.
        """
        values = {**options.values, **{name: Path(text) for name, text in options.pick(*_FILES).items()}}
        values["metrics"] = tuple(wanted(values.pop("metric", None)))
        for name in ("inception", "lpips_weights", "vbench_info", "output"):
            if name in values:
                values[name] = values[name].expanduser()
        config = cls(**values)
        if config.export:
            for name in ("reference", "metrics", "size", "inception", "clip"):
                if getattr(config, name):
                    flag = name.removesuffix("s")
                    raise DitAttnError(f"--{flag} measures, --export does not; run them one after the other")
        elif config.vbench_info is not None:
            raise DitAttnError("--vbench-info belongs to --export vbench; add it, or leave --vbench-info out")
        elif config.output is not None and config.output.is_dir():
            raise DitAttnError(
                f"--output {config.output} is a folder; give a file, e.g. {config.output / 'scores.json'}"
            )
        if not config.export:
            for folder in filter(None, (config.folder, config.reference)):
                media_files(folder)
        return config


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``eval``."""
    parsers.describe(
        parser,
        "eval FOLDER [--reference FOLDER] [options]",
        "Measure a folder of images or videos. Files that cannot be read are named, left out, and make the exit "
        "code 1.",
        _EXAMPLES,
    )
    parsers.add_groups(parser, GROUPS)


def run(args: argparse.Namespace) -> int:
    """Measure and print, or export. Returns 0, or 1 when files could not be read.

    Raises:
        DitAttnError: a folder, a metric or a network that is not there, too few samples, sizes that differ.
    """
    config = EvalConfig.from_options(flags.merge(args, GROUPS))
    if config.export:
        from dit_attn.cli.commands.eval import export_vbench

        return export_vbench.run(config.folder, config.captions, config.output, config.vbench_info, config.json)
    return _measure_all(config)


def _measure_all(config: EvalConfig) -> int:
    from dit_attn.cli import load_pipeline, outputs

    with loading_libraries(not config.json):
        from dit_attn.eval import folders
        from dit_attn.eval.extractors import CLIP_DEFAULT, Networks

    if config.output:
        outputs.prepare_folder(config.output.parent)
    device = load_pipeline.pick_device(config.device)
    networks = Networks(config.inception, config.clip or CLIP_DEFAULT, config.lpips, lpips_weights=config.lpips_weights)
    folder = folders.read_folder(config.folder, config.captions)
    reference = folders.read_folder(config.reference) if config.reference else None
    both = [folder] if reference is None else [folder, reference]
    skipped = [(str(one.path / name), why) for one in both for name, why in one.skipped]
    report_skipped(skipped)
    names = config.metrics or fitting(folder, reference)
    scores = [finite(measure(name, folder, reference, config.size, networks, device)) for name in names]
    record = {
        "folder": str(config.folder), "reference": str(config.reference) if config.reference else None,
        "size": config.size, "files": len(folder.names), "scores": scores,
        "changed": [
            {"what": what, "files": [str(one.path / name) for name in files]}
            for one in both for what, files in sorted(one.changes.items())
        ],
        "skipped": [{"file": file, "why": why} for file, why in skipped],
        "versions": {**_versions(), "resize": "bicubic, anti-aliased" if config.size else None},
    }  # fmt: skip
    if config.output:
        outputs.write_json(record, config.output)
    if config.json:
        print(json.dumps(record, indent=1, allow_nan=False))
    else:
        _show(record)
    return 1 if skipped else 0


def wanted(given: list[str] | None) -> list[str]:
    """Return names of metrics from the flags, each once.

    Raises:
        DitAttnError: an unknown one.
    """
    known = (*constant("dit_attn.eval.metrics", "METRICS"), *ITEM_METRICS)
    names = [name.strip() for text in given or () for name in text.split(",")]
    for name in names:
        if name not in known:
            raise unknown("--metric", name, known)
    return list(dict.fromkeys(names))


def finite(found: dict[str, Any]) -> dict[str, Any]:
    """Make a score that JSON can hold: infinity and NaN become no value, and a caution that says so."""
    if math.isfinite(found["value"]):
        return found
    return {**found, "value": None, "caution": found.get("caution") or f"no number came out: {found['value']}"}


def fitting(folder: Any, reference: Any) -> list[str]:
    """Return the metrics that need no network and for which everything is there.

    Raises:
        DitAttnError: there is none.
    """
    names = ["psnr", "ssim"] if reference is not None and set(folder.names) & set(reference.names) else []
    names += ["temporal"] if folder.has_video and all(len(frames) > 2 for frames in folder.frames) else []
    names += ["verifier"] if any(judged(folder)) else []
    if not names:
        inner = folders_with_media(folder.path)
        remedy = f"{folder.path} may not be the folder you mean: {inner}" if inner else (
            "give --reference FOLDER, or --metric fid, clip, ..."
        )  # fmt: skip
        raise DitAttnError(
            f"nothing can be measured without a reference of the same names, videos, or a network; {remedy}"
        )
    return names


def measure(name: str, folder: Any, reference: Any, size: int | None, networks: Any, device: Any) -> dict[str, Any]:
    """Compute one score, as JSON values."""
    from dit_attn.eval import folders
    from dit_attn.eval.metrics import METRICS, score

    if name in ITEM_METRICS:
        return {"metric": name, **ITEM_METRICS[name](folder, reference)}
    if METRICS[name].needs == "pairs" and reference is not None:
        ours, theirs, alone = folders.pairs(folder, reference)
        _same_frames(ours, theirs, size)
        images, exact = ours.images(size), theirs.images(size)
        found = score(name, images, exact, None, networks, device).to_dict()
        equal = int((images == exact).flatten(1).all(1).sum())
        if equal:
            found["caution"] = f"{equal} of {len(images)} images equal their reference to the last bit"
        return found | ({"unpaired": alone} if alone else {})
    captions = None
    if METRICS[name].needs == "captions":
        bare = [n for n, caption in zip(folder.names, folder.captions) if caption is None]
        if bare:
            count = f"{len(bare)} of {len(folder.names)} have none, first {bare[0]}"
            raise DitAttnError(f"{name} needs a caption for every file, {count}; give --captions FILE")
        captions = [text for text, frames in zip(folder.captions, folder.frames) for _ in frames]
    others = None if reference is None else reference.images(size)
    return score(name, folder.images(size), others, captions, networks, device).to_dict()


def _same_frames(ours: Any, theirs: Any, size: int | None) -> None:
    for name, a, b in zip(ours.names, ours.frames, theirs.frames):
        if len(a) != len(b):
            raise DitAttnError(
                f"{name} has {len(a)} frames in {ours.path} and {len(b)} in {theirs.path}; cut them to one length"
            )
        if size is None and a.shape != b.shape:
            here, there = (f"{x.shape[3]} x {x.shape[2]}" for x in (a, b))
            raise DitAttnError(
                f"{name} is {here} in {ours.path} and {there} in {theirs.path}; give --size N to bring them to one"
            )


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "torchmetrics")}


def _show(record: dict[str, Any]) -> None:
    rows, notes = [], []
    for found in record["scores"]:
        label, unit = found["label"], UNITS.get(found["metric"], Unit())
        value = "no value" if found["value"] is None else unit.text(found["value"])
        spread = unit.text(found["spread"]) if found.get("spread") is not None else ""
        ci95 = " to ".join(map(unit.text, found["ci95"])) if found.get("ci95") else ""
        against = str(found["reference"]) if found.get("reference") else ""
        rows.append((label, value, spread, ci95, found.get("better", "higher"), str(found["samples"]), against))
        notes += [f"{label}: caution: {found['caution']}"] if found.get("caution") else []
        alone, unjudged = found.get("unpaired"), found.get("unjudged")
        notes += [f"{label}: left out, only in one folder: {_some(alone)}"] if alone else []
        notes += [f"{label}: left out, {found['need']}: {_some(unjudged)}"] if unjudged else []
    notes += [f"note: {one['what']}: {_some(one['files'])}" for one in record["changed"]]
    titles = ("metric", ">value", ">+-", ">95 %", "better", ">samples", "against")
    count = record["files"]
    show(f"{count} file{'s' * (count > 1)} of {record['folder']}", Table(titles, rows).without_empty(), *notes)


def _some(names: list[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
