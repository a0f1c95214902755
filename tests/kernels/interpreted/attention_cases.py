"""Triton's attention kernels, forward and backward, in its interpreter against the formulas in fp64."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_attn.errors import DitAttnError
from dit_attn.kernels import BlockLayout, choose_backend, sparse_attention
from dit_attn.kernels.backends.custom_ops import flat_call, flat_terms, fused_attention_op, sparse_attention_op
from dit_attn.kernels.device import interpreting
from dit_attn.kernels.problem import Problem
from dit_attn.kernels.terms import NO_TERMS, Terms, pooled_compensation
from tests._support.definition import definition, wide
from tests._support.kernel_cases import LAYOUTS, TERMS, bits_layout, call
from tests.kernels.test_terms import agree, attend

TOLERANCE = {torch.float32: 4e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def test_the_interpreter_is_on() -> None:
    assert interpreting()
    p = call()
    assert choose_backend(p.q, p.layout).backend == "triton"


def test_compiled_code_sees_the_same_backend() -> None:
    p = call()

    def attend(q: torch.Tensor) -> torch.Tensor:
        return sparse_attention(q, p.k, p.v, p.layout, scale=p.scale)  # type: ignore[return-value]

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(p.q), attend(p.q))


@pytest.mark.parametrize(
    ("dim", "dtype"),
    [(dim, torch.float32) for dim in (16, 24, 64, 72, 96, 128)]
    + [(dim, dtype) for dim in (16, 72) for dtype in (torch.bfloat16, torch.float16)],
)
def test_every_head_size_and_type(dim: int, dtype: torch.dtype) -> None:
    p = call(dtype, dim)
    out, lse = attend(p, NO_TERMS, "triton")
    expected = definition(p)
    agree((out,), expected[:1], TOLERANCE[dtype])
    agree((lse,), expected[1:], 4e-6)  # the log-sum-exp is fp32 whatever the type


@pytest.mark.parametrize(("dim", "keys"), ((16, "mask"), (16, "bias"), (24, "both")))
@pytest.mark.parametrize("name", ("none", "lengths", "variance", "barred pooled keys", "everything"))
def test_masks_and_biases_of_keys_join_every_term(name: str, keys: str, dim: int) -> None:
    p = call(dim=dim, key_mask=keys != "bias", key_bias=keys != "mask")
    terms = TERMS[name](p)
    agree(attend(p, terms, "triton"), definition(p, terms), 4e-6)


@pytest.mark.parametrize("name", TERMS)
def test_every_term_does_what_its_formula_says(name: str) -> None:
    p = call()
    terms = TERMS[name](p)
    agree(attend(p, terms, "triton"), definition(p, terms), 4e-6)


@pytest.mark.parametrize("dim", (16, 24))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("rise", (-200.0, 20.0, 65.0, 75.0, 400.0))
@pytest.mark.parametrize("pooled", (False, True))
def test_logits_may_rise_or_fall_by_any_amount_after_the_first_keys(
    pooled: bool, rise: float, dtype: torch.dtype, dim: int
) -> None:
    p = call(dtype, dim)
    q, k = p.q.clone(), p.k.clone()
    q[..., 0] = 8.0
    k[..., 0] = rise / (8 * p.scale) * torch.arange(90)[None, :, None] / 90  # from one tile of 16 keys to the next
    p = replace(p, q=q, k=k)
    terms = Terms(compensation=pooled_compensation(p.k, p.v, 16)) if pooled else NO_TERMS
    out, lse = attend(p, terms, "triton")
    expected = definition(p, terms)
    agree((out,), expected[:1], max(TOLERANCE[dtype], 1e-4))  # logits of 400 have an error of 2e-5 in fp32
    agree((lse,), expected[1:], 1e-4)


@pytest.mark.parametrize("tokens", (16, 32))
def test_pooled_keys_of_any_size_and_type_join_16_bit_queries(tokens: int) -> None:
    p = call(torch.float16, 72)
    wider = replace(p, k=p.k.float(), v=p.v.float())
    terms = Terms(compensation=pooled_compensation(wider.k, wider.v, tokens, variance=True))
    agree(attend(p, terms, "triton"), definition(p, terms), TOLERANCE[torch.float16])


@pytest.mark.parametrize(("block", "tokens", "keys"), ((64, 64, 4480), (64, 32, 1500), (128, 4, 700), (48, 16, 500)))
def test_pooled_keys_of_many_blocks_know_which_of_these_are_chosen(block: int, tokens: int, keys: int) -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, n, 2, 16, generator=rng).to(torch.bfloat16) for n in (40, keys, keys))
    chosen = torch.rand(1, 2, 1, -(-keys // block), generator=rng) < 0.3
    layout = BlockLayout.from_mask(chosen, 40, keys, 64, block)
    p = Problem(q, k, v, layout, 0.25, None, None)
    terms = Terms(compensation=pooled_compensation(k, v, tokens))
    agree(attend(p, terms, "triton"), definition(p, terms), TOLERANCE[torch.bfloat16])


def test_the_square_of_a_large_query_stays_within_fp16() -> None:
    p = call(torch.float16, 24)
    p = replace(p, q=p.q.index_fill(1, torch.arange(0, 70, 7), 300.0), k=p.k * 0.01)
    terms = Terms(compensation=pooled_compensation(p.k, p.v, 16, variance=True))
    agree(attend(p, terms, "triton"), definition(p, terms), TOLERANCE[torch.float16])


@pytest.mark.skipif(sys.maxsize < 2**33, reason="needs a 64-bit address space")
def test_offsets_past_two_to_the_31st_element_are_right() -> None:
    """Batch rows, heads and lists that lie further apart than an int32 reaches; the memory between is never touched."""
    p = call(torch.float16)
    far = {name: apart(getattr(p, name)) for name in "qkv"}
    assert all(x.stride(0) > 2**31 for x in far.values())
    agree(attend(replace(p, **far), NO_TERMS, "triton"), definition(p), TOLERANCE[torch.float16])


def apart(x: torch.Tensor) -> torch.Tensor:
    """The same numbers, batch rows 2^31 elements apart."""
    stride = (2**31 + 8, *x.stride()[1:])
    wide = torch.empty(stride[0] * (x.shape[0] - 1) + x[0].numel(), dtype=x.dtype).as_strided(x.shape, stride)
    return wide.copy_(x)


@pytest.mark.parametrize("keys", (False, True))
@pytest.mark.parametrize("name", LAYOUTS)
def test_element_masks_hide_exactly_what_they_say(name: str, keys: bool) -> None:
    p = call(layout=LAYOUTS[name](), key_mask=keys, key_bias=keys)
    agree(attend(p, NO_TERMS, "triton"), definition(p), 4e-6)


@pytest.mark.parametrize("name", ("none", "lengths", "compensation"))
def test_nan_in_skipped_keys_never_reaches_the_output(name: str) -> None:
    p = call(key_mask=True)
    terms = TERMS[name](p)
    blocks = p.layout.block_mask().any(2).any(1)  # (2, nk) attended to by some head
    blocks[:, -1] = False
    layout = BlockLayout.from_mask(p.layout.block_mask() & blocks[:, None, None], 70, 90, 32, 32)
    token_read = blocks.repeat_interleave(32, 1)[:, :90] & p.key_mask
    if terms.key_lengths is not None:
        token_read &= torch.arange(90) < terms.key_lengths[:, None]
    k, v = (x.masked_fill(~token_read[..., None, None], float("nan")) for x in (p.k, p.v))
    clean = replace(p, layout=layout)
    for found, expected in zip(attend(replace(clean, k=k, v=v), terms, "triton"), attend(clean, terms, "triton")):
        assert torch.equal(found, expected)


BACKWARD = {None: lambda: None, **LAYOUTS, "bits of 64 x 48": lambda: bits_layout(64, 48)}


@pytest.mark.parametrize("layout", (None, "window", "band", "segments", "bits", "bits of 64 x 48"))
@pytest.mark.parametrize(("dim", "keys"), ((16, False), (24, True)))
def test_gradients_equal_those_of_the_formulas(layout: str | None, keys: bool, dim: int) -> None:
    p = call(dim=dim, key_mask=keys, key_bias=keys, layout=BACKWARD[layout]())
    for found, expected in zip(gradients(p, "triton"), gradients(wide(p), None)):
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)


def test_gradients_are_the_same_with_the_products_of_gpus_before_hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    p = call(torch.bfloat16, 16)
    later = gradients(p, "triton")
    monkeypatch.setattr("dit_attn.kernels.backends.triton.attention._capability", lambda device: 80)
    for found, expected in zip(gradients(p, "triton"), later):
        assert (found - expected).float().norm() < 0.01 * expected.float().norm()


def test_gradients_in_bf16_and_twice_the_same() -> None:
    p = call(torch.bfloat16, 64)
    first, again = gradients(p, "triton"), gradients(p, "triton")
    for found, expected in zip(first, gradients(wide(p), None)):
        assert (found.double() - expected).norm() < 0.02 * expected.norm()
    assert all(torch.equal(a, b) for a, b in zip(first, again))


def test_gradients_through_the_terms() -> None:
    p = call()
    terms = TERMS["everything"](p)
    for found, expected in zip(gradients(p, "triton", terms), gradients(wide(p), None, terms)):
        torch.testing.assert_close(found.double(), expected, rtol=2e-5, atol=2e-5)


def gradients(p: Problem, backend: str | None, terms: Terms = NO_TERMS) -> list[torch.Tensor]:
    """Of q, k, v and the key bias; ``backend=None`` is the definition."""
    given = [x.detach().requires_grad_() for x in (p.q, p.k, p.v)]
    bias = None if p.key_bias is None else p.key_bias.detach().requires_grad_()
    p = replace(p, q=given[0], k=given[1], v=given[2], key_bias=bias)
    out, lse = definition(p, terms) if backend is None else attend(p, terms, backend)
    rng = torch.Generator().manual_seed(6)
    on_out, on_lse = (torch.randn(x.shape, generator=rng) for x in (out, lse))
    total = (out * on_out).sum() + (lse * on_lse)[torch.isfinite(lse)].sum()
    return list(torch.autograd.grad(total, [*given, *([] if bias is None else [bias])]))


@pytest.mark.parametrize("variant", ("plain", "segments"))
def test_the_operators_are_registered_as_torch_requires(variant: str) -> None:
    p = call(key_mask=True, key_bias=True) if variant == "plain" else call(layout=LAYOUTS[variant]())
    if variant == "plain":
        blocks = p.layout.block_mask() | (torch.arange(3) == 0)
        p = replace(p, layout=BlockLayout.from_mask(blocks, 70, 90, 32, 32))  # finite sums only
    p = replace(p, q=p.q.requires_grad_(), k=p.k.requires_grad_(), v=p.v.requires_grad_())
    torch.library.opcheck(sparse_attention_op, (*flat_call(p), "triton"))
    p = replace(p, q=p.q.detach(), k=p.k.detach(), v=p.v.detach())
    terms = TERMS["everything"](p) if variant == "plain" else NO_TERMS
    torch.library.opcheck(fused_attention_op, (*flat_call(p), *flat_terms(terms), "triton"))


@settings(max_examples=10, deadline=None, derandomize=True)
@given(
    st.tuples(st.integers(1, 70), st.integers(1, 70)), st.sampled_from((16, 32, 48)), st.sampled_from((16, 32, 64)),
    st.sampled_from((16, 40)), st.sampled_from(((1, 1), (2, 1), (3, 3))), st.integers(0, 9), st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_any_shape_and_any_strides(
    lengths: tuple[int, int], q_block: int, kv_block: int, dim: int, heads: tuple[int, int], seed: int, mask: bool,
    odd: bool,
) -> None:  # fmt: skip
    q_len, kv_len = lengths
    rng = torch.Generator().manual_seed(seed)
    pad = 5 if odd else 0  # a part of wider rows: strides that are no multiple of 16 bytes
    q, k, v = (
        torch.randn(2, h, n, dim + pad, generator=rng)[..., :dim]
        for n, h in ((q_len, heads[0]), (kv_len, heads[1]), (kv_len, heads[1]))
    )
    blocks = torch.rand(2, 1, -(-q_len // q_block), -(-kv_len // kv_block), generator=rng) < 0.6
    layout = BlockLayout.from_mask(blocks, q_len, kv_len, q_block, kv_block)
    exists = torch.rand(2, kv_len, generator=rng) < 0.7 if mask else None
    p = Problem(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), layout, 0.3, exists, None)
    agree(attend(p, NO_TERMS, "triton"), definition(p), 4e-6)
    found = sparse_attention(q, k, v, layout, scale=0.3, key_mask=exists, tensor_layout="bhsd", backend="triton")
    agree((found.transpose(1, 2),), definition(p)[:1], 4e-6)  # type: ignore[union-attr]


def test_what_the_kernels_cannot_do_is_said() -> None:
    p = call(dim=256)
    with pytest.raises(DitAttnError, match="head size 256 is not within 16 to 128"):
        attend(p, NO_TERMS, "triton")
    assert choose_backend(p.q, p.layout).backend == "gather"
    p = call(q_block=24)
    with pytest.raises(DitAttnError, match="q_block 24 is not a multiple of 16"):
        attend(p, NO_TERMS, "triton")
    with pytest.raises(DitAttnError, match="fp32 at most"):
        attend(wide(call()), NO_TERMS, "triton")
    with pytest.raises(DitAttnError, match="tensor descriptors need"):
        attend(call(), NO_TERMS, "triton-tma")
