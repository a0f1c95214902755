"""The operator against its definition in fp64, on the path that runs everywhere."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_attn.errors import DitAttnError
from dit_attn.kernels import BlockLayout, reference_attention, sparse_attention
from tests._support.kernel_cases import tight

# Largest relative L2 error of the output and absolute error of the log-sum-exp, by input type.
TOLERANCE = {torch.float64: (1e-12, 1e-12), torch.float32: (2e-6, 1e-5), torch.bfloat16: (8e-3, 3e-2)}
EXAMPLES = settings(max_examples=60, deadline=None, derandomize=True)


def random_layout(
    q_len: int, kv_len: int, q_block: int, kv_block: int, lead: tuple[int, int], fraction: float, seed: int
) -> BlockLayout:
    """A random layout, empty rows included."""
    blocks = (-(-q_len // q_block), -(-kv_len // kv_block))
    mask = torch.rand(*lead, *blocks, generator=torch.Generator().manual_seed(seed)) < fraction
    return BlockLayout.from_mask(mask, q_len, kv_len, q_block, kv_block)


def exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layout: BlockLayout, **terms: Any):
    """Output and log-sum-exp of the definition, in fp64."""
    return reference_attention(q.double(), k.double(), v.double(), layout, **terms)


def assert_close(found: Any, expected: Any, dtype: torch.dtype) -> None:
    """Output in relative L2; log-sums equal where finite, ``-inf`` at the same rows."""
    (out, lse), (good, good_lse) = found, expected
    relative, absolute = TOLERANCE[dtype]
    assert out.dtype == dtype and out.shape == good.shape and lse.shape == good_lse.shape
    assert (out.double() - good).norm() <= relative * good.norm()
    rows = torch.isfinite(good_lse)
    assert torch.equal(torch.isfinite(lse), rows)
    if rows.any():
        assert float((lse.double() - good_lse)[rows].abs().max()) <= absolute


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    heads, ratio = draw(st.integers(1, 3)), draw(st.sampled_from((1, 2)))
    return {
        "batch": draw(st.integers(1, 2)),
        "key_heads": heads,
        "heads": heads * ratio,
        "q_len": draw(st.integers(1, 70)),
        "kv_len": draw(st.integers(1, 70)),
        "dim": draw(st.sampled_from((4, 16, 24))),
        "dim_v": draw(st.sampled_from((4, 16))),
        "q_block": draw(st.sampled_from((8, 16, 33))),
        "kv_block": draw(st.sampled_from((8, 16, 20))),
        "dtype": draw(st.sampled_from(tuple(TOLERANCE))),
        "share": draw(st.sampled_from((0.0, 0.2, 0.5, 1.0))),
        "shared": draw(st.booleans()),
        "strided": draw(st.booleans()),
        "mask": draw(st.booleans()),
        "bias": draw(st.booleans()),
        "tight": draw(st.booleans()),
        "seed": draw(st.integers(0, 1000)),
    }


def build(p: dict[str, Any]) -> tuple[tuple[torch.Tensor, ...], BlockLayout, dict[str, Any]]:
    rng = torch.Generator().manual_seed(p["seed"])

    def tensor(seq: int, heads: int, dim: int) -> torch.Tensor:
        x = torch.randn(p["batch"], heads, seq, dim, generator=rng).to(p["dtype"]).transpose(1, 2)
        return x if p["strided"] else x.contiguous()

    q = tensor(p["q_len"], p["heads"], p["dim"])
    k, v = tensor(p["kv_len"], p["key_heads"], p["dim"]), tensor(p["kv_len"], p["key_heads"], p["dim_v"])
    lead = (1, 1) if p["shared"] else (p["batch"], p["heads"])
    layout = random_layout(p["q_len"], p["kv_len"], p["q_block"], p["kv_block"], lead, p["share"], p["seed"])
    terms = {}
    if p["mask"]:
        terms["key_mask"] = torch.rand(p["batch"], p["kv_len"], generator=rng) < 0.7
    if p["bias"]:
        terms["key_bias"] = torch.randn(1, p["heads"], p["kv_len"], generator=rng)
    return (q, k, v), layout, terms


@EXAMPLES
@given(problems())
def test_any_problem_equals_the_definition(p: dict[str, Any]) -> None:
    tensors, layout, terms = build(p)
    with tight(p["tight"]):
        found = sparse_attention(*tensors, layout, return_lse=True, backend="gather", **terms)
    assert_close(found, exact(*tensors, layout, **terms), p["dtype"])


@pytest.mark.parametrize("long", (False, True))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_nan_in_blocks_that_are_not_read_never_reaches_the_output(dtype: torch.dtype, long: bool) -> None:
    blocks = torch.rand(1, 2, 4, 6, generator=torch.Generator().manual_seed(3)) < 0.6
    blocks[:, 0, :, [0, 5]], blocks[:, 1, :, 3] = False, False  # the first, which pads lists, and the ragged one
    layout = BlockLayout.from_mask(blocks, 50, 90, 16, 16)
    q, k, v = (torch.randn(1, n, 2, 16).to(dtype) for n in (50, 90, 90))
    with tight(long):
        clean = sparse_attention(q, k, v, layout, return_lse=True)
    unattended = ~layout.materialize()[0].any(1).transpose(0, 1)
    assert unattended.any()
    for x in (k, v):
        x[0][unattended] = float("nan")
    with tight(long):
        poisoned = sparse_attention(q, k, v, layout, return_lse=True)
    assert all(torch.equal(a, b) for a, b in zip(clean, poisoned))


@pytest.mark.parametrize("long", (False, True))
def test_nan_under_the_key_mask_never_reaches_the_output(long: bool) -> None:
    layout = BlockLayout.dense(20, 40, 16, 16)
    q, k, v = (torch.randn(1, n, 2, 8) for n in (20, 40, 40))
    mask = torch.ones(1, 40, dtype=torch.bool)
    mask[0, 25:] = False
    with tight(long):
        clean = sparse_attention(q, k, v, layout, key_mask=mask, backend="gather")
        k[0, 25:], v[0, 25:] = float("nan"), float("nan")
        assert torch.equal(clean, sparse_attention(q, k, v, layout, key_mask=mask, backend="gather"))


def test_a_row_without_keys_gives_zero_and_minus_infinity() -> None:
    blocks = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    blocks[..., 1, :] = False
    layout = BlockLayout.from_mask(blocks, 40, 40, 16, 16)
    q, k, v = (torch.randn(2, 40, 2, 8) for _ in range(3))
    out, lse = sparse_attention(q, k, v, layout, return_lse=True)
    assert (out[:, 16:32] == 0).all() and (lse[..., 16:32] == float("-inf")).all()
    assert torch.isfinite(lse[..., :16]).all() and torch.isfinite(out).all()


def test_masking_every_key_gives_zero_and_minus_infinity() -> None:
    q, k, v = (torch.randn(1, 20, 1, 8) for _ in range(3))
    nothing = torch.zeros(1, 20, dtype=torch.bool)
    layout = BlockLayout.dense(20, 20, 8, 8)
    out, lse = sparse_attention(q, k, v, layout, key_mask=nothing, return_lse=True, backend="gather")
    assert (out == 0).all() and (lse == float("-inf")).all()


def test_gradients_of_the_gather_path_are_right() -> None:
    layout = random_layout(20, 26, 8, 8, (1, 2), 0.6, 1)
    q = torch.randn(1, 20, 2, 4, dtype=torch.float64, requires_grad=True)
    k, v = (torch.randn(1, 26, 1, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda *x: sparse_attention(*x, layout, backend="gather"), (q, k, v))


@pytest.mark.parametrize(
    ("change", "words"),
    (
        ({"q": torch.randn(1, 2, 20)}, ("q", "(B, S, H, D)")),
        ({"k": torch.randn(1, 20, 2, 8).double()}, ("k", "cast")),
        ({"k": torch.randn(1, 20, 2, 4)}, ("D", "4")),
        ({"k": torch.randn(1, 20, 3, 8), "v": torch.randn(1, 20, 3, 8)}, ("heads", "multiple")),
        ({"layout": BlockLayout.dense(24, 24, 8, 8)}, ("layout", "build the layout")),
        ({"key_mask": torch.ones(1, 19, dtype=torch.bool)}, ("key_mask", "(B, Sk)")),
        ({"key_bias": torch.ones(1, 2, 19)}, ("key_bias", "Sk")),
        ({"backend": "gathr"}, ("gathr", "gather")),
    ),
)
def test_bad_input_is_one_line_that_names_the_argument_and_the_fix(change: dict[str, Any], words: tuple) -> None:
    good = {name: torch.randn(1, 20, 2, 8) for name in ("q", "k", "v")}
    call: dict[str, Any] = {**good, "layout": BlockLayout.dense(20, 20, 8, 8), **change}
    with pytest.raises(DitAttnError) as caught:
        sparse_attention(**call)
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words), message
