"""Options of the server plug-ins, from the environment."""

from __future__ import annotations

import inspect
import logging
import os
from collections.abc import Callable, Sequence
from typing import Any

from dit_attn import api, files
from dit_attn.errors import DitAttnError, shorten
from dit_attn.files import is_place
from dit_attn.processors.methods.base import Method, method_class

VARIABLE = "DIT_ATTN_METHODS"
_log = logging.getLogger(__name__)


def requested_methods() -> tuple[str | Method, ...]:
    """Return the methods that the environment names; empty where the variable is not set.

    ``DIT_ATTN_METHODS`` is a slug or several with commas between them (settings of the model's preset), the path of
    saved settings, or a JSON object or list of objects such as ``{"method": "block-sparse", "density": 0.25}``.

    Raises:
        DitAttnError: it is none of these, or a setting does not fit.
    """
    text = os.environ.get(VARIABLE, "").strip()
    try:
        if text[:1] in ("{", "["):
            found = files.parse_json(text)
            methods: tuple[str | Method, ...] = tuple(
                map(Method.from_dict, found if isinstance(found, list) else [found])
            )
        else:
            methods = tuple(map(_named, filter(None, (part.strip() for part in text.split(",")))))
        api.check_conflicts(method for method in methods if isinstance(method, Method))
    except (DitAttnError, ValueError) as error:
        raise DitAttnError(f"{VARIABLE}={shorten(text)}: {error}") from None
    return methods


def enable_on(pipe: Any, methods: Sequence[str | Method]) -> None:
    """Enable methods on a server's pipeline, and log it.

    Raises:
        DitAttnError: as :func:`dit_attn.enable`.
    """
    session = api.enable(pipe, *methods)
    _log.info("dit_attn: enabled on %s: %s", type(pipe).__name__, ", ".join(map(repr, session.methods)))


def check_signature(function: Callable[..., Any], expected: Sequence[str], server: str) -> None:
    """Refuse a function of a server that takes other arguments than the plug-in was written for.

    Args:
        function: the function.
        expected: names of its parameters.
        server: the server and its version that the plug-in was written for.

    Raises:
        DitAttnError: it takes others.
    """
    found = list(inspect.signature(function).parameters)
    if found != list(expected):
        raise DitAttnError(
            f"{getattr(function, '__qualname__', function)} takes ({', '.join(found)}), not ({', '.join(expected)}) as "
            f"in {server}; use that version, or unset {VARIABLE}"
        )


def _named(part: str) -> str | Method:
    """The slug, or the method that was saved at a place."""
    if is_place(part):
        return Method.from_pretrained(part)
    return method_class(part).slug
