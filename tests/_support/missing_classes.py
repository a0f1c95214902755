"""A pytest plugin for older diffusers: a class this version lacks skips the tests that build it, with the reason.

So does a class of a package of modular pipelines that it lacks.

``python -m pytest -p tests._support.missing_classes tests/families``
"""

from __future__ import annotations

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

import diffusers
import pytest

_MODULAR = "diffusers.modular_pipelines."


def absent(name: str) -> type:
    """A stand-in for a class of another version: building it skips the test."""

    def skip(*args: Any, **kwargs: Any) -> NoReturn:
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")

    return type(name, (), {"__new__": skip, "from_config": classmethod(skip), "from_pretrained": classmethod(skip)})


class AbsentPackages(MetaPathFinder, Loader):
    """Finds every package of modular pipelines that nobody else finds; all of its classes are absent."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """A package that this class loads, for those of modular pipelines."""
        return ModuleSpec(fullname, self, is_package=True) if fullname.startswith(_MODULAR) else None

    def exec_module(self, module: ModuleType) -> None:
        """Give it every class."""

        def find(name: str) -> type:
            if name[:1].isupper():
                return absent(name)
            raise AttributeError(name)

        vars(module)["__getattr__"] = find


def pytest_configure() -> None:
    """Let ``from diffusers import X`` and imports of modular blocks succeed for every class name."""
    sys.meta_path.append(AbsentPackages())
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
