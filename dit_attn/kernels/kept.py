"""Keeping what depends on a shape alone: layouts and orders are made once, and serve every later call."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from functools import _lru_cache_wrapper

KEPT = 64
"""Results of each kind that are kept; the least recently used one goes first."""

T = TypeVar("T")


def kept(make: Callable[..., T]) -> _lru_cache_wrapper[T]:
    """Keep what ``make`` returns for the next call with the same arguments.

    It is made outside of inference mode: what is made inside may take part in no gradient, and the next caller may
    want one.
    """

    @lru_cache(maxsize=KEPT)
    @wraps(make)
    def made(*args: Any) -> T:
        if not torch.is_inference_mode_enabled():
            return make(*args)
        with torch.inference_mode(False):
            return make(*args)

    return made
