"""``dit-attn eval``: metrics of a folder of pictures or clips, against references or captions."""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from dit_attn.cli.commands.eval.items import say_skipped
from dit_attn.errors import DitAttnError, unknown


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``eval`` and return its parser."""
    parser = subparsers.add_parser(
        "eval",
        help="measure a folder of images or clips against references or captions",
        description="Measure a folder. Pairs are matched by file name; captions come from --captions or from the JSON "
        "files that generate writes. Files that cannot be read are named, left out, and make the exit code 1.",
    )
    parser.add_argument("folder", type=Path, help="pictures or clips")
    parser.add_argument("--reference", type=Path, metavar="FOLDER", help="what to compare with")
    parser.add_argument("--captions", type=Path, metavar="FILE", help=".jsonl (file, prompt) or .txt (a line per file)")
    parser.add_argument(
        "--metric", "--metrics", action="append", metavar="NAME,NAME", help="metrics; repeatable (default: what fits)"
    )
    parser.add_argument("--size", type=int, metavar="N", help="bring everything to N x N pixels first")
    parser.add_argument("--inception", type=Path, metavar="FILE", help="weights of the Inception network")
    parser.add_argument("--clip", metavar="MODEL", help="folder or Hub name of a CLIP model")
    parser.add_argument("--lpips", default="alex", metavar="NET", help="backbone of LPIPS: alex, vgg, squeeze")
    parser.add_argument("--lpips-weights", type=Path, metavar="FILE", help="torchvision's weights of that backbone")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--export", choices=("vbench",), help="measure nothing; give the clips VBench's names instead")
    parser.add_argument(
        "--vbench-info", type=Path, metavar="FILE", help="VBench_full_info.json: count what its own prompts still lack"
    )
    parser.add_argument(
        "--output", "-o", type=Path, metavar="PATH", help="write the JSON here; with --export, the folder to fill"
    )
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure and print, or export. Returns 0, or 1 when files could not be read.

    Raises:
        DitAttnError: a folder, a metric or a network that is not there, too few samples, sizes that differ.
    """
    if args.export:
        from dit_attn.cli.commands.eval import export_vbench

        return export_vbench.run(args)
    from dit_attn.cli import load_pipeline, outputs
    from dit_attn.eval import folders
    from dit_attn.eval.extractors import CLIP_DEFAULT, Networks

    _check(args)
    device = load_pipeline.pick_device(args.device)
    inception, lpips = (file and file.expanduser() for file in (args.inception, args.lpips_weights))
    networks = Networks(inception, args.clip or CLIP_DEFAULT, args.lpips, lpips_weights=lpips)
    folder = folders.read_folder(args.folder, args.captions)
    reference = folders.read_folder(args.reference) if args.reference else None
    both = [folder] if reference is None else [folder, reference]
    skipped = [(str(one.path / name), why) for one in both for name, why in one.skipped]
    say_skipped(skipped)
    names = wanted(args.metric) or fitting(folder, reference)
    scores = [finite(measure(name, folder, reference, args.size, networks, device)) for name in names]
    record = {
        "folder": str(args.folder), "reference": str(args.reference) if args.reference else None, "size": args.size,
        "files": len(folder.names), "scores": scores,
        "changed": [
            {"what": what, "files": [str(one.path / name) for name in files]}
            for one in both for what, files in sorted(one.changes.items())
        ],
        "skipped": [{"file": file, "why": why} for file, why in skipped],
        "versions": {**_versions(), "resize": "bicubic, anti-aliased" if args.size else None},
    }  # fmt: skip
    if args.output:
        outputs.write_json(record, args.output.expanduser())
    print(json.dumps(record, indent=1, allow_nan=False) if args.json else table(record))
    return 1 if skipped else 0


def _check(args: argparse.Namespace) -> None:
    """Refuse what can be refused before anything is read, and make the place of the output."""
    from dit_attn.cli import outputs

    if args.vbench_info is not None:
        raise DitAttnError("--vbench-info belongs to --export vbench; add it, or leave --vbench-info out")
    wanted(args.metric)
    if args.size is not None and args.size < 1:
        raise DitAttnError(f"--size must be at least 1, got {args.size}")
    if args.output is not None:
        if args.output.expanduser().is_dir():
            raise DitAttnError(f"--output {args.output} is a folder; give a file, e.g. {args.output / 'scores.json'}")
        outputs.prepare_folder(args.output.expanduser().parent)


def wanted(given: list[str] | None) -> list[str]:
    """Names of metrics from the flags, each once.

    Raises:
        DitAttnError: an unknown one.
    """
    from dit_attn.cli.commands.eval.items import ITEM_METRICS
    from dit_attn.eval.metrics import METRICS

    names = [name.strip() for text in given or () for name in text.split(",")]
    for name in names:
        if name not in (*METRICS, *ITEM_METRICS):
            raise unknown("--metric", name, (*METRICS, *ITEM_METRICS))
    return list(dict.fromkeys(names))


def finite(found: dict[str, Any]) -> dict[str, Any]:
    """A score that JSON can hold: infinity and NaN become no value, and a caution that says so."""
    if math.isfinite(found["value"]):
        return found
    return {**found, "value": None, "caution": found.get("caution") or f"no number came out: {found['value']}"}


def fitting(folder: Any, reference: Any) -> list[str]:
    """Metrics that need no network and for which everything is there.

    Raises:
        DitAttnError: there is none.
    """
    from dit_attn.cli.commands.eval.items import judged

    names = ["psnr", "ssim"] if reference is not None and set(folder.names) & set(reference.names) else []
    names += ["temporal"] if folder.has_video and all(len(frames) > 2 for frames in folder.frames) else []
    names += ["verifier"] if any(judged(folder)) else []
    if not names:
        raise DitAttnError(
            "nothing can be measured without a reference of the same names, clips, or a network; give --reference "
            "FOLDER, or --metric fid, clip, ..."
        )
    return names


def measure(name: str, folder: Any, reference: Any, size: int | None, networks: Any, device: Any) -> dict[str, Any]:
    """One score as JSON values."""
    from dit_attn.cli.commands.eval.items import ITEM_METRICS
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


def table(record: dict[str, Any]) -> str:
    """The scores as text."""
    lines = [f"{record['files']} file{'s' * (record['files'] > 1)} of {record['folder']}"]
    for found in record["scores"]:
        better = found.get("better", "higher")
        value = "no value" if found["value"] is None else f"{found['value']:.4f}"
        spread = f" +- {found['spread']:.4f}" if found.get("spread") is not None else ""
        text = f"{found['label']:<24}{value:>12}{spread}  {better} is better, samples: {found['samples']}"
        if found.get("reference"):
            text += f" against {found['reference']}"
        if found.get("ci95"):
            text += f", 95 % {found['ci95'][0]:.3f} to {found['ci95'][1]:.3f}"
        lines.append(text)
        lines += [f"  caution: {found['caution']}"] if found.get("caution") else []
        lines += [f"  left out, only in one folder: {_some(found['unpaired'])}"] if found.get("unpaired") else []
        lines += [f"  left out, {found['need']}: {_some(found['unjudged'])}"] if found.get("unjudged") else []
    lines += [f"note: {one['what']}: {_some(one['files'])}" for one in record["changed"]]
    return "\n".join(lines)


def _some(names: list[str], most: int = 5) -> str:
    """The first names, and how many more there are."""
    rest = len(names) - most
    return ", ".join(names[:most]) + (f" and {rest} more" if rest > 0 else "")
