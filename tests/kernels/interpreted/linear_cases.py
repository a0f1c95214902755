"""Triton's kernels of linear attention in its interpreter, forward and backward, against the definition in fp64."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.linear.test_linear_attention import drawn, results

TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize(
    ("name", "dim", "heads", "marginal", "weighted", "dtype"),
    (
        ("softmax", 24, 2, True, True, torch.float32),
        ("elu", 16, 1, True, False, torch.float16),
        ("relu", 16, 2, False, True, torch.float32),
        ("softmax", 16, 1, False, False, torch.bfloat16),
    ),
)
def test_results_and_gradients_equal_the_definition_and_nan_in_missing_keys_goes_nowhere(
    name: str, dim: int, heads: int, marginal: bool, weighted: bool, dtype: torch.dtype
) -> None:
    case = drawn(dim=dim, value_dim=16, key_heads=heads, marginal=marginal, weighted=weighted, blocks=(32, 16))
    expected = results(case, name, "reference", torch.float64, rounded=dtype)
    if weighted:
        missing = (case["key_weight"][:, 0] == 0)[..., None, None]
        assert missing.any()
        case |= {x: case[x].masked_fill(missing, float("nan")) for x in "kv"}
    for found, wanted in zip(results(case, name, "triton", dtype), expected, strict=True):
        error = (found.double() - wanted).norm() / wanted.norm()
        assert error < TOLERANCE[dtype], error
