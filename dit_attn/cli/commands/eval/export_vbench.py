"""``dit-attn eval FOLDER --export vbench``: videos of a folder under the names VBench looks for, and its command."""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_attn import files
from dit_attn.cli import outputs
from dit_attn.cli.commands.eval.items import report_skipped
from dit_attn.cli.table import Table, show
from dit_attn.errors import DitAttnError
from dit_attn.eval import folders, vbench
from dit_attn.eval.listing import VIDEO_SUFFIXES, is_media, media_files
from dit_attn.eval.media import Unreadable, check_video, decode

FPS = 8  # of videos that do not say, as in VBench's own sampling code
_RECORD = "export.json"


@dataclass(frozen=True)
class Source:
    """Videos that belong together: one folder of ``generate``, or one variant of ``compare``.

    Attributes:
        folder: where they are.
        label: name of the variant; empty for a folder of its own.
        files: the files.
    """

    folder: Path
    label: str
    files: list[Path]


def run(folder: Path, captions: Path | None, output: Path | None, info: Path | None, as_json: bool) -> int:
    """Fill the folder and print the command. Returns 0, or 1 when files could not be used.

    Args:
        folder: of the videos, or of folders of videos, as ``compare`` makes them.
        captions: file of their prompts; ``None``: the JSON files next to them.
        output: the folder to fill.
        info: prompts of VBench, to count what is still missing.
        as_json: print JSON.

    Raises:
        DitAttnError: no folder to fill, no videos, a video without prompt, or foreign files in the way.
    """
    if output is None:
        raise DitAttnError("--export needs --output FOLDER, the folder to fill")
    out = output.absolute()
    prompts = None if info is None else vbench.read_info(info)
    if out.is_file():
        raise DitAttnError(f"--output {output} is a file; give a folder")
    sources = find_sources(folder, out)
    if captions is not None and len(sources) > 1:
        raise DitAttnError(f"{folder} holds {len(sources)} folders of videos; with --captions give one of them")
    skipped: list[tuple[str, str]] = []
    plans = [(source, _videos(source, captions, skipped)) for source in sources]
    if not any(videos for _, videos in plans):
        file, why = skipped[0]
        raise DitAttnError(f"no video that VBench could measure in {folder}; {Path(file).name}: {why}")
    report_skipped(skipped)
    sets = [fill(source, videos, out / source.label, prompts) for source, videos in plans if videos]
    record = {
        "export": "vbench",
        "folder": str(folder),
        "sets": sets,
        "skipped": [{"file": file, "why": why} for file, why in skipped],
    }
    if as_json:
        print(json.dumps(record, indent=1))
    else:
        _show(record)
    return 1 if skipped else 0


def find_sources(folder: Path, out: Path) -> list[Source]:
    """The folder itself when it holds images or videos; else each of its folders that does, as ``compare`` makes them.

    Raises:
        DitAttnError: there is none.
    """
    if folder.is_dir():
        inner = [sub for sub in sorted(folder.iterdir()) if sub.is_dir() and sub.absolute() != out / "videos"]
        if not any(map(is_media, folder.iterdir())):
            found = [Source(sub, sub.name, media_files(sub)) for sub in inner if _has_videos(sub)]
            if found:
                return found
    return [Source(folder, "", media_files(folder))]


def _has_videos(folder: Path) -> bool:
    return any(is_media(file) and file.suffix.lower() in VIDEO_SUFFIXES for file in folder.iterdir())


def _videos(source: Source, captions: Path | None, skipped: list[tuple[str, str]]) -> list[vbench.Video]:
    """Return the videos that can be read; the rest goes to ``skipped``.

    Raises:
        DitAttnError: one of them has no prompt.
    """
    given = None if captions is None else folders.read_captions(captions, source.files)
    found, bare = [], []
    for file in source.files:
        try:
            _check(file)
            prompt = folders.sidecar_prompt(file) if given is None else given.get(file.name)
        except Unreadable as error:
            skipped.append((str(file), str(error)))
            continue
        if prompt is None:
            bare.append(file.name)
            continue
        seed = outputs.read_sidecar(file.with_suffix(".json")).get("seed")
        found.append(vbench.Video(file, prompt, seed if isinstance(seed, int) else None))
    if bare:
        raise DitAttnError(
            f"VBench's names are prompts, and {len(bare)} of {len(source.files)} files of {source.folder} have none, "
            f"first {bare[0]}; give --captions FILE"
        )
    return found


def _check(file: Path) -> None:
    """Whether VBench can use a file, without keeping its frames.

    Raises:
        Unreadable: broken, or an image.
    """
    if file.suffix.lower() == vbench.ENDING:
        try:
            check_video(file)
        except ValueError as error:
            raise Unreadable(str(error)) from error
    elif len(decode(file).frames) < 2:
        raise Unreadable("an image; VBench measures videos")


def fill(source: Source, found: Sequence[vbench.Video], out: Path, official: vbench.Prompts | None) -> dict[str, Any]:
    """Make ``out/videos`` hold exactly these videos, and ``out/prompts.json`` their prompts.

    Files of an earlier export stay where they still fit, replaced where their video changed, and removed where it
    is gone. Files that no export wrote are not touched.

    Raises:
        DitAttnError: files in ``out/videos`` that no export wrote; a folder that cannot be written.
    """
    videos = out / "videos"
    before = outputs.read_sidecar(out / _RECORD).get("videos")
    before = before if isinstance(before, dict) else {}
    _refuse_foreign(videos, before)
    outputs.prepare_folder(videos)
    named = vbench.names(found, _longest_name(videos), folds=(out / "VIDEOS").exists())
    covered = None if official is None else vbench.coverage({one.name for one in named}, official)
    gone = [file for file in videos.iterdir() if file.name not in {one.name for one in named}]
    for file in gone:
        file.unlink()
    origin = {one.name: one.video.file for one in named}
    made = {name: {"from": str(file.absolute()), "sha256": outputs.sha256(file)} for name, file in origin.items()}
    prompts = {one.name: one.video.prompt for one in named}
    outputs.write_json({"videos": made}, out / _RECORD)
    ways = Counter(_place(one, videos / one.name, before.get(one.name), made[one.name]) for one in named)
    outputs.write_json(prompts, out / "prompts.json")
    complete = [one.dimension for one in covered or () if one.complete]
    line = vbench.command(out, complete or vbench.CUSTOM, own_prompts=not complete)
    outputs.write_json({"videos": made, "command": line}, out / _RECORD)
    return {
        "label": source.label or None, "source": str(source.folder), "videos": str(videos),
        "prompts": str(out / "prompts.json"), "clips": len(named), **{way: ways[way] for way in WAYS},
        "removed": len(gone),
        "renamed": [{"name": one.name, "prompt": one.video.prompt} for one in named if not one.exact],
        "coverage": covered and [{"dimension": c.dimension, "clips": c.videos, "needed": c.needed} for c in covered],
        "command": line,
    }  # fmt: skip


WAYS = ("linked", "copied", "encoded", "kept")


def _refuse_foreign(videos: Path, before: dict[str, Any]) -> None:
    if not videos.exists():
        return
    if not videos.is_dir():
        raise DitAttnError(f"{videos} is a file; give another --output")
    for file in sorted(videos.iterdir()):
        if file.name.startswith(files.TEMPORARY):
            file.unlink(missing_ok=True)  # what a killed export left
        elif file.name not in before:
            raise DitAttnError(
                f"{file} was not written by --export, and VBench would measure it too; give an --output of its own"
            )


def _longest_name(folder: Path) -> int:
    """Bytes a file name may have in ``folder``."""
    try:
        return min(os.pathconf(folder, "PC_NAME_MAX"), vbench.LONGEST)
    except (AttributeError, OSError, ValueError):  # Windows has no pathconf
        return vbench.LONGEST


def _place(one: vbench.NamedVideo, target: Path, before: dict[str, Any] | None, made: dict[str, Any]) -> str:
    """Put a video at ``target``; how: one of ``WAYS``. ``made`` learns the hash of an encoded file."""
    file = one.video.file
    if target.exists() and before is not None and before.get("sha256") == made["sha256"]:
        found = outputs.sha256(target)
        if found == (made["sha256"] if file.suffix.lower() == vbench.ENDING else before.get("encoded")):
            made.update({key: before[key] for key in ("encoded",) if key in before})
            return "kept"
    if file.suffix.lower() == vbench.ENDING:
        with outputs.output_file(target) as temporary:
            try:
                os.link(file.resolve(), temporary)
                return "linked"
            except OSError:  # another file system, or one without links
                shutil.copyfile(file, temporary)
                return "copied"
    frames = decode(file).frames.permute(0, 2, 3, 1).numpy()
    outputs.write_media(outputs.Media(frames, True), target, _fps(file), {})
    made["encoded"] = outputs.sha256(target)
    return "encoded"


def _fps(file: Path) -> int:
    """Frames a second: of the sidecar, else of the file, else VBench's."""
    import imageio.v3 as iio

    rate = outputs.read_sidecar(file.with_suffix(".json")).get("fps")
    if not rate and file.suffix.lower() == ".gif":
        rate = 1000 / (iio.immeta(file).get("duration") or 1000 / FPS)
    elif not rate and file.suffix.lower() in VIDEO_SUFFIXES:
        rate = iio.immeta(file, plugin="FFMPEG").get("fps")
    return max(1, round(rate)) if isinstance(rate, (int, float)) and rate else FPS


def _show(record: dict[str, Any]) -> None:
    parts: list[str | Table] = []
    for one in record["sets"]:
        ways = ", ".join(f"{one[way]} {way}" for way in (*WAYS, "removed") if one[way])
        parts.append(f"{one['clips']} videos of {one['source']} in {one['videos']} ({ways})")
        if one["renamed"]:
            cut = len(one["renamed"])
            parts.append(f"  {cut} have cut names (prompt too long, or with /): prompts.json has the full prompts")
        if one["coverage"]:
            rows = [(part["dimension"], str(part["clips"]), str(part["needed"])) for part in one["coverage"]]
            parts.append(Table(("dimension", ">videos", ">of"), rows))
        if one["coverage"] and "custom_input" in one["command"]:
            parts.append("  no dimension of VBench's own prompts is complete, so they are measured as yours")
    commands = [one["command"] for one in record["sets"]]
    show(*parts, "Where VBench is installed (it is no part of dit-attn), run:", *commands)
