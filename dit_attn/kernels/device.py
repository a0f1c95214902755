"""Properties of a device, known without starting anything on it: its kernels, its precision, its working sizes."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache

import torch


@dataclass(frozen=True)
class ChunkSizes:
    """Working sizes that suit a device, in bytes.

    Attributes:
        chunk: gathered keys, values and logits computed at a time, per thread.
        group: K and V, or q and o, copied into blocks at a time; a longer head is taken alone.
        pooled: logits against pooled keys computed at a time; several buffers of this size exist at once.
    """

    chunk: int
    group: int
    pooled: int


CHUNK_SIZES = {"cpu": ChunkSizes(chunk=2 << 20, group=2 << 20, pooled=1 << 20)}  # fits the cache
ACCELERATOR = ChunkSizes(chunk=256 << 20, group=512 << 20, pooled=256 << 20)  # keeps every multiprocessor busy


def chunk_sizes(device: torch.device) -> ChunkSizes:
    """Return the working sizes for a device."""
    return CHUNK_SIZES.get(device.type, ACCELERATOR)


def host_readable(x: torch.Tensor) -> bool:
    """Return whether the host can read ``x`` without a synchronisation: on the CPU, and nothing is being traced."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def lse_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of the log-sum-exp for inputs of a dtype: fp64 for fp64, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Turn autocast off on a device, so that scores, logits and sums stay in the dtype they are computed in."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


_AMX = {torch.bfloat16: "_is_amx_tile_supported", torch.float16: "_is_amx_fp16_supported"}


@torch.compiler.assume_constant_result
def unsupported_reason_amx(dtype: torch.dtype) -> str | None:
    """Return why torch cannot multiply matrices of a dtype by AMX on this CPU, or ``None`` if it can."""
    if dtype not in _AMX:
        return "AMX is for bf16 and fp16"
    name = str(dtype).removeprefix("torch.")
    if not getattr(torch.cpu, _AMX[dtype], lambda: False)():  # older versions of torch lack the one for fp16
        return f"this CPU has no AMX for {name}"
    if not torch.backends.mkldnn.is_available() or not getattr(torch.cpu, "_init_amx", lambda: True)():
        return f"this torch or this system lets no process use AMX for {name}"
    return None


# -- Triton ------------------------------------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def unsupported_reason_triton(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on a device, or ``None`` if they can."""
    if not has_triton():
        return "triton is not installed (pip install 'dit-attn[triton]')"
    if device.type == "cpu":
        return None if interpreting() else "it runs on CPU tensors only in Triton's interpreter (TRITON_INTERPRET=1)"
    if device.type != "cuda" or torch.version.hip:
        return "the kernels are for NVIDIA GPUs"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


@torch.compiler.assume_constant_result
def unsupported_reason_descriptors(device: torch.device) -> str | None:
    """Return why kernels cannot load by tensor descriptors (TMA) on a device, or ``None`` if they can."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return "tensor descriptors need compute capability 9.0"
    return None


@torch.compiler.assume_constant_result
def allows_tf32() -> bool:
    """Return whether torch allows fp32 matrix products to run in tf32 on a GPU."""
    return torch.backends.cuda.matmul.allow_tf32


def interpreting() -> bool:
    """Return whether Triton interprets kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1" and has_triton()


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Return whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None
