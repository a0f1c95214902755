"""The methods, one file each, named by their papers. A method registers by being in this folder."""

from __future__ import annotations

import importlib
import pkgutil

from dit_attn.processors.methods.base import REGISTRY, Method

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")


def methods() -> dict[str, type[Method]]:
    """Return every method by slug, those defined outside of this package too."""
    return dict(REGISTRY)
