"""The one error a user sees: a single line that says what is wrong, why, and what to do."""

from __future__ import annotations

import reprlib
from collections.abc import Iterable

_LONGEST = 100  # characters of one value in a message


class DitAttnError(ValueError):
    """Bad input from a user. The command line prints it without a traceback and exits with code 2."""


class RunStopped(DitAttnError):
    """Unrecoverable (a full disk, a missing encoder): abort the remaining jobs."""


def import_problem(library: str, why: str) -> DitAttnError | None:
    """Return the error for a library that is installed and cannot be imported; ``None`` if it can, or is not installed.

    Args:
        library: name of the module.
        why: who needs it, for the message.
    """
    import importlib.util

    try:
        if importlib.util.find_spec(library) is not None:
            importlib.import_module(library)
    except Exception as error:  # a library that was built for another one raises anything
        return DitAttnError(
            f"{library} is installed and cannot be imported ({reason(error)}), and {why}; install the release of "
            f"{library} that was made for this torch, or run: pip uninstall {library}"
        )
    return None


_USES_TORCHVISION = {"OmniGenPipeline": "OmniGenPipeline", "CosmosTransformer3DModel": "Cosmos"}
"""Classes of diffusers that cannot be built or do not run without it: "name 'transforms' is not defined"."""


def require_torchvision(*classes: str) -> None:
    """Check that torchvision is there for a pipeline that needs it.

    Args:
        classes: names of the pipeline's class and its transformer's.

    Raises:
        DitAttnError: the pipeline reads or resizes images with torchvision, which is not installed.
    """
    import importlib.util

    user = next((_USES_TORCHVISION[name] for name in classes if name in _USES_TORCHVISION), None)
    if user is not None and importlib.util.find_spec("torchvision") is None:
        raise DitAttnError(f"{user} needs torchvision, which is not installed: pip install torchvision")


def reason(error: BaseException) -> str:
    """Return the first line of an exception's message; its class name when there is none."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return cut(lines[0], 3 * _LONGEST) if lines else type(error).__name__


def shorten(value: object) -> str:
    """Return ``repr(value)``, cut short where it is long; nested values are never written out in full."""
    try:
        return cut(_REPR.repr(value), _LONGEST)
    except Exception:  # a number of more digits than Python writes, a broken __repr__
        return f"a value of type {type(value).__name__}"


def cut(text: str, longest: int) -> str:
    """Return the text, with ``...`` in the place of its middle where it is longer than ``longest`` characters."""
    if len(text) <= longest:
        return text
    head = 2 * longest // 3
    return f"{text[:head]}...{text[len(text) - (longest - 3 - head) :]}"


def _short_repr() -> reprlib.Repr:
    short = reprlib.Repr()
    short.maxlevel, short.maxstring, short.maxlong, short.maxother = 3, _LONGEST, 40, _LONGEST
    short.maxdict = short.maxlist = short.maxtuple = 6
    return short


_REPR = _short_repr()


def unknown(kind: str, value: object, allowed: Iterable[object], remedy: str = "") -> DitAttnError:
    """Build the error for a value that is not one of a known set; it names the closest allowed one.

    Args:
        kind: what the value is, e.g. ``"method"``.
        value: what was given.
        allowed: every accepted value.
        remedy: what to do, when more than "use one of these".
    """
    import difflib

    names = [str(name) for name in allowed]
    close = difflib.get_close_matches(value[:_LONGEST] if isinstance(value, str) else shorten(value), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    allowed_names = f"Allowed: {', '.join(names)}.{' ' + remedy if remedy else ''}"
    return DitAttnError(f"unknown {kind} {shorten(value)}.{hint} {allowed_names}")
