"""Constants and classes of this package read from its source files: importing most of them imports torch."""

from __future__ import annotations

import ast
import functools
import importlib
import itertools
from importlib import resources
from typing import Any


def constant(module: str, name: str) -> Any:
    """Return the value of a name of a module without importing the module, of a dict its keys alone.

    What is no constant (a function, a class), or of another package, is imported.

    Args:
        module: e.g. ``"dit_attn.eval.metrics"``.
        name: e.g. ``"METRICS"``; the module may itself import it.
    """
    home, name = home_of(module, name) or (module, name)
    node = statement(home, name) if home.startswith("dit_attn.") else None
    if not isinstance(node, (ast.Assign, ast.AnnAssign)):
        return getattr(importlib.import_module(home), name)
    if isinstance(node.value, ast.Dict):  # its values may need torch
        pairs = zip(node.value.keys, node.value.values)
        keys = [[evaluate(home, key)] if key else list(evaluate(home, value)) for key, value in pairs]
        return dict.fromkeys(itertools.chain.from_iterable(keys))
    return evaluate(home, node.value)


def evaluate(module: str, node: ast.AST | None) -> Any:
    """Return the value of an expression in a module."""
    return eval(compile(ast.Expression(node), module, "eval"), {}, _Names(module))  # type: ignore[arg-type]


def home_of(module: str, name: str) -> tuple[str, str] | None:
    """Return module and name under which a name of a module of this package was defined; ``None`` for builtins."""
    for node in parsed(module).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                if name == (alias.asname or alias.name):
                    ours = node.module.startswith("dit_attn.")
                    return home_of(node.module, alias.name) if ours else (node.module, alias.name)
    return (module, name) if statement(module, name) is not None else None


def statement(module: str, name: str) -> ast.stmt | None:
    """Return the statement at the top of a module that defines a name."""
    for node in parsed(module).body:
        names: list[Any] = [node.name] if isinstance(node, (ast.ClassDef, ast.FunctionDef)) else []
        if isinstance(node, (ast.Assign, ast.AnnAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names = [target.id for target in targets if isinstance(target, ast.Name)]
        if name in names:
            return node
    return None


@functools.cache
def parsed(module: str) -> ast.Module:
    """Return the syntax tree of a module of this package."""
    *folders, file = module.split(".")[1:]
    folder = resources.files("dit_attn").joinpath(*folders)
    found = folder.joinpath(f"{file}.py")
    return ast.parse((found if found.is_file() else folder.joinpath(file, "__init__.py")).read_text(encoding="utf-8"))


class _Names(dict[str, Any]):
    """What the names in an expression stand for, found when they are needed."""

    def __init__(self, module: str) -> None:
        super().__init__()
        self._module = module

    def __missing__(self, name: str) -> Any:
        if home_of(self._module, name) is None:
            raise KeyError(name)  # a builtin
        return constant(self._module, name)
