"""Dense attention is timed with torch's fastest kernel."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch.nn.attention import SDPBackend, _cur_sdpa_kernel_backends

from dit_attn.pipelines.benchmark.attention_call import prefer_dense_kernels, rank_dense_kernels
from tests.pipelines.benchmark.conftest import CPU


def test_dense_kernels_are_tried_in_the_order_given() -> None:
    x = torch.randn(1, 1, 8, 8)
    with prefer_dense_kernels(["flash", "efficient"]):
        assert _cur_sdpa_kernel_backends(with_priority=True)[:2] == [
            SDPBackend.FLASH_ATTENTION,
            SDPBackend.EFFICIENT_ATTENTION,
        ]
        torch.nn.functional.scaled_dot_product_attention(x, x, x)
    before = _cur_sdpa_kernel_backends(with_priority=True)
    with prefer_dense_kernels([]):
        assert _cur_sdpa_kernel_backends(with_priority=True) == before
    assert rank_dense_kernels(cast(Any, None), CPU) == []
