"""The command line: ``dit-attn COMMAND``. One module per command, imported only when its command is used."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

from dit_attn import __version__
from dit_attn.cli.output_address import lost
from dit_attn.cli.parser import Parser
from dit_attn.cli.workers import process_rank
from dit_attn.errors import DitAttnError, cut, import_problem, shorten, unknown
from dit_attn.remote import Unreachable


class Command(NamedTuple):
    """One command.

    Attributes:
        module: under ``dit_attn.cli.commands``; it has its flags by title as ``GROUPS``, ``add_arguments(parser)`` and
            ``run(args) -> exit code``.
        help: the line of ``dit-attn --help``.
        shares: whether several processes (``torchrun``, ``accelerate launch``) share its work.
    """

    module: str
    help: str
    shares: bool = False


COMMANDS = {
    "generate": Command("generate", "make images or videos from prompts, with or without methods", True),
    "edit": Command("edit", "change images by instructions, with or without methods", True),
    "models": Command("models", "list the embedded models and the supported families"),
    "methods": Command("methods", "list the methods, or the settings of one"),
    "explain": Command("explain", "say what a method can gain on a model, before a run"),
    "doctor": Command("doctor", "check versions, devices and kernels"),
    "demo": Command("demo", "an image and a video of the embedded models, dense and with the best methods"),
    "train": Command("train", "train an embedded model from its recipe"),
    "compare": Command("compare.command", "measure methods next to dense on your prompts, and make a page of it"),
    "inspect": Command("inspect", "measure what attention does in a run, by layer, head and step, with a page"),
    "calibrate": Command("calibrate.command", "find densities by layer and part of the run, for a budget"),
    "finetune": Command("finetune.command", "train a model with a sparse method in it", True),
    "search": Command("search.command", "find the attention heads whose perturbation raises an objective", True),
    "anomaly": Command("anomaly.command", "learn defects from a few images, make image-mask pairs of them", True),
    "eval": Command("eval.command", "measure a folder of images or videos against references or captions"),
    "merge": Command("merge", "join the reports of the parts of a run that --shard made"),
    "bench": Command("bench.command", "measure kernels and methods on this machine"),
    "completion": Command("completion", "print a script that completes commands, flags and names in a shell"),
}
_LONGEST = 1500  # characters of an error line
OK, SOME_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 some items failed, 2 bad input, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        return _dispatch([word for word in words if word != "--debug"])
    except DitAttnError as error:
        return _fail(str(error), BAD_INPUT, debug)
    except Unreachable as error:
        return _fail(str(lost(str(error.filename), "reach", error)), BAD_INPUT, debug)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, debug)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); nothing is left to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        problem = import_problem("torchvision", "diffusers, transformers and torchmetrics load it where it is there")
        if problem is not None:
            return _fail(str(problem), BAD_INPUT, debug)
        name = type(error).__name__
        message = f"unexpected {name}: {error}; run again with --debug for the traceback"
        return _fail(message, SOME_FAILED, debug)


def _dispatch(words: list[str]) -> int:
    parser = Parser(
        prog="dit-attn",
        usage="dit-attn COMMAND [options]",
        description="Faster and steerable attention for diffusion transformers, on stock diffusers pipelines.",
        epilog="`dit-attn COMMAND --help` lists the flags of a command. Any command takes --debug: show the traceback.",
    )
    parser.add_argument("--version", action="version", version=f"dit-attn {__version__}", help="print the version")
    subparsers = parser.add_subparsers(
        title="commands", dest="command", metavar="COMMAND", required=True, prog="dit-attn"
    )
    chosen = next((word for word in words if not word.startswith("-")), None)
    if chosen is not None and chosen not in COMMANDS:
        raise unknown("command", chosen, COMMANDS)
    flags: list[str] = []
    for name, row in COMMANDS.items():
        command = subparsers.add_parser(name, help=row.help, add_help=name == chosen)
        if name == chosen:
            _module(name).add_arguments(command)
            flags = [flag for action in command._actions for flag in action.option_strings]
    if not words:
        parser.print_help()
        return OK
    args, rest = parser.parse_known_args(words)
    if rest and rest[0].startswith("-"):
        close = difflib.get_close_matches(rest[0].partition("=")[0], flags, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise DitAttnError(f"unknown flag {shorten(rest[0])}.{hint} `dit-attn {chosen} --help` lists them")
    if rest:
        raise DitAttnError(
            f"dit-attn {chosen} does not know what to do with {shorten(rest[0])}; {_remedy(rest[0], flags)}"
        )
    args.argv = words
    rank, size = process_rank()
    if size > 1 and not COMMANDS[args.command].shares:
        if rank:  # the first process says it
            return BAD_INPUT
        sharing = ", ".join(name for name, row in COMMANDS.items() if row.shares)
        raise DitAttnError(
            f"dit-attn {args.command} runs in one process, and {size} were started; start it without torchrun or "
            f"accelerate launch (commands that share their work: {sharing})"
        )
    return int(_module(args.command).run(args))


def _remedy(word: str, flags: Sequence[str]) -> str:
    """What to do about a word that belongs to no flag: the flag that takes it, where it is a known name."""
    from dit_attn import models
    from dit_attn.cli.method_index import known_methods

    for flag, names in (("--model", models.available()), ("--method", known_methods())):
        if flag in flags and word.partition(":")[0] in names:
            return f"write {flag} {word}"
    return "texts with spaces need quotes"


def groups_of(name: str) -> dict[str, Sequence[Any]]:
    """Return the flags of a command by title of their group."""
    return dict(_module(name).GROUPS)


def _module(name: str) -> Any:
    path = f"{__name__}.commands.{COMMANDS[name].module}"
    try:
        found = importlib.util.find_spec(path)
    except ModuleNotFoundError:  # not even its folder
        found = None
    if found is None:
        raise DitAttnError(f"the command {name!r} is not part of this installation; reinstall dit-attn")
    return importlib.import_module(path)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    print(f"dit-attn: error: {cut(' '.join(message.split()), _LONGEST)}", file=sys.stderr)
    return code
