"""The flags, as one table: it types the command line and the configuration file, and documents both."""

from __future__ import annotations

import argparse
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from dit_attn import files
from dit_attn.errors import DitAttnError, reason, shorten, unknown
from dit_attn.remote import is_address, parse_address

DTYPES = ("auto", "float32", "fp32", "bfloat16", "bf16", "float16", "fp16")
MAX_SEED = 2**63 - 1
PATHS = ("FILE", "DIR", "FOLDER", "PATH")  # metavars of flags that name a place
SWITCHES = (bool, "on-or-off")  # kinds of flags without a value
_DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d{1,4})?")


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        name: without dashes in front, e.g. ``"num-frames"``; the key in a configuration file, dashes or underscores.
        help: one line, with the unit.
        kind: ``str``, ``int``, ``float``, ``bool`` (a switch), ``"on-or-off"`` (with a ``--no-`` form), ``dict`` (a
            JSON object), ``"switch-or-dict"`` or ``"device"``.
        default: what happens without it, for the help; ``"required"`` where the command needs it.
        many: may be repeated.
        nargs: several values in a row, as argparse writes it.
        low, high: inclusive range.
        choices: allowed values.
        short: one-letter or alternative spellings, dashes included.
        metavar: placeholder in the help.
        positional: given by its place on the command line, without its name.
        exists: names a file (``metavar="FILE"``) or a folder that must be there.
        hidden: left out of the help: the command takes it to say why it cannot do that.
        address: names a folder that may be at an fsspec address.
    """

    name: str
    help: str
    kind: Any = str
    default: str = ""
    many: bool = False
    nargs: str | int | None = None
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] | None = None
    short: tuple[str, ...] = ()
    metavar: str | None = None
    positional: bool = False
    exists: bool = False
    hidden: bool = False
    address: bool = False

    @property
    def dest(self) -> str:
        """The attribute name."""
        return self.name.replace("-", "_")

    @property
    def text(self) -> str:
        """The line of ``--help``: what it does, the allowed values, and the default."""
        allowed = f": {', '.join(self.choices)}" if self.choices and not self.metavar else ""
        default = self.default or ("off" if self.kind in (bool, "switch-or-dict") else "none")
        ending = "(required)" if default == "required" else f"(default: {default})"
        return f"{self.help}{allowed} {ending}".replace("%", "%%")


MODEL = (
    Flag(
        "model", "embedded model, local folder, or org/name on the Hugging Face Hub", default="required", short=("-m",)
    ),
    Flag("revision", "branch, tag or commit of a Hub model", default="main"),
    Flag("variant", "weight variant of the checkpoint, e.g. fp16"),
)
WEIGHTS = (
    Flag("dtype", "type of the weights, e.g. bf16", default="auto: bfloat16 on a GPU, else float32", choices=DTYPES,
         metavar="TYPE"),
    Flag("lora", 'adapter: path, org/name, or JSON {"lora_id": ..., "lora_scale": ...}; repeatable', many=True),
)  # fmt: skip
PRESET = (Flag("preset", "settings that methods begin from: auto, none, or a preset's name", default="auto, this "
               "model's"),)  # fmt: skip
SUBJECTS = (Flag("subjects", "JSON file of pieces of the prompt with boxes or masks; they are isolated, or go to the "
                 "named method", metavar="FILE", exists=True),)  # fmt: skip
PROMPT = (
    Flag("prompt", "text; repeat for more items", many=True, metavar="TEXT"),
    Flag("prompts", "file of prompts: .txt (one per line), .jsonl or .csv (prompt, seed, height, ... per line)",
         metavar="FILE"),
    Flag("negative-prompt", "what to avoid", default="the pipeline's", metavar="TEXT"),
    Flag("image", "input image, where the pipeline takes one (image to video, editing)", metavar="FILE"),
)  # fmt: skip
SIZE = (
    Flag("height", "height in pixels", int, "the model's", low=1),
    Flag("width", "width in pixels", int, "the model's", low=1),
    Flag("num-frames", "frames of a video", int, "the model's", low=1),
)
SAMPLING = (
    Flag("steps", "denoising steps", int, "the model's", low=1, short=("--num-inference-steps",)),
    Flag("guidance-scale", "classifier-free guidance scale", float, "the model's", low=0.0),
    Flag("seed", "seed of the first item; item i gets seed + i", int, "42", low=0, high=MAX_SEED),
    Flag("num-images-per-prompt", "items per prompt, each with its own seed", int, "1", low=1),
    Flag("pipeline-kwargs", "JSON object of further arguments of the pipeline's call", dict, metavar="JSON"),
)
OUTPUT = (
    Flag("output", "folder of the files", default="outputs/MODEL-METHOD", short=("-o",), metavar="DIR"),
    Flag("fps", "frames per second of videos", int, "the model's, else 8", low=1, high=240),
    Flag("contact-sheet", "image of all items, sheet.png", "on-or-off", "on for two items or more"),
    Flag("json", "print a JSON report instead of text", bool),
)
# Of the commands whose items may be written to an address.
ADDRESS_OUTPUT = (
    replace(OUTPUT[0], help="folder of the files, or an fsspec address such as s3://bucket/run", address=True),
    *OUTPUT[1:],
)
DEVICE = Flag("device", "auto, cpu, cuda, cuda:N, mps", "device", "auto", metavar="NAME")
RUN = (
    DEVICE,
    Flag("cpu-offload", "keep parts on the CPU until needed: model (saves GB of GPU memory) or group (saves most)",
         choices=("model", "group"), metavar="WHAT"),
    Flag("attention-backend", "attention backend of diffusers for all dense calls", default="diffusers' own",
         metavar="NAME"),
    Flag("compile", "compile the transformer; optionally JSON arguments of torch.compile", "switch-or-dict",
         metavar="JSON"),
    Flag("vae-tiling", "decode in tiles, which saves memory", bool),
    Flag("vae-slicing", "decode one item at a time, which saves memory", bool),
    Flag("resume", "skip items that are already there", bool),
    Flag("dry-run", "print the plan and stop", bool),
    Flag("config", "YAML file with any of these flags; flags on the command line win", metavar="FILE"),
)  # fmt: skip
ENGINE = (
    Flag("workers", "processes that share the items, each with its own weights: a number, or auto, one per GPU",
         default="this process alone", metavar="N"),
    Flag("engine", "where the workers are: local, this machine; ray, or ray:ADDRESS, a Ray cluster", default="local",
         metavar="NAME"),
    Flag("shard", "make one part of the items, e.g. 1/4, the first of four; dit-attn merge joins the reports",
         default="all", metavar="I/N"),
)  # fmt: skip
# For commands whose work is no list of items that could be made in parts which know nothing of each other.
WORKERS = (*ENGINE[:2], replace(ENGINE[2], hidden=True))
# Any command's configuration file may hold these; a command ignores those that it does not have.
SHARED = (*MODEL, *WEIGHTS, *PRESET, *SUBJECTS, *PROMPT, *SIZE, *SAMPLING, *OUTPUT, *RUN, *ENGINE)


@dataclass(frozen=True)
class Options:
    """The flags of one command: those of the command line over those of the configuration file.

    Attributes:
        values: typed values of the flags that were given, by attribute name.
        words: ``--method`` and ``--set`` as (flag, text), in the order of the command line.
        config: ``method`` and ``set`` of the configuration file.
        argv: the command line.
    """

    values: dict[str, Any]
    words: list[tuple[str, str]] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    argv: tuple[str, ...] = ()

    def __contains__(self, name: str) -> bool:
        return name in self.values

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def get(self, name: str, default: Any = None) -> Any:
        """The value of a flag, ``default`` when it was not given."""
        return self.values.get(name, default)

    def pick(self, *names: str) -> dict[str, Any]:
        """The flags of these names that were given, as arguments of a dataclass that has the defaults."""
        return {name: self.values[name] for name in names if name in self.values}


def merge(
    args: argparse.Namespace, groups: Mapping[str, Sequence[Flag]], replaced: Sequence[str] = ("prompt", "prompts")
) -> Options:
    """Flags over the configuration file.

    Args:
        args: of argparse.
        groups: the command's flags, by title.
        replaced: flags that together name one thing: any of them on the command line replaces all of the file.

    Raises:
        DitAttnError: a required flag is missing, a file that must be there is not, or a bad configuration file.
    """
    flags = [flag for group in groups.values() for flag in group]
    own = {flag.dest: flag for flag in flags}
    given = {name: value for name, value in vars(args).items() if name in own}
    file = given["config"] if own.get("config") in RUN and "config" in given else None
    config = {} if file is None else read_config(file, [*SHARED, *flags])
    methods: dict[str, Any] = {name: config.pop(name) for name in ("method", "set") if name in config}
    if any(name in given for name in replaced):
        config = {name: value for name, value in config.items() if name not in replaced}
    values = {**{name: value for name, value in config.items() if name in own}, **given}
    for name, value in values.items():
        if own[name].exists and value:
            for one in value if own[name].many else [value]:
                _check_exists(own[name], one)
    if "model" in own and own["model"].default == "required" and "model" not in values:
        raise DitAttnError("no model; give --model NAME (`dit-attn models` lists the embedded ones)")
    return Options(values, list(getattr(args, "words", [])), methods, tuple(getattr(args, "argv", ())))


def without(group: Sequence[Flag], *names: str) -> tuple[Flag, ...]:
    """The flags of a group but those of some names, for commands that take most of it."""
    return tuple(flag for flag in group if flag.name not in names)


def only(group: Sequence[Flag], *names: str) -> tuple[Flag, ...]:
    """The flags of a group that have these names."""
    return tuple(flag for flag in group if flag.name in names)


def convert(flag: Flag, value: Any, where: str) -> Any:
    """``value`` as the flag's type, from text or from a configuration file.

    Raises:
        DitAttnError: wrong type, out of range, not one of the choices, or malformed JSON.
    """
    if flag.kind in (dict, "switch-or-dict"):
        return _object(flag, value, where)
    if flag.kind in SWITCHES:
        if not isinstance(value, bool):
            raise DitAttnError(f"{where} must be true or false, got {shorten(value)}")
        return value
    if flag.kind in (int, float):
        return _number(flag, value, where)
    if not isinstance(value, str):
        raise DitAttnError(f"{where} must be text, got {shorten(value)}")
    if flag.choices and value not in flag.choices:
        raise unknown(where, value, flag.choices)
    if flag.kind == "device" and not _DEVICE.fullmatch(value):
        raise DitAttnError(f"unknown {where} {shorten(value)}; use auto, cpu, cuda, cuda:N or mps")
    if flag.metavar in PATHS and value and is_address(value):
        _check_address(flag, value, where)
    elif flag.metavar in PATHS and value:
        _check_path(flag, files.user_path(value, where), f"{where} {value}")
    return value


def _check_address(flag: Flag, value: str, where: str) -> None:
    if not flag.address:
        raise DitAttnError(
            f"{where} {shorten(value)} is an address; give a local {'file' if flag.metavar == 'FILE' else 'folder'} "
            "(the --output of generate, edit and compare may be an address)"
        )
    parse_address(value, where)


def _check_path(flag: Flag, path: Path, where: str) -> None:
    kind, other = ("file", "folder") if flag.metavar == "FILE" else ("folder", "file")
    if flag.metavar != "PATH" and (path.is_dir() if kind == "file" else path.is_file()):
        raise DitAttnError(f"{where} is a {other}; give a {kind}")


def _check_exists(flag: Flag, value: str) -> None:
    """Refuse a file or folder that is not there or cannot be read; an address is left to the command."""
    if flag.address and is_address(value):
        return
    path, where = files.user_path(value, f"--{flag.name}"), f"--{flag.name} {value}"
    if not path.exists():
        kind = "file" if flag.metavar == "FILE" else "folder"
        raise DitAttnError(f"{where}: there is no such {kind}; check the path")
    if not os.access(path, os.R_OK):
        raise DitAttnError(f"{where} cannot be read (permission denied); check its permissions")


def _number(flag: Flag, value: Any, where: str) -> int | float:
    what = "a whole number" if flag.kind is int else "a number"
    try:
        if isinstance(value, bool) or (flag.kind is int and isinstance(value, float) and value != int(value)):
            raise ValueError
        number = flag.kind(value)
        finite = math.isfinite(number)
    except (ValueError, TypeError, OverflowError) as error:
        raise DitAttnError(f"{where} must be {what}, got {shorten(value)}") from error
    if not finite:
        raise DitAttnError(f"{where} must be {what}, got {shorten(value)}")
    low, high = flag.low, flag.high
    if (low is not None and number < low) or (high is not None and number > high):
        raise DitAttnError(f"{where} must be {_bounds(low, high)}, got {shorten(value)}")
    return number


def _bounds(low: float | None, high: float | None) -> str:
    least, most = (None if x is None else str(int(x)) if x == int(x) else f"{x:g}" for x in (low, high))
    if least is None or most is None:
        return f"at most {most}" if least is None else f"at least {least}"
    return f"between {least} and {most}"


def _object(flag: Flag, value: Any, where: str) -> Any:
    if flag.kind == "switch-or-dict" and isinstance(value, bool):
        return {} if value else None
    if isinstance(value, str):
        try:
            value = files.parse_json(value)
        except ValueError as error:
            raise DitAttnError(f"{where} is not JSON ({error}); write an object such as '{{\"key\": 1}}'") from error
    if not isinstance(value, dict):
        raise DitAttnError(f"{where} must be a JSON object such as '{{\"key\": 1}}', got {shorten(value)}")
    return value


def read_config(path: str, flags: Sequence[Flag]) -> dict[str, Any]:
    """Flags from a YAML (or JSON) file, typed like the command line; ``method`` and ``set`` are passed through.

    Raises:
        DitAttnError: missing or malformed file, unknown key, value of the wrong type.
    """
    try:
        text = files.user_path(path, "--config").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DitAttnError(f"cannot read --config {path} ({reason(error)}); check the path") from error
    try:
        data = files.parse_yaml(text)
    except ValueError as error:
        raise DitAttnError(f"--config {path}: {error}; correct the file") from error
    if not isinstance(data, dict):
        raise DitAttnError(f"--config {path} must hold `flag: value` lines, got {type(data).__name__}")
    known = {flag.dest: flag for flag in flags if flag.dest != "config"}
    out: dict[str, Any] = {}
    for key, value in data.items():
        dest = str(key).replace("-", "_")
        if dest in ("method", "set"):
            out[dest] = value
        elif dest not in known:
            raise unknown(f"key in {path}:", key, ["method", "set", *sorted(known)])
        elif value is not None:
            out[dest] = _config_value(known[dest], value, f"{dest} in {path}")
    return out


def _config_value(flag: Flag, value: Any, where: str) -> Any:
    if not flag.many and flag.nargs is None:
        return convert(flag, value, where)
    return [convert(flag, item, where) for item in (value if isinstance(value, list) else [value])]
