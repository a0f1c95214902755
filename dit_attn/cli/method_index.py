"""Names of the methods and of their settings, found in their source files: what is misspelt is reported at once.

Importing a method imports torch, which takes seconds. Here nothing is imported: the class statements are parsed.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections.abc import Iterable
from importlib import resources

from dit_attn.errors import unknown
from dit_attn.files import is_place

_IMPORTED = "dit_attn.processors.methods.base"


def check_names(method: str, settings: Iterable[str]) -> None:
    """Refuse a method or a setting that does not exist, before torch is imported.

    Where the methods are imported already, there may be others than those of this package: nothing is checked then, and
    :func:`~dit_attn.cli.resolve_methods.resolve` says it as early.

    Raises:
        DitAttnError: no method of this name, or no setting of this name.
    """
    if _IMPORTED in sys.modules or is_place(method):
        return
    known = declared_settings()
    if method not in known:
        raise unknown("method", method, known)
    for key in settings:
        if key not in known[method]:
            raise unknown(f"setting of {method}", key, known[method])


@functools.cache
def declared_settings() -> dict[str, tuple[str, ...]]:
    """Return the settings of every method of this package by slug, in the order of its fields."""
    classes: dict[str, ast.ClassDef] = {}
    for file in resources.files("dit_attn").joinpath("processors", "methods").iterdir():
        if file.name.endswith(".py"):
            body = ast.parse(file.read_text(encoding="utf-8")).body
            classes |= {node.name: node for node in body if isinstance(node, ast.ClassDef)}
    found = {}
    for name, node in classes.items():
        slug = _slug(node)
        if slug:
            found[slug] = tuple(dict.fromkeys(_fields(name, classes)))
    return dict(sorted(found.items()))


def _annotated(node: ast.ClassDef) -> Iterable[tuple[str, ast.AnnAssign]]:
    for line in node.body:
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name):
            yield line.target.id, line


def _slug(node: ast.ClassDef) -> str | None:
    values = [line.value for name, line in _annotated(node) if name == "slug"]
    return next((str(value.value) for value in values if isinstance(value, ast.Constant)), None)


def _fields(name: str, classes: dict[str, ast.ClassDef]) -> Iterable[str]:
    """Names of the fields of a class, those of its bases first."""
    node = classes.get(name)
    if node is None:
        return
    for base in node.bases:
        yield from _fields(ast.unparse(base), classes)
    yield from (field for field, line in _annotated(node) if not ast.unparse(line.annotation).startswith("ClassVar"))
