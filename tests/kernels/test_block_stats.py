"""Exact attention with block statistics: the output is dense attention, the statistics follow their definition."""

from __future__ import annotations

import pytest
import torch

from dit_attn import DitAttnError
from dit_attn.kernels import block_stats
from dit_attn.kernels.backends.reference import reference_attention
from dit_attn.kernels.block_stats import attention_with_block_stats
from dit_attn.kernels.layouts.block_layout import BlockLayout


def random_call(dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    q = torch.randn(2, 37, 4, 8, generator=draw, dtype=dtype)
    k, v = (torch.randn(2, 45, 2, 8, generator=draw, dtype=dtype) for _ in range(2))
    mask = torch.ones(2, 45, dtype=torch.bool)
    mask[1, 40:] = mask[1, 8:16] = False
    return {"q": q, "k": k, "v": v, "key_mask": mask}


def definition(given: dict[str, torch.Tensor], pooled: int | None, statistic: str) -> torch.Tensor:
    """(B, H, nq, nk) row by row."""
    q, k, v, mask = given["q"], given["k"], given["v"], given["key_mask"]
    found = torch.zeros(2, 4, 5, 6, dtype=torch.float64)
    for b in range(2):
        for h in range(4):
            for i in range(37):
                logits = k[b, :, h // 2] @ q[b, i, h] * 8**-0.5
                logits = logits.masked_fill(~mask[b], float("-inf"))
                lse = logits.logsumexp(0)
                p, values = (logits - lse).exp(), v[b, :, h // 2]
                out = p @ values
                for j in range(6):
                    at = torch.arange(8 * j, min(8 * j + 8, 45))
                    at = at[mask[b, at]]
                    if statistic == "mass":
                        found[b, h, i // 8, j] += p[at].sum()
                        continue
                    change = (p[at, None] * (values[at] - out)).sum(0)
                    for low in range(8 * j, 8 * j + 8, pooled or 8):
                        own = at[(at >= low) & (at < low + (pooled or 8))]
                        if pooled is None or not len(own):
                            continue
                        mean = k[b, own, h // 2].mean(0) @ q[b, i, h] * 8**-0.5
                        change = change - len(own) * (mean - lse).exp() * (values[own].mean(0) - out)
                    found[b, h, i // 8, j] += change.square().sum()
    return found


@pytest.mark.parametrize("statistic, pooled", [("mass", None), ("error", None), ("error", 4), ("error", 8)])
@pytest.mark.parametrize("small", [False, True])
def test_statistics_follow_their_definition(
    statistic: str, pooled: int | None, small: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_stats, "AT_ONCE", 1 if small else 2**26)
    given = random_call()
    found = attention_with_block_stats(**given, q_block=8, kv_block=8, statistic=statistic, pooled=pooled)
    tolerance = {"atol": 1e-12, "rtol": 1e-9} if pooled is None else {"atol": 1e-6, "rtol": 1e-6}  # pooled in fp32
    torch.testing.assert_close(found.blocks, definition(given, pooled, statistic), **tolerance)
    out, lse = reference_attention(**given, layout=BlockLayout.dense(37, 45, 8, 8))
    torch.testing.assert_close(found.out, out, atol=1e-12, rtol=1e-9)
    torch.testing.assert_close(found.lse, lse, atol=1e-12, rtol=1e-9)


def test_bf16_is_as_exact_as_its_inputs_and_rows_without_keys_are_zero() -> None:
    given = random_call(torch.bfloat16)
    given["key_mask"][0] = False
    found = attention_with_block_stats(**given, q_block=16, kv_block=16)
    assert found.out.dtype == torch.bfloat16 and found.blocks.dtype == torch.float32
    assert not found.out[0].any() and not found.blocks[0].any() and bool((found.lse[0] == float("-inf")).all())
    wide = {name: x.double() if x.is_floating_point() else x for name, x in given.items()}
    exact = attention_with_block_stats(**wide, q_block=16, kv_block=16)
    torch.testing.assert_close(found.out[1].double(), exact.out[1], atol=5e-3, rtol=1e-2)


def test_a_bias_of_the_mask_counts_and_an_unknown_statistic_is_refused() -> None:
    given = random_call()
    bias = torch.zeros(2, 1, 45).masked_fill(~given["key_mask"][:, None], float("-inf"))
    masked = attention_with_block_stats(**given, q_block=8, kv_block=8, pooled=4)
    biased = attention_with_block_stats(**given, key_bias=bias, q_block=8, kv_block=8, pooled=4)
    torch.testing.assert_close(masked.blocks, biased.blocks)
    with pytest.raises(DitAttnError, match="block statistic"):
        attention_with_block_stats(**given, q_block=8, kv_block=8, statistic="max")
