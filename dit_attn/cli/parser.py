"""The parser of the command line: flags from the table, one-line errors, help in groups."""

from __future__ import annotations

import argparse
import re
import shutil
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

from dit_attn.cli.options import SWITCHES, Flag, convert
from dit_attn.errors import DitAttnError

_ACTIONS: dict[Any, Any] = {bool: "store_true", "on-or-off": argparse.BooleanOptionalAction}
# What several --method mean, for the help of commands that run one pipeline and of those that compare.
TOGETHER = (
    "method to enable, with its settings, or a file of settings, or org/name on the Hub; NAME:... + NAME:... enables "
    "several together, and so does repeating it; `dit-attn methods` lists them (default: none)"
)
VARIANTS = (
    "variant to measure: a method with its settings, or a file of settings, or org/name on the Hub; NAME:... + "
    "NAME:... enables several together; repeat for more variants; `dit-attn methods` lists them"
)
_WIDTH = 100  # columns of help on a wide terminal


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Flags at the left, help from one column on, descriptions wrapped; examples stay as they are written."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns, _WIDTH) - 1
        super().__init__(prog, max_help_position=28, width=width)

    def add_argument(self, action: argparse.Action) -> None:
        """Add one action; names of subcommands stand two columns further in than argparse reckons."""
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):
            self._action_max_length += 2

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings or action.nargs == 0:
            return super()._format_action_invocation(action)
        value = self._format_args(action, self._get_default_metavar_for_optional(action))
        return f"{', '.join(action.option_strings)} {value}"

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(" ".join(text.split()), width, break_on_hyphens=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith("examples:"):
            return super()._fill_text(text, width, indent)
        return "\n".join(indent + line for line in self._split_lines(text, width - len(indent)))


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one-line errors, like any other bad input; flags are written out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"formatter_class": HelpFormatter, **kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        message = re.sub(r"^argument \S+: (?=--|unknown )", "", message)
        message = re.sub(r"^argument (?:-\w/)?(\S+): expected (at least )?one argument", r"\1 needs a value", message)
        message = re.sub(r"^the following arguments are required: (.+)", r"\1 is missing", message)
        raise DitAttnError(f"{message.rstrip('.')}; see `{self.prog} --help`")

    def _get_values(self, action: argparse.Action, arg_strings: list[str]) -> Any:
        if action.option_strings and action.nargs is None and arg_strings == ["--"]:
            return self._get_value(action, "--")  # `--flag=--`: argparse takes it for the end of the flags
        return super()._get_values(action, arg_strings)


def add_flags(parser: argparse.ArgumentParser, title: str, flags: Iterable[Flag], description: str = "") -> None:
    """Add a titled group of flags. Flags that are not given leave no trace in the namespace."""
    group = parser.add_argument_group(title, description or None)
    for flag in flags:
        if flag.positional:
            optional: dict[str, Any] = {"nargs": flag.nargs, "default": argparse.SUPPRESS} if flag.nargs else {}
            group.add_argument(flag.dest, metavar=flag.metavar, type=_reader(flag), help=flag.text, **optional)
            continue
        names = sorted([f"--{flag.name}", *flag.short], key=lambda name: name.startswith("--"))
        text = argparse.SUPPRESS if flag.hidden else flag.text
        extra: dict[str, Any] = {"dest": flag.dest, "help": text, "default": argparse.SUPPRESS}
        if flag.kind in SWITCHES:
            extra["action"] = _ACTIONS[flag.kind]
        else:
            extra |= {"type": _reader(flag), "metavar": flag.metavar or _metavar(flag), "nargs": flag.nargs}
        if flag.kind == "switch-or-dict":
            extra |= {"nargs": "?", "const": {}}
        if flag.many:
            extra["action"] = "append"
        group.add_argument(*names, **{key: value for key, value in extra.items() if value is not None})


def add_groups(
    parser: argparse.ArgumentParser,
    groups: Mapping[str, Sequence[Flag]],
    methods: str = "",
    descriptions: Mapping[str, str] | None = None,
) -> None:
    """Add every group.

    Args:
        parser: of the command.
        groups: flags by title.
        methods: help of ``--method``, for commands that take methods.
        descriptions: what is said under the titles.
    """
    for title, flags in groups.items():
        add_flags(parser, title, flags, (descriptions or {}).get(title, ""))
        if title == "methods" and methods:
            _add_methods(parser, methods)


def describe(parser: argparse.ArgumentParser, usage: str, description: str, examples: str = "") -> None:
    """Set what ``--help`` says besides the flags; ``usage`` without ``dit-attn``."""
    parser.usage, parser.description, parser.epilog = f"dit-attn {usage}", description, examples or None


def _add_methods(parser: argparse.ArgumentParser, help: str) -> None:
    """``--method`` and ``--set``, which keep their order."""
    group = next(one for one in parser._action_groups if one.title == "methods")
    extra: dict[str, Any] = {"dest": "words", "action": _Word, "default": argparse.SUPPRESS}
    group.add_argument("--method", metavar="NAME[:KEY=VALUE,...]", help=help, **extra)
    group.add_argument(
        "--set",
        metavar="KEY=VALUE",
        help="setting of the method before it, the same as NAME:KEY=VALUE; NAME.KEY=VALUE names the method; "
        "repeatable (default: those of the preset)",
        **extra,
    )


class _Word(argparse.Action):
    """Collects ``--method`` and ``--set`` as (flag, text) in the order of the command line."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        kind = "set" if (option_string or "").startswith("--s") else "method"
        setattr(namespace, self.dest, [*getattr(namespace, self.dest, []), (kind, values)])


def _reader(flag: Flag) -> Callable[[str], Any]:
    def read(text: str) -> Any:
        try:
            return convert(flag, text, flag.name if flag.positional else f"--{flag.name}")
        except DitAttnError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return read


def _metavar(flag: Flag) -> str:
    return {int: "N", float: "X"}.get(flag.kind, "NAME")
