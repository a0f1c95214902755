"""Name videos as VBench does, so that VBench can measure a folder made here. VBench itself is not needed.

VBench 0.1.5 (Huang et al., CVPR 2024) reads a flat folder of videos in one of two ways:

- its own prompts: ``{prompt}-{index}.mp4`` with indices 0 to 4; all files have one ending, nothing else may lie there;
- own prompts (``--mode custom_input``): any names, with a JSON file ``{file name: prompt}`` that lies elsewhere.

The names made here serve both. A prompt that no file can be named after (too long, with ``/``) is cut and marked, and
the JSON file has its full text: VBench's own prompts are never cut, they have at most 210 bytes.
"""

from __future__ import annotations

import hashlib
import shlex
import unicodedata
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from dit_attn import files
from dit_attn.errors import DitAttnError

ENDING = ".mp4"
COPIES = 5  # videos of each of VBench's own prompts
LONGEST = 255  # bytes of a file name, where the file system does not say otherwise

# What VBench measures on own prompts: the six its documentation names, and the one that reads the prompt.
CUSTOM = (
    "subject_consistency",
    "background_consistency",
    "motion_smoothness",
    "dynamic_degree",
    "aesthetic_quality",
    "imaging_quality",
    "overall_consistency",
)
_INDEX_ROOM = len("-00000")


@dataclass(frozen=True)
class Video:
    """One video to name.

    Attributes:
        file: where it is.
        prompt: what it was made from.
        seed: its seed, if known; videos of one prompt are numbered in the order of seeds.
    """

    file: Path
    prompt: str
    seed: int | None = None


@dataclass(frozen=True)
class NamedVideo:
    """A video and its VBench name.

    Attributes:
        video: the video.
        name: file name for VBench.
        exact: whether the name is the prompt; else only the JSON file has it.
    """

    video: Video
    name: str
    exact: bool


def names(videos: Sequence[Video], longest: int = LONGEST, folds: bool = False) -> list[NamedVideo]:
    """Name every video; the names do not depend on the order of ``videos``.

    Args:
        videos: what to name.
        longest: bytes a file name may have.
        folds: whether the file system takes ``A`` and ``a`` for one name.
    """

    def order(video: Video) -> tuple[str, bool, int, str]:
        return video.prompt.strip(), video.seed is None, video.seed or 0, str(video.file)

    owner: dict[str, str] = {}
    counts: dict[str, int] = {}
    found = []
    for video in sorted(videos, key=order):
        prompt = video.prompt.strip()
        stem = file_stem(prompt, longest)
        if folds and owner.setdefault(_folded(stem), prompt) != prompt:
            stem = _marked(stem, prompt, longest)
        index = counts.get(stem, 0)
        counts[stem] = index + 1
        found.append(NamedVideo(video, f"{stem}-{index}{ENDING}", stem == prompt))
    return found


def file_stem(prompt: str, longest: int = LONGEST) -> str:
    """Return ``prompt`` where a file can have that name, else its beginning and a hash of the full prompt.

    Args:
        prompt: any text without space around it.
        longest: bytes the whole file name may have, index and ending included.
    """
    clean = "".join(" " if char == "/" or unicodedata.category(char) in ("Cc", "Cs") else char for char in prompt)
    fits = len(clean.encode()) <= longest - _INDEX_ROOM - len(ENDING)
    return prompt if fits and clean == prompt else _marked(clean, prompt, longest)


def _marked(stem: str, prompt: str, longest: int) -> str:
    mark = " " + hashlib.sha256(prompt.encode(errors="surrogatepass")).hexdigest()[:8]
    room = longest - _INDEX_ROOM - len(ENDING) - len(mark)
    return stem.encode()[:room].decode(errors="ignore").rstrip() + mark


def _folded(stem: str) -> str:
    return unicodedata.normalize("NFC", stem).casefold()


@dataclass(frozen=True)
class Coverage:
    """How much of one of VBench's dimensions is there.

    Attributes:
        dimension: its name.
        videos: videos of its prompts that are there.
        needed: videos it requires, ``COPIES`` of each prompt.
    """

    dimension: str
    videos: int
    needed: int

    @property
    def complete(self) -> bool:
        """Tell whether nothing is missing."""
        return self.videos == self.needed


Prompts = list[tuple[str, list[str]]]  # VBench's own: (prompt, dimensions)


def read_info(path: Path) -> Prompts:
    """Read VBench's own prompts from ``VBench_full_info.json``, which comes with VBench.

    Raises:
        DitAttnError: the file cannot be read, or is another one.
    """
    try:
        entries = files.parse_json(path.read_bytes())
        return [(str(entry["prompt_en"]), [str(name) for name in entry["dimension"]]) for entry in entries]
    except OSError as error:
        raise DitAttnError(f"cannot read --vbench-info {path} ({error.strerror}); check the path") from error
    except (ValueError, KeyError, TypeError) as error:
        raise DitAttnError(
            f"--vbench-info {path} is not VBench_full_info.json, a list of prompt_en and dimension; take VBench's file"
        ) from error


def coverage(present: Collection[str], prompts: Prompts) -> list[Coverage]:
    """Count the videos that are there of each dimension's own prompts.

    Args:
        present: file names.
        prompts: VBench's own.
    """
    have, need = dict[str, int](), dict[str, int]()
    for prompt, dimensions in prompts:
        there = sum(f"{prompt}-{index}{ENDING}" in present for index in range(COPIES))
        for dimension in dimensions:
            have[dimension] = have.get(dimension, 0) + there
            need[dimension] = need.get(dimension, 0) + COPIES
    return [Coverage(dimension, have[dimension], need[dimension]) for dimension in sorted(need)]


def command(folder: Path, dimensions: Sequence[str], own_prompts: bool) -> str:
    """Build the shell line that measures ``folder/videos`` with an installed VBench, into ``folder/results``.

    VBench hands its arguments to a second shell without quotes, and takes one dimension a call: hence the change of
    folder, which leaves only names without spaces, and the loop.

    Args:
        folder: of the export.
        dimensions: what to measure.
        own_prompts: whether the prompts are not VBench's, but those of ``folder/prompts.json``.
    """
    mode = " --mode custom_input --prompt_file prompts.json" if own_prompts else ""
    call = f"vbench evaluate --videos_path videos --dimension $dimension{mode} --output_path results"
    place = shlex.quote(str(folder))
    return f"(cd {place} && for dimension in {' '.join(dimensions)}; do {call}; done)"
