"""Caching of what depends on sizes and a device alone: layouts and token orders are built once and reused."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from functools import _lru_cache_wrapper

CACHE_SIZE = 64
"""Cached results per function; the least recently used one is evicted first."""

T = TypeVar("T")


def cached(build: Callable[..., T]) -> _lru_cache_wrapper[T]:
    """Cache what ``build`` returns by its arguments, which must be hashable.

    The result is built outside of inference mode: inference tensors can take part in no gradient, and a later caller
    may need one.
    """

    @lru_cache(maxsize=CACHE_SIZE)
    @wraps(build)
    def built(*args: Any) -> T:
        if not torch.is_inference_mode_enabled():
            return build(*args)
        with torch.inference_mode(False):
            return build(*args)

    return built
