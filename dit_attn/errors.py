"""The one error a user sees: a single line that says what is wrong, why, and what to do."""

from __future__ import annotations

from collections.abc import Iterable


class DitAttnError(ValueError):
    """Bad input from a user. The command line prints it without a traceback and exits with code 2."""


class RunStopped(DitAttnError):
    """Nothing more can be made or kept (a full disk, a missing encoder): no item after this one can succeed either."""


def broken(library: str, why: str) -> DitAttnError | None:
    """What to say of a library that is there and cannot be imported; ``None`` where it can, or is not there at all.

    Args:
        library: name of the module.
        why: who needs it, for the message.
    """
    import importlib.util

    try:
        if importlib.util.find_spec(library) is not None:
            importlib.import_module(library)
    except Exception as error:  # a library that was built for another one raises anything
        line = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        return DitAttnError(
            f"{library} is installed and cannot be imported ({line}), and {why}; install the release of {library} that "
            f"was made for this torch, or run: pip uninstall {library}"
        )
    return None


def unknown(kind: str, value: object, allowed: Iterable[object], remedy: str = "") -> DitAttnError:
    """Error for a value that is not one of a known set; names the closest allowed one.

    Args:
        kind: what the value is, e.g. ``"method"``.
        value: what was given.
        allowed: every accepted value.
        remedy: what to do, when more than "use one of these".
    """
    import difflib

    names = [str(name) for name in allowed]
    close = difflib.get_close_matches(str(value), names, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    return DitAttnError(f"unknown {kind} {value!r}.{hint} Allowed: {', '.join(names)}.{' ' + remedy if remedy else ''}")
