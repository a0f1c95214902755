"""The command line: ``dit-attn COMMAND``. One file per command, imported only when its command is used."""

from __future__ import annotations

import argparse
import difflib
import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from dit_attn import __version__
from dit_attn.errors import DitAttnError, broken, unknown

# Command -> the line of `dit-attn --help`. The module of the same name has add_parser(subparsers) and run(args) -> int.
COMMANDS = {
    "generate": "make images or videos from prompts, with or without methods",
    "models": "list the embedded models and the supported families",
    "explain": "say what a method can gain on a model, before a run",
    "doctor": "check versions, devices and kernels",
    "demo": "generate with the embedded models, dense and sparse, and make a picture of both",
    "train": "train an embedded model from its recipe",
    "compare": "measure what methods cost and keep on your prompts, beside dense, and make a page of it",
    "inspect": "measure what attention does in a run, layer by head by step, and make a page of it",
    "calibrate": "find densities by layer and part of the run from a few prompts and a budget",
    "search": "find the attention heads whose perturbation raises an objective",
    "eval": "measure a folder of images or clips against references or captions",
    "bench": "measure kernels and methods",
}
OK, SOME_FAILED, BAD_INPUT, INTERRUPTED = 0, 1, 2, 130


class Parser(argparse.ArgumentParser):
    """An argument parser whose mistakes are one-line errors, like any other bad input; flags are written out."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{**kwargs, "allow_abbrev": False})

    def error(self, message: str) -> NoReturn:
        """Raise instead of printing the usage and leaving."""
        raise DitAttnError(f"{message.rstrip('.')}; see `{self.prog} --help`")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 some items failed, 2 bad input, 130 interrupted."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    try:
        return _dispatch([word for word in words if word != "--debug"])
    except DitAttnError as error:
        return _fail(str(error), BAD_INPUT, debug)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED, debug)
    except BrokenPipeError:
        # The reader of our output has gone (`| head`); nothing is left to say, not even at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return OK
    except Exception as error:
        torn = broken("torchvision", "diffusers, transformers and torchmetrics load it where it is there")
        if torn is not None:
            return _fail(str(torn), BAD_INPUT, debug)
        name = type(error).__name__
        return _fail(f"unexpected {name}: {error}; run again with --debug for the traceback", SOME_FAILED, debug)


def _dispatch(words: list[str]) -> int:
    parser = Parser(
        prog="dit-attn",
        description="Faster and steerable attention for diffusion transformers, on stock diffusers pipelines.",
        epilog="`dit-attn COMMAND --help` lists the flags of a command. Any command takes --debug: show the traceback.",
    )
    parser.add_argument("--version", action="version", version=f"dit-attn {__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    chosen = next((word for word in words if not word.startswith("-")), None)
    if chosen is not None and chosen not in COMMANDS:
        raise unknown("command", chosen, COMMANDS)
    flags: list[str] = []
    for name, line in COMMANDS.items():
        if name == chosen:
            command = _module(name).add_parser(subparsers)
            flags = [flag for action in command._actions for flag in action.option_strings]
        else:
            subparsers.add_parser(name, help=line, add_help=False)
    if not words:
        parser.print_help()
        return OK
    args, rest = parser.parse_known_args(words)
    if rest and rest[0].startswith("-"):
        close = difflib.get_close_matches(rest[0].partition("=")[0], flags, n=1)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise DitAttnError(f"unknown flag {rest[0]!r}.{hint} `dit-attn {chosen} --help` lists them")
    if rest:
        raise DitAttnError(
            f"dit-attn {chosen} does not know what to do with {rest[0]!r}; texts with spaces need quotes"
        )
    args.argv = words
    return int(_module(args.command).run(args))


def _module(name: str) -> Any:
    path = f"{__name__}.{name}"
    if importlib.util.find_spec(path) is None:
        raise DitAttnError(f"the command {name!r} is not part of this installation; reinstall dit-attn")
    return importlib.import_module(path)


def _fail(message: str, code: int, debug: bool) -> int:
    if debug:
        import traceback

        traceback.print_exc()
    print(f"dit-attn: error: {' '.join(message.split())}", file=sys.stderr)
    return code
