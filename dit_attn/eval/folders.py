"""Read folders of images and videos as tensors; files that cannot be decoded are listed with the reason."""

from __future__ import annotations

import unicodedata
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dit_attn import files
from dit_attn.errors import DitAttnError
from dit_attn.eval.listing import media_files
from dit_attn.eval.media import Unreadable, decode


@dataclass
class Folder:
    """What a folder holds.

    Attributes:
        path: the folder.
        names: stems of the files that were read, composed Unicode, sorted.
        frames: uint8 (F, 3, H, W) of each; one frame for an image.
        captions: of each, ``None`` where there is none.
        skipped: (file name, reason) of every file that could not be read.
        changes: file names by the conversion they needed, see ``media.Decoded``.
    """

    path: Path
    names: list[str] = field(default_factory=list)
    frames: list[torch.Tensor] = field(default_factory=list)
    captions: list[str | None] = field(default_factory=list)
    skipped: list[tuple[str, str]] = field(default_factory=list)
    changes: dict[str, list[str]] = field(default_factory=dict)

    @property
    def has_video(self) -> bool:
        """Tell whether any of the files has several frames."""
        return any(len(frames) > 1 for frames in self.frames)

    def images(self, size: int | None = None) -> torch.Tensor:
        """Stack as uint8 (N, 3, H, W): all frames of all files in order, resized to ``size`` squared when it is given.

        Raises:
            DitAttnError: the files differ in size and no size is given.
        """
        frames = self.frames if size is None else [resized(x, size) for x in self.frames]
        shapes = sorted({(x.shape[3], x.shape[2]) for x in frames})
        if len(shapes) > 1:
            some = ", ".join(f"{w} x {h}" for w, h in shapes[:4])
            raise DitAttnError(f"the files of {self.path} differ in size ({some}); give --size N to bring them to one")
        return torch.cat(frames)


def read_folder(path: Path, captions: Path | None = None) -> Folder:
    """Read every image and video of a folder, by name, with its caption.

    Captions come from ``captions`` (see :func:`read_captions`), else from a JSON sidecar with a ``prompt`` next to each
    file, as ``dit-attn generate`` writes it.

    Raises:
        DitAttnError: no such folder, nothing readable in it, or captions that do not fit.
    """
    files = media_files(path)
    given = None if captions is None else read_captions(captions, files)
    folder = Folder(path)
    for file in files:
        try:
            found = decode(file)
        except Unreadable as error:
            folder.skipped.append((file.name, str(error)))
            continue
        folder.names.append(unicodedata.normalize("NFC", file.stem))
        folder.frames.append(found.frames)
        for change in found.changes:
            folder.changes.setdefault(change, []).append(file.name)
        try:
            folder.captions.append(sidecar_prompt(file) if given is None else given.get(file.name))
        except Unreadable as error:
            folder.captions.append(None)
            folder.skipped.append((file.with_suffix(".json").name, f"{error}; {file.name} goes without caption"))
    if not folder.names:
        first, why = folder.skipped[0]
        raise DitAttnError(f"nothing to measure: none of {len(files)} files of {path} can be read; {first}: {why}")
    return folder


def resized(frames: torch.Tensor, size: int) -> torch.Tensor:
    """Resize to (F, 3, size, size) uint8, bicubic with anti-aliasing."""
    values = torch.nn.functional.interpolate(frames.float(), (size, size), mode="bicubic", antialias=True)
    return values.round().clamp(0, 255).to(torch.uint8)


def pairs(folder: Folder, reference: Folder) -> tuple[Folder, Folder, list[str]]:
    """Match two folders by file name: both with the names they share, and the names only one of them has.

    Raises:
        DitAttnError: they share none, or a folder has two files of one name.
    """
    for one in (folder, reference):
        name, count = Counter(one.names).most_common(1)[0]
        if count > 1:
            raise DitAttnError(f"{one.path} has {count} files named {name} with other endings; keep one for pairing")
    theirs = set(reference.names)
    both = [name for name in folder.names if name in theirs]
    if not both:
        raise DitAttnError(
            f"{folder.path} and {reference.path} share no file name; pairs are matched by name, e.g. 0001.png in both"
        )
    alone = sorted(set(folder.names) ^ theirs)
    return _only(folder, both), _only(reference, both), alone


def _only(folder: Folder, names: list[str]) -> Folder:
    places = {name: place for place, name in enumerate(folder.names)}
    chosen = [places[name] for name in names]
    return Folder(folder.path, names, [folder.frames[i] for i in chosen], [folder.captions[i] for i in chosen])


def sidecar_prompt(file: Path) -> str | None:
    """Return the prompt of the JSON sidecar of ``file``, ``None`` without one.

    Raises:
        Unreadable: it is there, but is no JSON.
    """
    path = file.with_suffix(".json")
    if not path.exists():
        return None
    try:
        data = files.parse_json(files.read_regular(path))
    except (OSError, ValueError) as error:
        raise Unreadable(f"not a readable JSON file ({error})") from error
    prompt = data.get("prompt") if isinstance(data, dict) else None
    return prompt if isinstance(prompt, str) and prompt.strip() else None


def read_captions(path: Path, files: list[Path]) -> dict[str, str]:
    """Read captions by file name.

    The file is .jsonl with ``file`` and ``prompt``, or .txt with one line per file in the order of names.

    Raises:
        DitAttnError: cannot be read, malformed, or not about these files.
    """
    if path.suffix.lower() not in (".jsonl", ".txt"):
        raise DitAttnError(f"--captions {path} must end in .jsonl (file, prompt) or .txt (a line per file)")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DitAttnError(f"--captions {path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    except OSError as error:
        raise DitAttnError(f"cannot read --captions {path} ({error.strerror}); check the path") from error
    lines = [(number, line.strip()) for number, line in enumerate(text.split("\n"), 1) if line.strip()]
    if path.suffix.lower() == ".txt":
        if len(lines) != len(files):
            raise DitAttnError(
                f"{path} has {len(lines)} captions for {len(files)} files; give one line per file in the order of names"
            )
        return {file.name: line for file, (_, line) in zip(files, lines)}
    given = dict(_entry(path, number, line) for number, line in lines)
    by_name = {_plain(name): text for name, text in given.items()}
    found = {file.name: by_name[_plain(file.name)] for file in files if _plain(file.name) in by_name}
    if not found:
        first = next(iter(given), None)
        what = "is empty" if first is None else f"names none of the {len(files)} files, first {first!r}"
        raise DitAttnError(f"--captions {path} {what}; file must be a name such as {files[0].name!r}")
    return found


def _plain(name: str) -> str:
    return unicodedata.normalize("NFC", Path(name).name)


def _entry(path: Path, number: int, line: str) -> tuple[str, str]:
    try:
        entry = files.parse_json(line)
        file, prompt = entry["file"], entry["prompt"]
        if not isinstance(file, str) or not isinstance(prompt, str) or not prompt.strip():
            raise ValueError
    except (ValueError, KeyError, TypeError) as error:
        wanted = '{"file": "0001.png", "prompt": "a cat"}'
        raise DitAttnError(f"{path} line {number} is not {wanted}: {line[:60]}") from error
    return file, prompt
