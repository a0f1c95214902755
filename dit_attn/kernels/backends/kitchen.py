"""Dense attention in INT8 by comfy-kitchen, for NVIDIA and AMD GPUs; only on request.

Of what comfy-kitchen 0.2.40 has, one function runs a call of ours: ``int8_attention``, dense. ``sol_attn``, its sparse
kernel, takes no list of blocks, since it chooses them itself; ``na3d``, its windows, has heads of 64 channels at most
on NVIDIA GPUs. ``docs/kernels.md`` has the details.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import lru_cache

import torch

from dit_attn.errors import DitAttnError, reason
from dit_attn.kernels.problem import Problem

MODULE = "comfy_kitchen"
HEAD_DIM = 256  # the largest
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def kitchen_attention(problem: Problem) -> torch.Tensor:
    """Run ``comfy_kitchen.int8_attention`` on a dense call: o (B, Sq, H, D).

    q and k are rounded to 8 bits per group of rows, v per channel; fp32 comes back with the precision of bf16.

    Raises:
        DitAttnError: the package cannot be imported, has no kernel for the GPU, or refuses the call.
    """
    try:
        kitchen = importlib.import_module(MODULE)
    except Exception as error:  # an extension that was built for another torch or driver raises anything
        raise DitAttnError(
            f"comfy-kitchen cannot be imported ({type(error).__name__}: {reason(error)}); reinstall it with "
            "`pip install 'dit-attn[kitchen]'`, or leave backend='comfy-kitchen' out"
        ) from error
    q, k, v = (_last_contiguous(x.transpose(1, 2)) for x in (problem.q, problem.k, problem.v))
    if not kitchen.int8_attention_is_available(q.device):
        raise DitAttnError(
            f"comfy-kitchen has no INT8 attention for {q.device}, which takes its extension and an NVIDIA GPU of "
            "compute capability 7.5 or an AMD GPU with matrix cores (RDNA3); leave backend='comfy-kitchen' out"
        )
    try:
        out: torch.Tensor = kitchen.int8_attention(q, k, v, scale=problem.scale)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DitAttnError(
            f"comfy-kitchen refuses the call ({reason(error)}); leave backend='comfy-kitchen' out"
        ) from error
    return out.transpose(1, 2)


def unsupported_reason_kitchen(device: torch.device) -> str | None:
    """Return why comfy-kitchen cannot run on a device, or ``None``; the package is not imported."""
    if not has_kitchen():
        return "comfy-kitchen is not installed (pip install 'dit-attn[kitchen]')"
    if device.type != "cuda":
        return "its INT8 attention is for GPUs"
    if not torch.version.hip and torch.cuda.get_device_capability(device) < (7, 5):
        return "the GPU is older than compute capability 7.5"
    return None


@lru_cache(maxsize=1)
def has_kitchen() -> bool:
    """Return whether comfy-kitchen is installed."""
    return importlib.util.find_spec(MODULE) is not None


def _last_contiguous(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()
