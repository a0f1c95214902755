"""A pytest plug-in: every supported transformer that a test builds gets a method. Knows no test of diffusers.

The environment variable ``DIT_ATTN_METHOD`` names the method of :data:`METHODS`; without it nothing is changed. What
happened is printed as one JSON line at the end.
"""

from __future__ import annotations

import functools
import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers

import dit_attn
from dit_attn.processors.attach.families import families
from dit_attn.processors.core import executor
from dit_attn.processors.methods.sparse import SparseMethod

# The models of the tests have a few dozen tokens: small blocks, and no step, layer or length stays dense.
_SMALL = {"q_block": 8, "kv_block": 8, "dense_steps": 0}
METHODS: dict[str, tuple[dit_attn.Method, ...]] = {
    "pass-through": (),
    "block-sparse": (dit_attn.BlockSparse(density=0.5, **_SMALL),),
    "rectified-spaattn": (dit_attn.RectifiedSpaAttn(density=0.5, **_SMALL),),
    "re-ttention": (dit_attn.ReTtention(density=0.5, **_SMALL),),
    "softpag": (dit_attn.SoftPAG(),),
}
COUNTS: Counter[str] = Counter()


def pytest_configure() -> None:
    """Let the constructor of each transformer of the family table enable the method."""
    method = os.environ.get("DIT_ATTN_METHOD")
    if not method:
        return
    SparseMethod.min_tokens = 0
    _count_calls()
    for name in dict.fromkeys(name for family in families() for name in family.transformers):
        cls = getattr(diffusers, name, None)
        if isinstance(cls, type):
            cls.__init__ = _enabling(cls.__init__, METHODS[method])


def pytest_unconfigure() -> None:
    """Write what the plug-in did to the file that the environment variable ``DIT_ATTN_COUNTS`` names."""
    if place := os.environ.get("DIT_ATTN_COUNTS"):
        Path(place).write_text(json.dumps(COUNTS))


def _count_calls() -> None:
    stock = executor.run

    @functools.wraps(stock)
    def run(*args: Any) -> Any:
        COUNTS["calls carried out"] += 1
        return stock(*args)

    executor.run = run


def _enabling(stock: Any, methods: tuple[dit_attn.Method, ...]) -> Any:
    @functools.wraps(stock)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        outermost = not self.__dict__.get("_being_built")
        self.__dict__["_being_built"] = True
        try:
            stock(self, *args, **kwargs)
        finally:
            if outermost:
                self.__dict__.pop("_being_built", None)
        if outermost:
            try:
                dit_attn.enable(self, *methods)
                COUNTS["models"] += 1
            except dit_attn.DitAttnError as error:
                COUNTS[f"refused: {error}"] += 1

    return __init__
