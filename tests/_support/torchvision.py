"""torchvision beside a torch without CUDA: its Python parts import once the schemas of two operators are declared.

The wheel of the registry is linked against CUDA libraries: without them its operators do not load, and importing it
stops at the first one that is missing. Transforms and model classes call none of them. The Makefile installs the wheel,
and torch-fidelity that stands on it, into a folder that only the tests look into: to everything else in the
environment, and to the processes that tests start, torchvision would be a package that fails to import.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.metadata import Distribution, DistributionFinder, MetadataPathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

FOLDER = Path(sys.prefix, "test-packages")
OPERATORS = ("nms", "qnms")
_declared: list[Any] = []  # the operators exist as long as the library object does


class Finder(MetaPathFinder):
    """Finds the packages of a folder that is not on ``sys.path``, after everything that is."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        """Where a package of the folder is; torchvision's operators are declared right before it runs."""
        spec = PathFinder.find_spec(name, [str(FOLDER)]) if path is None else None
        if name == "torchvision" and spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def run_with_operators(module: ModuleType) -> None:
                declare_operators()
                run(module)

            spec.loader.exec_module = run_with_operators  # type: ignore[method-assign]
        return spec

    def find_distributions(self, context: Any) -> Iterable[Distribution]:
        """Metadata of a package of the folder: diffusers and transformers ask for torchvision's version."""
        return MetadataPathFinder.find_distributions(DistributionFinder.Context(name=context.name, path=[str(FOLDER)]))


def declare_operators(folder: Path = FOLDER) -> None:
    """Declare the schemas of the operators of the torchvision in ``folder``, unless its compiled library loads."""
    import torch

    if _declared:
        return
    try:
        for compiled in folder.glob("torchvision/_C*"):
            torch.ops.load_library(compiled)
    except OSError:
        library = torch.library.Library("torchvision", "DEF")
        for name in OPERATORS:
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declared.append(library)


def install() -> None:
    """Let the tests import what lies in the folder; call it before diffusers and transformers look for torchvision."""
    if FOLDER.is_dir():
        sys.meta_path.append(Finder())
