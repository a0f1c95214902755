"""``dit-attn eval``: metrics of a folder of pictures or clips, against references or captions."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

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
    parser.add_argument("--metric", action="append", metavar="NAME", help="metric; repeatable (default: what fits)")
    parser.add_argument("--size", type=int, metavar="N", help="bring everything to N x N pixels first")
    parser.add_argument("--inception", type=Path, metavar="FILE", help="weights of the Inception network")
    parser.add_argument("--clip", metavar="MODEL", help="folder or Hub name of a CLIP model")
    parser.add_argument("--lpips", default="alex", metavar="NET", help="backbone of LPIPS: alex, vgg, squeeze")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N (default: auto)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument("--output", "-o", type=Path, metavar="FILE", help="write the JSON here")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure and print. Returns 0, or 1 when files could not be read.

    Raises:
        DitAttnError: a folder, a metric or a network that is not there, too few samples, sizes that differ.
    """
    from dit_attn.cli import load, outputs
    from dit_attn.eval import folders
    from dit_attn.eval.extractors import CLIP_DEFAULT, Networks
    from dit_attn.eval.metrics import METRICS

    for name in args.metric or ():
        if name not in (*METRICS, *CLIP_METRICS, "verifier"):
            raise unknown("--metric", name, (*METRICS, *CLIP_METRICS, "verifier"))
    if args.size is not None and args.size < 1:
        raise DitAttnError(f"--size must be at least 1, got {args.size}")
    device = load.pick_device(args.device)
    networks = Networks(args.inception, args.clip or CLIP_DEFAULT, args.lpips)
    folder = folders.read_folder(args.folder, args.captions)
    reference = folders.read_folder(args.reference) if args.reference else None
    skipped = [(folder.path / name, why) for name, why in folder.skipped]
    if reference is not None:
        skipped += [(reference.path / name, why) for name, why in reference.skipped]
    names = args.metric or fitting(folder, reference)
    scores = [measure(name, folder, reference, args.size, networks, device) for name in names]
    record = {
        "folder": str(args.folder), "reference": str(args.reference) if args.reference else None, "size": args.size,
        "files": len(folder.names), "scores": scores,
        "skipped": [{"file": str(file), "why": why} for file, why in skipped],
        "versions": {**_versions(), "resize": "bicubic, anti-aliased" if args.size else None},
    }  # fmt: skip
    if args.output:
        outputs.prepare_folder(args.output.expanduser().parent)
        outputs.write_json(record, args.output.expanduser())
    print(json.dumps(record, indent=1) if args.json else table(record))
    for file, why in skipped:
        print(f"dit-attn: left out {file}: {why}", file=sys.stderr)
    return 1 if skipped else 0


CLIP_METRICS = {"temporal": "smoothness of motion in clips, 1 is steady, below 0 is flicker"}


def fitting(folder: Any, reference: Any) -> list[str]:
    """Metrics that need no network and for which everything is there.

    Raises:
        DitAttnError: there is none.
    """
    names = ["psnr", "ssim"] if reference is not None and set(folder.names) & set(reference.names) else []
    names += ["temporal"] if folder.clips and all(len(frames) > 2 for frames in folder.frames) else []
    names += ["verifier"] if _judged(folder) else []
    if not names:
        raise DitAttnError(
            "nothing can be measured without a reference of the same names, clips, or a network; give --reference "
            "FOLDER, or --metric fid, clip, ..."
        )
    return names


def measure(name: str, folder: Any, reference: Any, size: int | None, networks: Any, device: Any) -> dict[str, Any]:
    """One score as JSON values."""
    from dit_attn.eval import errors, folders
    from dit_attn.eval.metrics import METRICS, score

    if name == "temporal":
        short = next((n for n, frames in zip(folder.names, folder.frames) if len(frames) < 3), None)
        if short is not None:
            raise DitAttnError(f"temporal needs clips of at least 3 frames, {short} has fewer; leave it out")
        values = [errors.temporal_consistency(frames) for frames in folder.frames]
        return {"metric": name, "label": name, "value": sum(values) / len(values), "samples": len(values)}
    if name == "verifier":
        return _verifier(folder)
    if METRICS[name].needs == "pairs" and reference is not None:
        ours, theirs, alone = folders.pairs(folder, reference)
        _same_frames(ours, theirs)
        found = score(name, ours.images(size), theirs.images(size), None, networks, device).to_dict()
        return found | ({"unpaired": alone} if alone else {})
    captions = None
    if METRICS[name].needs == "captions":
        nameless = next((n for n, caption in zip(folder.names, folder.captions) if caption is None), None)
        if nameless is not None:
            raise DitAttnError(f"{name} needs a caption for every file, {nameless} has none; give --captions FILE")
        captions = [text for text, frames in zip(folder.captions, folder.frames) for _ in frames]
    others = None if reference is None else reference.images(size)
    return score(name, folder.images(size), others, captions, networks, device).to_dict()


def _same_frames(ours: Any, theirs: Any) -> None:
    for name, a, b in zip(ours.names, ours.frames, theirs.frames):
        if len(a) != len(b):
            raise DitAttnError(
                f"{name} has {len(a)} frames in {ours.path} and {len(b)} in {theirs.path}; cut them to one length"
            )


def _judged(folder: Any) -> dict[str, dict[str, bool]]:
    """Verdicts by name, for files whose caption belongs to the shapes world."""
    from dit_attn.pipelines.scores import verdict

    found = {}
    for name, frames, caption in zip(folder.names, folder.frames, folder.captions):
        judged = None if caption is None else verdict(frames.permute(0, 2, 3, 1).numpy(), caption)
        if judged is not None:
            found[name] = judged
    return found


def _verifier(folder: Any) -> dict[str, Any]:
    from dit_attn.pipelines.scores import mean_figure

    judged = _judged(folder)
    if not judged:
        raise DitAttnError("verifier needs captions of the shapes world (dit_attn.eval.world); these are none")
    whole = mean_figure([all(one.values()) for one in judged.values()])
    assert whole is not None
    names = dict.fromkeys(name for one in judged.values() for name in one)
    by = {name: mean_figure([one.get(name) for one in judged.values()]) for name in names}
    return {"metric": "verifier", "label": "prompt met", "samples": len(judged), **whole, "by": by}


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    return {name: version(name) for name in ("torch", "torchmetrics")}


def table(record: dict[str, Any]) -> str:
    """The scores as text."""
    lines = [f"{record['files']} files of {record['folder']}"]
    for found in record["scores"]:
        better = found.get("better", "higher")
        text = f"{found['label']:<24}{found['value']:>12.4f}  {better} is better, {found['samples']} samples"
        if found.get("reference"):
            text += f" against {found['reference']}"
        if found.get("ci95"):
            text += f", 95 % {found['ci95'][0]:.3f} to {found['ci95'][1]:.3f}"
        lines.append(text)
        lines += [f"  caution: {found['caution']}"] if found.get("caution") else []
        lines += [f"  left out, only in one folder: {', '.join(found['unpaired'])}"] if found.get("unpaired") else []
    return "\n".join(lines)
