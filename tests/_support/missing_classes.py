"""A pytest plugin for older diffusers: a class this version lacks skips the tests that build it, with the reason.

``python -m pytest -p tests._support.missing_classes tests/families``
"""

from __future__ import annotations

from typing import Any, NoReturn

import diffusers
import pytest


def absent(name: str) -> type:
    """A stand-in for a class of another version: building it skips the test."""

    def skip(*args: Any, **kwargs: Any) -> NoReturn:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")

    return type(name, (), {"__new__": skip, "from_config": classmethod(skip), "from_pretrained": classmethod(skip)})


def pytest_configure() -> None:
    """Let ``from diffusers import X`` succeed for every class name."""
    lazy: Any = type(diffusers)
    stock = lazy.__getattr__

    def find(module: Any, name: str) -> Any:
        try:
            return stock(module, name)
        except AttributeError:
            if module.__name__ == "diffusers" and name[:1].isupper():
                return absent(name)
            raise

    lazy.__getattr__ = find
