"""The methods and their settings, read from their source files: what is wrong with one is reported at once.

Importing a method imports torch, which takes seconds. Here nothing heavy is imported: the class statements are parsed,
and every method gets a stand-in with the same fields, which the same code checks.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import sys
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from dit_attn.cli.resolve_methods import typed_settings
from dit_attn.cli.source_index import evaluate, home_of, parsed, statement
from dit_attn.errors import DitAttnError, unknown
from dit_attn.files import is_place
from dit_attn.settings import check_fields

_PACKAGE = "dit_attn.processors.methods"
_BASE = f"{_PACKAGE}.base"


def known_methods() -> dict[str, Any]:
    """Return the class of every method by slug: its stand-in, or the class itself where the methods are imported."""
    if _BASE in sys.modules:
        from dit_attn.processors.methods import methods

        return dict(sorted(methods().items()))
    return stand_ins()


def check_method(name: str, settings: dict[str, Any]) -> None:
    """Refuse a method or a setting that does not exist, and a value of another type or out of range.

    Where the methods are imported already, nothing is checked: :func:`~dit_attn.cli.resolve_methods.resolve` says it as
    early.

    Args:
        name: slug; or a place of saved settings, which is checked for being there.
        settings: text of the command line, or values of a configuration file.

    Raises:
        DitAttnError: there is no such method or setting, or a value does not fit.
    """
    if is_place(name):
        _check_place(name)
    elif _BASE not in sys.modules:
        known = stand_ins()
        if name not in known:
            raise unknown("method", name, known)
        known[name](**typed_settings(known[name], settings))


def check_roles(names: Iterable[str]) -> None:
    """Refuse methods of one role, which cannot run together. What saved methods do is not known here.

    Args:
        names: slugs or places of the methods that are enabled together.

    Raises:
        DitAttnError: two of them have the same role.
    """
    known = known_methods()
    found: dict[str, str] = {}  # name by role
    for name in names:
        role = known[name].role if name in known else ""
        if role and role in found:
            raise DitAttnError(
                f"{name} and {found[role]} cannot run together: both are {role} methods; enable one of them"
            )
        found[role] = name


@functools.cache
def stand_ins() -> dict[str, Any]:
    """Return a dataclass for every method of this package by slug: its fields, role and docstring, no behaviour."""
    found = [_stand_in(module, name) for module, name in _classes()]
    return {cls.slug: cls for cls in sorted(found, key=lambda cls: cls.slug) if cls.slug}


def module_text(cls: type) -> str:
    """Return the docstring of the module that a method, or the method of a stand-in, is defined in."""
    module = sys.modules.get(cls.__module__)
    return (inspect.getdoc(module) if module else ast.get_docstring(parsed(cls.__module__))) or ""


def _check_place(name: str) -> None:
    """Refuse a file or folder of settings that is not there; ``org/name`` may be on the Hub."""
    path = Path(name).expanduser()
    local = name.startswith((".", "/", "~")) or name.endswith((".json", "/")) or name.count("/") != 1
    if local and not path.exists():
        raise DitAttnError(f"--method {name}: there is no such file or folder; check the path")


def _classes() -> Iterator[tuple[str, str]]:
    """Module and name of every method, those that are bases of others too."""
    for file in resources.files("dit_attn").joinpath("processors", "methods").iterdir():
        if file.name.endswith(".py"):
            module = f"{_PACKAGE}.{file.name.removesuffix('.py')}"
            names = [node.name for node in parsed(module).body if isinstance(node, ast.ClassDef)]
            yield from ((module, name) for name in names if _is_method(module, name))


def _is_method(module: str, name: str) -> bool:
    """Whether a class is ``Method`` or derived from it."""
    return (module, name) == (_BASE, "Method") or any(_is_method(*home) for home in _bases(module, name))


def _bases(module: str, name: str) -> list[tuple[str, str]]:
    """Module and name of the bases of a class that are in the folder of the methods."""
    bases = [base.id for base in getattr(statement(module, name), "bases", ()) if isinstance(base, ast.Name)]
    homes = [home_of(module, base) for base in bases]
    return [home for home in homes if home and home[0].startswith(f"{_PACKAGE}.")]


@functools.cache
def _stand_in(module: str, name: str) -> Any:
    """A dataclass with the fields of one class, derived from the stand-ins of its bases."""
    node = statement(module, name)
    assert isinstance(node, ast.ClassDef)
    fields: list[Any] = []
    space: dict[str, Any] = {"__doc__": ast.get_docstring(node), "__post_init__": check_fields}
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            if not ast.unparse(line.annotation).startswith("ClassVar"):
                fields.append((line.target.id, evaluate(module, line.annotation), evaluate(module, line.value)))
            elif line.target.id in ("slug", "role"):
                space[line.target.id] = evaluate(module, line.value)
    bases = tuple(_stand_in(*home) for home in _bases(module, name) if _is_method(*home))
    cls = dataclasses.make_dataclass(name, fields, bases=bases, namespace=space, kw_only=True, frozen=True)
    cls.__module__ = module
    return cls
