"""What a device can run, known without starting anything on it, and in which precision."""

from __future__ import annotations

import importlib.util
import os
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch


@torch.compiler.assume_constant_result
def refuse_triton_device(device: torch.device) -> str | None:
    """Why Triton kernels cannot run on a device, or ``None``."""
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
def refuse_descriptors(device: torch.device) -> str | None:
    """Why kernels cannot load by tensor descriptors (TMA) on a device, or ``None``."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return "tensor descriptors need compute capability 9.0"
    return None


@torch.compiler.assume_constant_result
def allows_tf32() -> bool:
    """Whether torch lets fp32 products run in tf32 on a GPU."""
    return torch.backends.cuda.matmul.allow_tf32


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """Autocast off: choices of blocks, logits and sums are made in fp32 wherever they are made."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET") == "1" and has_triton()


@lru_cache(maxsize=1)
def has_triton() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None
