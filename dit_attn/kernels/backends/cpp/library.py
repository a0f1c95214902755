"""Compile the C++ kernel, find what was compiled before, and load it.

Nothing is compiled unless asked for: ``dit-attn bench kernels --save`` and :func:`build` do. The result is one file for
each source, torch and set of compiler flags, in the folder ``cpp`` of the package's cache or in that of ``VARIABLE``.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from importlib import resources
from pathlib import Path

import torch

from dit_attn import files
from dit_attn.errors import DitAttnError

SOURCE = "block_sparse.cpp"
BUILD = "dit-attn bench kernels --save"
"""Command that compiles it and measures where it is faster."""
VARIABLE = "DIT_ATTN_CPP"
"""Environment variable with another folder for what is compiled."""
SECONDS = 300  # that a compiler may take; five to ten are usual
_VECTORS = {
    "AVX512": ("-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c"),
    "AVX2": ("-mavx2", "-mfma", "-mf16c"),
}
TYPES = {torch.float32: 0, torch.bfloat16: 1}  # as the library numbers them


def build() -> Path:
    """Compile the C++ kernel for this machine, unless that was done before; return the file.

    Raises:
        DitAttnError: this is no machine for it, there is no compiler, it fails, or the cache cannot be written.
    """
    missing = unsupported_reason_machine()
    if missing:
        raise DitAttnError(f"cannot compile the C++ kernel: {missing}; leave out the backend 'cpp'")
    path = _path()
    if not path.exists():
        _make(path)
    for known in (built, library, _unsupported_reason_type):  # another process may have compiled it
        known.cache_clear()
    return path


def _make(path: Path) -> None:
    compiler = _compiler()
    if compiler is None:
        raise DitAttnError(
            "cannot compile the C++ kernel: there is no C++ compiler; install g++ or clang++, or set CXX to one"
        )
    with files.report_os_error(f"keep the compiled kernel in {path.parent}", f"set {VARIABLE} to a folder to write to"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with files.locked(path.parent, path.name):
            if not path.exists():
                with files.atomic_path(path) as temporary:
                    _compile(compiler, temporary)


@functools.cache
def library() -> ctypes.CDLL | None:
    """Return the compiled kernel, loaded; ``None`` where it was not built or cannot be loaded."""
    if not built():
        return None
    try:
        return ctypes.CDLL(str(_path()))
    except OSError:
        return None


@functools.cache
def built() -> bool:
    """Return whether the kernel was compiled for this machine, as this process first saw it."""
    try:
        return unsupported_reason_machine() is None and _path().exists()
    except (DitAttnError, OSError, RuntimeError):  # no path is named, or there is no home folder
        return False


def unsupported_reason_machine() -> str | None:
    """Return why the kernel cannot be compiled for this machine, or ``None``; a compiler is not looked for."""
    if not sys.platform.startswith("linux"):
        return "it is for Linux"
    if platform.machine() not in ("x86_64", "AMD64") or torch.backends.cpu.get_cpu_capability() not in _VECTORS:
        return "it is for x86 CPUs with AVX2 or AVX-512"
    return None


@torch.compiler.assume_constant_result
def unsupported_reason_here(dtype: torch.dtype) -> str | None:
    """Return why there is no compiled kernel for a type on this machine, or ``None``."""
    missing = unsupported_reason_machine()
    if missing:
        return missing
    return _unsupported_reason_type(dtype) if built() else f"it is not compiled; {BUILD} does"


@functools.cache
def _unsupported_reason_type(dtype: torch.dtype) -> str | None:
    loaded = library()
    if loaded is None:
        return "its compiled file cannot be loaded"
    refused = loaded.dit_attn_supports(TYPES[dtype])
    return "torch's micro-kernel has no product of this type on this CPU" if refused else None


def _path() -> Path:
    flags = " ".join(_flags())
    source = resources.files(__package__).joinpath(SOURCE).read_bytes()
    key = hashlib.sha256(b"\n".join([source, torch.__version__.encode(), flags.encode()])).hexdigest()[:16]
    given = os.environ.get(VARIABLE)
    folder = files.user_path(given, VARIABLE) if given else files.cache_folder() / "cpp"
    return folder / f"block_sparse-{key}.so"


def _flags() -> list[str]:
    vectors = torch.backends.cpu.get_cpu_capability()
    defines = [f"-DCPU_CAPABILITY={vectors}", f"-DCPU_CAPABILITY_{vectors}"]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return ["-O3", "-std=c++20", "-fPIC", "-shared", "-fno-math-errno", *_VECTORS[vectors], *defines, abi]


def _compiler() -> str | None:
    named = os.environ.get("CXX", "").split()[:1]
    return next((found for name in (*named, "g++", "clang++", "c++") if (found := shutil.which(name))), None)


def _compile(compiler: str, path: Path) -> None:
    root = Path(torch.__file__).parent
    with resources.as_file(resources.files(__package__).joinpath(SOURCE)) as source:
        command = [
            compiler, *_flags(), str(source), "-I", str(root / "include"), "-L", str(root / "lib"), "-ltorch_cpu",
            "-lc10", "-o", str(path),
        ]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=False)
        except subprocess.TimeoutExpired:
            raise DitAttnError(f"{compiler} took more than {SECONDS} s to compile the C++ kernel; try again") from None
    if done.returncode:
        lines = done.stderr.splitlines()
        said = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "it says nothing")
        raise DitAttnError(f"{compiler} cannot compile the C++ kernel ({said.strip()}); leave out the backend 'cpp'")
