"""The pass for block statistics in Triton's interpreter, against plain torch in fp64."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from dit_attn.kernels import block_stats
from dit_attn.kernels.block_stats import attention_with_block_stats
from dit_attn.kernels.device import interpreting

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("dim", "dtype", "block", "keys", "statistic", "pooled"),
    (
        (24, torch.float16, 32, "plain", "mass", None),
        (72, torch.bfloat16, 128, "mask", "error", 32),
        (16, torch.bfloat16, 64, "plain", "error", None),
        (16, torch.float16, 64, "bias", "error", 8),
        (16, torch.bfloat16, 256, "plain", "error", 8),
    ),
)
def test_statistics_and_output_are_those_of_the_formulas(
    dim: int, dtype: torch.dtype, block: int, keys: str, statistic: str, pooled: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert interpreting()
    q = random(2, 40, 2, dim, seed=0).to(dtype)
    k, v = random(2, 2, 140, 1, dim, seed=1).to(dtype)
    mask = bias = None
    if keys == "mask":
        mask = torch.ones(2, 140, dtype=torch.bool)
        mask[0, 128:] = mask[1, 30:100] = False
    elif keys == "bias":
        bias = random(2, 2, 140, seed=2)
        bias[1] = float("-inf")  # rows without a key
    attend = partial(
        attention_with_block_stats, key_mask=mask, key_bias=bias, q_block=32, kv_block=block, statistic=statistic,
        pooled=pooled,
    )  # fmt: skip
    found = attend(q, k, v)
    monkeypatch.setattr(block_stats, "_fused", lambda *call: None)
    exact = attend(*(x.double() for x in (q, k, v)))
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(found.blocks.double(), exact.blocks, rtol=5 * limit, atol=limit)
    torch.testing.assert_close(found.out.double(), exact.out, rtol=limit, atol=limit)
    torch.testing.assert_close(found.lse.double(), exact.lse.double(), rtol=1e-5, atol=1e-5)
    assert found.blocks.dtype == torch.float32 and found.blocks.shape == (2, 2, 2, -(-140 // block))
