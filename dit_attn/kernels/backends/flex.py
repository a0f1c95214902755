"""torch's FlexAttention on the same layouts, for comparison; only on request."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import Any

import torch

from dit_attn.kernels.layouts.block_layout import BlockLayout
from dit_attn.kernels.layouts.flex_mask import to_flex
from dit_attn.kernels.problem import Problem


def flex_backend(problem: Problem) -> tuple[torch.Tensor, torch.Tensor]:
    """Run FlexAttention: o (B, Sq, H, Dv), lse (B, H, Sq) natural logarithm. Compiled on a GPU, unfused elsewhere."""
    q, k, v = (x.transpose(1, 2) for x in (problem.q, problem.k, problem.v))
    with warnings.catch_warnings():  # intended on a CPU
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        out, extra = _attention(problem.on_host)(
            q, k, v, block_mask=_mask_of(problem.layout), scale=problem.scale, enable_gqa=problem.ratio > 1,
            **_lse_argument(),
        )  # fmt: skip
    return out.transpose(1, 2), getattr(extra, "lse", extra)


def _lse_argument() -> dict[str, Any]:
    """The argument that requests the log-sum-exp, which newer versions of torch spell differently."""
    from torch.nn.attention import flex_attention as module

    request = getattr(module, "AuxRequest", None)
    return {"return_lse": True} if request is None else {"return_aux": request(lse=True)}


def _mask_of(layout: BlockLayout) -> Any:
    """The layout's BlockMask, built once and cached on the layout."""
    if "flex" not in layout.__dict__:
        layout.__dict__["flex"] = to_flex(layout)
    return layout.__dict__["flex"]


@lru_cache(maxsize=2)
def _attention(eager: bool) -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention if eager else torch.compile(flex_attention, dynamic=False)
