"""One job is one output file: a prompt, a seed and the arguments of one pipeline call."""

from __future__ import annotations

import csv
import hashlib
import inspect
import io
import json
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_attn import files
from dit_attn.cli.options import MAX_SEED, PROMPT, SAMPLING, SIZE, Flag, convert
from dit_attn.errors import DitAttnError, reason, shorten, unknown

# What a line of a prompt file may set, besides the prompt: the flags of these names.
LINE_FLAGS = {
    flag.dest: flag for flag in (*PROMPT, *SIZE, *SAMPLING) if flag.dest not in ("prompts", "num_images_per_prompt")
}
_CALL_NAMES = {"steps": "num_inference_steps"}
_IMAGE_KEYS = ("image", "input_images", "last_image", "mask_image", "control_image", "ip_adapter_image", "image_2")
# Arguments of a pipeline call that this command sets itself, and what to use instead.
RESERVED = {
    "prompt": "--prompt",
    "generator": "--seed",
    "num_images_per_prompt": "--num-images-per-prompt",
    "num_videos_per_prompt": "--num-images-per-prompt",
    "output_type": "nothing: images and videos are saved as PNG and MP4",
    "return_dict": "nothing",
    "callback_on_step_end": "nothing",
}


@dataclass(frozen=True)
class Job:
    """One item.

    Attributes:
        index: position in the run, from 0.
        prompt: the text.
        seed: seed of its CPU generator.
        call: the other arguments of the pipeline call, JSON values; images as paths.
        where: where the prompt came from, for messages.
    """

    index: int
    prompt: str
    seed: int
    call: dict[str, Any] = field(default_factory=dict)
    where: str = "--prompt"

    @property
    def stem(self) -> str:
        """File name without ending: index, the first words of the prompt, seed."""
        return f"{self.index:04d}_{slug(self.prompt)}_s{self.seed}"

    def digest(self, setup: dict[str, Any]) -> str:
        """Hash of everything that decides the output: this job, its images, and the run's ``setup``."""
        images = {
            key: _sha256(path) if isinstance(path, str) else [_sha256(one) for one in path]
            for key, path in self.images().items()
        }
        content = {"prompt": self.prompt, "seed": self.seed, "call": self.call, "images": images, "setup": setup}
        return hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()

    def images(self) -> dict[str, str | list[str]]:
        """Return the arguments that name an image file, or several."""
        return {key: value for key, value in self.call.items() if key in _IMAGE_KEYS and _is_paths(value)}


def _is_paths(value: Any) -> bool:
    several = isinstance(value, list) and bool(value) and all(isinstance(path, str) for path in value)
    return isinstance(value, str) or several


def slug(text: str, length: int = 40) -> str:
    """The first words of ``text`` as a file name: letters and digits of any script, joined by dashes."""
    words = re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", text).lower()).strip("-")
    while len(words.encode()) > 3 * length:
        words = words[:-1]
    if len(words) > length:
        words = words[: length + 1].rpartition("-")[0] or words[:length]
    return words or "item"


def make_jobs(options: Mapping[str, Any], defaults: dict[str, Any]) -> list[Job]:
    """Make every job of a run.

    Args:
        options: the flags, by attribute name.
        defaults: arguments every call of the model needs.

    Raises:
        DitAttnError: no prompt, or a prompt file that is missing, empty or malformed (with the line number).
    """
    lines = [({"prompt": text}, f"--{flag}") for flag in ("prompt", "instruction") for text in options.get(flag, [])]
    if "prompts" in options:
        lines += list(read_prompts(Path(options["prompts"]).expanduser()))
    if not lines:
        raise DitAttnError("no prompt; give --prompt TEXT or --prompts FILE")
    copies = options.get("num_images_per_prompt", 1)
    shared = {key: options[key] for key in LINE_FLAGS if key in options and key not in ("prompt", "seed")}
    jobs: list[Job] = []
    for line, where in lines:
        if not line["prompt"].strip():
            raise DitAttnError(f"{where}: the prompt is empty; write what to generate")
        _refuse_broken_text({**shared, **line}, where)
        for copy in range(copies):
            index = len(jobs)
            seed = line["seed"] + copy if "seed" in line else options.get("seed", 42) + index
            if seed > MAX_SEED:
                raise DitAttnError(f"{where}: seed {seed} is too large; the largest is {MAX_SEED}")
            jobs.append(Job(index, line["prompt"], seed, _call({**shared, **line}, shared, defaults), where))
    return jobs


def _refuse_broken_text(settings: dict[str, Any], where: str) -> None:
    texts = {key: value for key, value in settings.items() if isinstance(value, str)}
    for key, value in texts.items():
        if "\0" in value:
            raise DitAttnError(f"{where}: {key} has a zero byte in it; take it out (is the file UTF-16?)")
        if any("\ud800" <= letter <= "\udfff" for letter in value):
            raise DitAttnError(f"{where}: {key} is not UTF-8 text; give it in UTF-8")


def _call(settings: dict[str, Any], shared: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    given = {**shared.get("pipeline_kwargs", {}), **settings.get("pipeline_kwargs", {})}
    extra = typed_arguments(given, "--pipeline-kwargs")
    named = {
        _CALL_NAMES.get(key, key): value
        for key, value in settings.items()
        if key not in ("prompt", "seed", "pipeline_kwargs")
    }
    return {**defaults, **named, **extra}


def typed_arguments(given: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Arguments of a pipeline call, typed and within range where a flag of the same meaning is.

    Args:
        given: arguments by the pipeline's names.
        where: where they were given, for messages.

    Raises:
        DitAttnError: one does not fit, or this command sets it itself.
    """
    for name in given:
        _refuse_reserved(name)
    numbers = {_CALL_NAMES.get(name, name): flag for name, flag in LINE_FLAGS.items() if flag.kind in (int, float)}
    return {
        name: convert(numbers[name], value, f"{name} in {where}") if name in numbers and value is not None else value
        for name, value in given.items()
    }


def _refuse_reserved(name: str) -> None:
    if name in RESERVED:
        raise DitAttnError(f"pipeline argument {name!r} is set by this command; use {RESERVED[name]}")


def read_prompts(path: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """(settings, place) of every line of a prompt file; blank lines are skipped.

    Raises:
        DitAttnError: missing, empty or malformed file.
    """
    readers = {".txt": _read_txt, ".jsonl": _read_jsonl, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise DitAttnError(f"--prompts {path} must end in {', '.join(readers)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DitAttnError(f"cannot read --prompts {path} ({reason(error)}); check the path") from error
    except UnicodeDecodeError as error:
        raise DitAttnError(f"--prompts {path} is not UTF-8 text ({error.reason}); save it as UTF-8") from error
    count = 0
    for number, data in readers[path.suffix.lower()](path, text):
        count += 1
        yield _line(data, path, f"{path}, line {number}"), f"{path}, line {number}"
    if not count:
        raise DitAttnError(f"--prompts {path} has no prompt in it; write one prompt a line")


def _read_txt(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            yield number, {"prompt": line.strip()}


def _read_jsonl(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            data = files.parse_json(line)
        except ValueError as error:
            raise DitAttnError(f"{path}, line {number} is not JSON ({error}); one object a line") from error
        if not isinstance(data, dict):
            raise DitAttnError(
                f'{path}, line {number} must be an object such as {{"prompt": "..."}}, got {shorten(data)}'
            )
        yield number, data


def _read_csv(path: Path, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if reader.fieldnames is not None and "prompt" not in reader.fieldnames:
            raise DitAttnError(
                f"{path}, line 1 must name the columns, one of them prompt; got {shorten(reader.fieldnames)}"
            )
        twice = [name for name, count in Counter(reader.fieldnames or ()).items() if count > 1]
        if twice:
            raise DitAttnError(f"{path}, line 1 names the column {twice[0]!r} twice; keep one of them")
        for row in reader:
            if None in row or None in row.values():
                raise DitAttnError(
                    f"{path}, line {reader.line_num} has another number of columns than line 1; quote text with commas"
                )
            yield reader.line_num, {key: value for key, value in row.items() if value.strip()}
    except csv.Error as error:
        raise DitAttnError(f"{path}, line {reader.line_num} is not CSV ({error})") from error


def _line(data: dict[str, Any], path: Path, where: str) -> dict[str, Any]:
    aliases = {"num_inference_steps": "steps"}
    out: dict[str, Any] = {}
    for key, value in data.items():
        name = aliases.get(str(key).strip().replace("-", "_"), str(key).strip().replace("-", "_"))
        if name not in LINE_FLAGS:
            raise unknown(f"key in {where}:", key, LINE_FLAGS)
        if value is not None:
            flag: Flag = LINE_FLAGS[name]
            several = name == "image" and isinstance(value, list) and bool(value)
            kind = f"{name} in {where}"
            out[name] = [convert(flag, one, kind) for one in value] if several else convert(flag, value, kind)
    if "prompt" not in out:
        raise DitAttnError(f"{where} has no prompt; every line needs one")
    if "pipeline_kwargs" in out:
        out["pipeline_kwargs"] = _images_beside(path, out["pipeline_kwargs"])
    return _images_beside(path, out)


def _images_beside(file: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a line of ``file``, with paths of images from its folder."""

    def beside(value: Any) -> Any:
        if isinstance(value, list):
            return [beside(path) for path in value]
        return value if Path(value).expanduser().is_absolute() else str(file.parent / value)

    return {
        name: beside(value) if name in _IMAGE_KEYS and _is_paths(value) else value for name, value in settings.items()
    }


def check_calls(jobs: Sequence[Job], pipeline: Any) -> None:
    """Refuse arguments that the pipeline's call does not take, and images that cannot be read.

    Raises:
        DitAttnError: with the flag, the pipeline and what it takes.
    """
    parameters = inspect.signature(pipeline.__call__).parameters
    taken = [name for name, spec in parameters.items() if spec.kind is not spec.VAR_KEYWORD and name != "self"]
    flags = _flags()
    needed = [
        name for name, spec in parameters.items() if spec.default is spec.empty and name in taken and name != "prompt"
    ]
    for job in jobs:
        missing = [name for name in needed if name not in job.call]
        if missing:
            raise needs(pipeline, missing[0], job)
        for key in job.call:
            _refuse_reserved(key)
            if key not in taken and key in flags:
                raise DitAttnError(f"{pipeline.__name__} takes no {key}; leave out {flags[key]} ({job.where})")
            if key not in taken:
                raise unknown(f"argument of {pipeline.__name__}", key, [name for name in taken if name not in RESERVED])
        check_images(job)


def needs(pipeline: Any, argument: str, job: Job) -> DitAttnError:
    """Return the refusal of a job that lacks an argument of the pipeline's call, with the flag to give."""
    remedy = f"give {_flags()[argument]}" if argument in _flags() else "give it with --pipeline-kwargs"
    return DitAttnError(f"{pipeline.__name__} needs {argument}; {remedy} ({job.where})")


def _flags() -> dict[str, str]:
    """The flags of a call, by the pipelines' names."""
    return {_CALL_NAMES.get(key, key): f"--{key.replace('_', '-')}" for key in LINE_FLAGS}


def check_images(job: Job) -> None:
    """Refuse images of a job that are not there or cannot be read.

    Raises:
        DitAttnError: so it is.
    """
    for key, path in job.images().items():
        load_images(path, f"{key} ({job.where})" if key != "image" else "--image")


def check_inputs(jobs: Sequence[Job], pipe: Any) -> None:
    """Run the pipeline's own checks on every job before the first one is made (sizes it cannot do, ...).

    Args:
        jobs: what is to be made.
        pipe: the pipeline, or one without weights; what it cannot check then is left to the loaded one.

    Raises:
        DitAttnError: what the pipeline says, and which job it is.
    """
    check = getattr(pipe, "check_inputs", None)
    if check is None:
        return
    wanted = inspect.signature(check).parameters
    defaults = {name: spec.default for name, spec in inspect.signature(type(pipe).__call__).parameters.items()}
    for job in jobs:
        values = {**defaults, **job.call, "prompt": job.prompt}
        known = {
            name: values[name]
            for name in wanted
            if values.get(name, inspect.Parameter.empty) is not inspect.Parameter.empty
        }
        if known.get("height", 0) is None or known.get("width", 0) is None or job.images():
            continue  # the pipeline works out its size, or looks at the image, before it checks
        try:
            check(**known)
        except ValueError as error:
            raise DitAttnError(
                f"{type(pipe).__name__} refuses {job.where} ({shorten(job.prompt)}): {reason(error)}"
            ) from error
        except (TypeError, AttributeError):
            continue  # its check takes what only its call can work out, or a part that is not loaded yet


def load_images(paths: str | list[str], where: str) -> Any:
    """Read one image file, or a list of them; arguments and errors as for :func:`load_image`."""
    return load_image(paths, where) if isinstance(paths, str) else [load_image(path, where) for path in paths]


def load_image(path: str, where: str) -> Any:
    """Read an image file as an RGB PIL image.

    Raises:
        DitAttnError: missing or corrupt.
    """
    from PIL import Image, UnidentifiedImageError

    place = files.user_path(path, where)
    try:
        with Image.open(place) as image:
            image.load()
            return image.convert("RGB")
    except FileNotFoundError as error:
        raise DitAttnError(f"{where} {path}: there is no such file; check the path") from error
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DitAttnError(f"{where} {path} is not a readable image ({reason(error)}); save it again as PNG") from error


def _sha256(path: str) -> str:
    return hashlib.sha256(Path(path).expanduser().read_bytes()).hexdigest()
