"""The flags, as one table: it builds the parser, types the values of a configuration file, and documents both."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_attn.errors import DitAttnError, unknown

DTYPES = ("auto", "float32", "fp32", "bfloat16", "bf16", "float16", "fp16")
MAX_SEED = 2**63 - 1
_SWITCHES: dict[Any, Any] = {bool: "store_true", "on-or-off": argparse.BooleanOptionalAction}


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
        name: without dashes in front, e.g. ``"num-frames"``; the key in a configuration file, dashes or underscores.
        help: one line.
        kind: ``str``, ``int``, ``float``, ``bool`` (a switch), ``"on-or-off"`` (with a ``--no-`` form), ``dict`` (a
            JSON object) or ``"switch-or-dict"``.
        many: may be repeated.
        low, high: inclusive range.
        choices: allowed values.
        short: one-letter or alternative spellings, dashes included.
        metavar: placeholder in the help.
    """

    name: str
    help: str
    kind: Any = str
    many: bool = False
    low: float | None = None
    high: float | None = None
    choices: tuple[str, ...] | None = None
    short: tuple[str, ...] = ()
    metavar: str | None = None

    @property
    def dest(self) -> str:
        """The attribute name."""
        return self.name.replace("-", "_")


MODEL = (
    Flag("model", "embedded model, local folder, or org/name on the Hugging Face Hub", short=("-m",)),
    Flag("revision", "branch, tag or commit of a Hub model"),
    Flag("variant", "weight variant of the checkpoint, e.g. fp16"),
)
METHOD = (
    Flag("preset", "settings of methods: auto (of this very model, the default), none, or a preset's name"),
    Flag("config", "YAML file with any of these flags; flags on the command line win", metavar="FILE"),
)
SIZE = (
    Flag("height", "pixels", int, low=1),
    Flag("width", "pixels", int, low=1),
    Flag("num-frames", "frames of a video", int, low=1),
)
PROMPT = (
    Flag("prompt", "text; repeat for more items", many=True, metavar="TEXT"),
    Flag(
        "prompts",
        "file of prompts: .txt (one a line), .jsonl or .csv (prompt, seed, height, ... a line)",
        metavar="FILE",
    ),
    Flag("negative-prompt", "what to avoid", metavar="TEXT"),
    Flag("image", "input picture, where the pipeline takes one (image to video, editing)", metavar="FILE"),
)
SAMPLING = (
    Flag("steps", "denoising steps", int, low=1, short=("--num-inference-steps",)),
    Flag("guidance-scale", "classifier-free guidance", float, low=0.0),
    Flag("seed", "seed of the first item; item i gets seed + i (default: 42)", int, low=0, high=MAX_SEED),
    Flag("num-images-per-prompt", "items per prompt, each with its own seed (default: 1)", int, low=1),
    Flag("pipeline-kwargs", "JSON object of further arguments of the pipeline's call", dict, metavar="JSON"),
)
MACHINE = (
    Flag("dtype", "type of the weights (default: auto: bfloat16 on a GPU, float32 on a CPU)", choices=DTYPES),
    Flag("device", "auto, cpu, cuda, cuda:N, mps (default: auto)"),
    Flag(
        "compile",
        "compile the transformer; optionally JSON arguments of torch.compile",
        "switch-or-dict",
        metavar="JSON",
    ),
    Flag("cpu-offload", "keep parts on the CPU until needed", choices=("model", "group")),
    Flag("attention-backend", "attention backend of diffusers for everything that stays dense", metavar="NAME"),
    Flag("lora", 'adapter: path, org/name, or JSON {"lora_id": ..., "lora_scale": ...}; repeatable', many=True),
    Flag("vae-tiling", "decode in tiles", bool),
    Flag("vae-slicing", "decode one item at a time", bool),
)
OUTPUT = (
    Flag("output", "folder (default: outputs/MODEL-METHOD)", short=("-o",), metavar="DIR"),
    Flag("fps", "frames per second of videos (default: the model's own, else 8)", int, low=1, high=240),
    Flag("resume", "skip items that are already there", bool),
    Flag("dry-run", "print the plan and stop", bool),
    Flag("json", "print a JSON report instead of text", bool),
    Flag("contact-sheet", "picture of all items, sheet.png (default: with two items or more)", "on-or-off"),
)


def add_flags(parser: argparse.ArgumentParser, title: str, flags: Iterable[Flag]) -> None:
    """Add a titled group of flags. Flags that are not given leave no trace in the namespace."""
    group = parser.add_argument_group(title)
    for flag in flags:
        names = sorted([f"--{flag.name}", *flag.short], key=lambda name: name.startswith("--"))
        extra: dict[str, Any]
        if flag.kind in _SWITCHES:
            extra = {"action": _SWITCHES[flag.kind]}
            group.add_argument(*names, dest=flag.dest, help=flag.help, default=argparse.SUPPRESS, **extra)
            continue
        extra = {"type": _reader(flag), "metavar": flag.metavar or _metavar(flag)}
        if flag.kind == "switch-or-dict":
            extra |= {"nargs": "?", "const": {}}
        if flag.many:
            extra["action"] = "append"
        group.add_argument(*names, dest=flag.dest, help=flag.help, default=argparse.SUPPRESS, **extra)


def without(group: Sequence[Flag], *names: str) -> tuple[Flag, ...]:
    """The flags of a group but those of some names, for commands that take most of it."""
    return tuple(flag for flag in group if flag.name not in names)


def add_method_flags(parser: argparse.ArgumentParser) -> None:
    """``--method`` and ``--set``, which keep their order, and the flags about presets and files."""
    add_flags(parser, "methods", METHOD)
    group = parser.add_argument_group("settings of methods")
    extra: dict[str, Any] = {"dest": "words", "action": _Word, "default": argparse.SUPPRESS}
    group.add_argument(
        "--method", metavar="NAME", help="method to put on the pipeline, or a file of settings; repeatable", **extra
    )
    group.add_argument(
        "--set",
        metavar="KEY=VALUE",
        help="setting of the method named before it (or of the only one); NAME.KEY=VALUE names the method; repeatable",
        **extra,
    )


def convert(flag: Flag, value: Any, where: str) -> Any:
    """``value`` as the flag's type, from text or from a configuration file.

    Raises:
        DitAttnError: wrong type, out of range, not one of the choices, or malformed JSON.
    """
    if flag.kind in (dict, "switch-or-dict"):
        return _object(flag, value, where)
    if flag.kind in _SWITCHES:
        if not isinstance(value, bool):
            raise DitAttnError(f"{where} must be true or false, got {value!r}")
        return value
    if flag.kind in (int, float):
        return _number(flag, value, where)
    if not isinstance(value, str):
        raise DitAttnError(f"{where} must be text, got {value!r}")
    if flag.choices and value not in flag.choices:
        raise unknown(where, value, flag.choices)
    return value


def _number(flag: Flag, value: Any, where: str) -> int | float:
    what = "a whole number" if flag.kind is int else "a number"
    try:
        if isinstance(value, bool) or (flag.kind is int and isinstance(value, float) and value != int(value)):
            raise ValueError
        number = flag.kind(value)
    except (ValueError, TypeError, OverflowError) as error:
        raise DitAttnError(f"{where} must be {what}, got {value!r}") from error
    if not math.isfinite(number) or (flag.low is not None and number < flag.low) or number > (flag.high or math.inf):
        bounds = f"at least {flag.low:g}" if flag.high is None else f"between {flag.low:g} and {flag.high:g}"
        raise DitAttnError(f"{where} must be {what}, {bounds}, got {value!r}")
    return number


def _object(flag: Flag, value: Any, where: str) -> Any:
    if flag.kind == "switch-or-dict" and isinstance(value, bool):
        return {} if value else None
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise DitAttnError(f"{where} is not JSON ({error}); write an object such as '{{\"key\": 1}}'") from error
    if not isinstance(value, dict):
        raise DitAttnError(f"{where} must be a JSON object such as '{{\"key\": 1}}', got {value!r}")
    return value


def read_config(path: str, flags: Sequence[Flag]) -> dict[str, Any]:
    """Flags from a YAML (or JSON) file, typed like the command line; ``method`` and ``set`` are passed through.

    Raises:
        DitAttnError: missing or malformed file, unknown key, value of the wrong type.
    """
    import yaml

    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise DitAttnError(f"cannot read --config {path} ({reason(error)}); check the path") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise DitAttnError(f"--config {path}{line} is not YAML ({getattr(error, 'problem', None) or error})") from error
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
    if not flag.many:
        return convert(flag, value, where)
    return [convert(flag, item, where) for item in (value if isinstance(value, list) else [value])]


def reason(error: BaseException) -> str:
    """The first line of what an exception says; its class when it says nothing."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


class _Word(argparse.Action):
    """Collects ``--method`` and ``--set`` as (flag, text) in the order of the command line."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        kind = "set" if (option_string or "").startswith("--s") else "method"
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, []), (kind, values)])


def _reader(flag: Flag) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return convert(flag, text, "value" if not flag.choices else flag.name)
        except DitAttnError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def _metavar(flag: Flag) -> str:
    return "{" + ",".join(flag.choices) + "}" if flag.choices else {int: "N", float: "X"}.get(flag.kind, "NAME")
