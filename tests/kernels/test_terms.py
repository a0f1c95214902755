"""The optional terms of a call, on every backend of a CPU: results and gradients against the formulas."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels import BlockLayout, choose_backend, device, numeric_guard, sparse_attention
from dit_attn.kernels.backends import compose_terms, registry
from dit_attn.kernels.problem import Problem
from dit_attn.kernels.terms import (
    Compensation,
    Epilogue,
    LogitBias,
    Terms,
    pooled_compensation,
    sampled_compensation,
)
from tests._support.definition import definition, wide
from tests._support.kernel_cases import LAYOUTS, TERMS, call, tight

BIASED = ("bias", "barred keys", "barred pooled keys", "everything")
CASES = [("gather", name) for name in TERMS] + [("gather-sdpa", name) for name in TERMS if name not in BIASED]


def attend(p: Problem, terms: Terms, backend: str | None = None, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return sparse_attention(  # type: ignore[return-value]
        p.q, p.k, p.v, p.layout, scale=p.scale, key_mask=p.key_mask, key_bias=p.key_bias,
        key_lengths=terms.key_lengths, bias=terms.bias, compensation=terms.compensation, epilogue=terms.epilogue,
        return_lse=True, backend=backend, **options,
    )  # fmt: skip


def agree(found: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], tolerance: float) -> None:
    for a, b in zip(found, expected):
        torch.testing.assert_close(a.double(), b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("keys", (False, True))
@pytest.mark.parametrize("name", TERMS)
def test_every_term_does_what_its_formula_says(name: str, keys: bool) -> None:
    p = call(key_mask=keys, key_bias=keys)
    terms = TERMS[name](p)
    agree(attend(p, terms), definition(p, terms), 2e-5)


@pytest.mark.parametrize("backend, name", CASES)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2)])
def test_long_sequences_go_piece_by_piece_with_the_same_result(
    backend: str, name: str, dtype: torch.dtype, tolerance: float
) -> None:
    masked = [call(dtype, layout=LAYOUTS["bits"]())] if backend == "gather" else []
    for p in (call(dtype, key_mask=True, key_bias=True), call(dtype), *masked):
        terms = TERMS[name](p)
        with tight():
            agree(attend(p, terms, backend), definition(p, terms), tolerance)


def test_pooled_keys_are_merged_in_chunks_that_suit_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache's worth on a CPU, hundreds of megabytes where launches cost more than memory."""
    cpu, gpu = (device.chunk_sizes(torch.device(name)).pooled for name in ("cpu", "cuda"))
    assert cpu == 1 << 20 and 100 << 20 <= gpu <= 1 << 30
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(1, 2048, 4, 16, generator=rng)
    layout = BlockLayout.from_mask(torch.rand(1, 4, 32, 32, generator=rng) < 0.3, 2048, 2048, 64, 64)
    shapes, product = [], compose_terms._product
    monkeypatch.setattr(compose_terms, "_product", lambda a, *rest: shapes.append(a.shape) or product(a, *rest))

    def chunks() -> tuple[Any, int]:
        shapes.clear()
        found = sparse_attention(q, q, q, layout, compensation=pooled_compensation(q, q, 4), backend="gather")
        return found, len(shapes)

    small, many = chunks()
    monkeypatch.setattr(device, "CHUNK_SIZES", {})
    large, one = chunks()
    assert many >= 16 and one == 1
    torch.testing.assert_close(small, large)


@pytest.mark.parametrize("masked", (False, True))
def test_sampled_keys_are_dense_attention_over_all_their_places(masked: bool) -> None:
    rng = torch.Generator().manual_seed(0)
    q, k, v = torch.randn(3, 2, 64, 4, 16, generator=rng)
    mask = torch.ones(2, 64, dtype=torch.bool)
    if masked:  # every run of 8 has 4 keys or none, at places that differ
        for run in range(8):
            mask[:, 8 * run : 8 * run + 8] = False
            mask[:, torch.randperm(8, generator=rng)[: 4 * (run != 5)] + 8 * run] = True
    layout = BlockLayout.from_mask(torch.rand(1, 4, 4, 4, generator=rng) < 0.3, 64, 64, 16, 16)
    found = []
    for place in range(8):
        places = (torch.arange(4) + place) % 8
        sampled = sampled_compensation(k, v, 8, places, key_mask=mask if masked else None)
        found.append(sparse_attention(q, k, v, layout, key_mask=mask, compensation=sampled, return_lse=True))
    outs, lses = (torch.stack(x) for x in zip(*found))
    merged = (outs * lses.softmax(0).transpose(2, 3)[..., None]).sum(0)
    dense = torch.nn.functional.scaled_dot_product_attention(
        *(x.double().transpose(1, 2) for x in (q, k, v)), attn_mask=mask[:, None, None]
    )
    torch.testing.assert_close(merged.double(), dense.transpose(1, 2), atol=2e-6, rtol=1e-5)
    assert float((outs[0] - dense.transpose(1, 2)).norm() / dense.norm()) > 0.1


@pytest.mark.parametrize("name", TERMS)
def test_autocast_does_not_round_what_is_inside_a_call(name: str) -> None:
    p = call(torch.bfloat16)
    terms = TERMS[name](p)
    plain = attend(p, terms, "gather")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(plain, attend(p, terms, "gather")))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("backend", ("gather", "reference"))
@pytest.mark.parametrize("keys", (False, True))
def test_element_masks_hide_exactly_what_they_say(layout: str, backend: str, keys: bool) -> None:
    p = call(layout=LAYOUTS[layout](), key_mask=keys, key_bias=keys)
    agree(attend(p, Terms(), backend), definition(p), 2e-5)


@pytest.mark.parametrize("layout", ["blocks", *LAYOUTS])
def test_flexattention_agrees_on_the_same_layout(layout: str) -> None:
    p = call(layout=LAYOUTS[layout]() if layout in LAYOUTS else None)
    for _ in range(2):  # the second call finds the mask of the first
        agree(attend(p, Terms(), "flex"), definition(p), 2e-5)


@pytest.mark.parametrize("reads_counts", (True, False))
@pytest.mark.parametrize("layout", ("window", "band", "bits"))
def test_gradients_through_an_element_mask(monkeypatch: pytest.MonkeyPatch, layout: str, reads_counts: bool) -> None:
    if not reads_counts:  # as on an accelerator
        monkeypatch.setattr(Problem, "on_host", property(lambda self: False))
    p = call(layout=LAYOUTS[layout](), key_mask=True)
    p = replace(p, **{name: wide(getattr(p, name)).requires_grad_() for name in ("q", "k", "v")})
    same_gradients(p, Terms())


@pytest.mark.parametrize("backend, name", CASES)
def test_gradients_of_every_term(backend: str, name: str) -> None:
    p = call(dim=8)
    p = replace(p, **{name: wide(getattr(p, name)).requires_grad_() for name in ("q", "k", "v")})
    terms = TERMS[name](p)
    parts = [wide(x) for x in (terms.bias, terms.compensation, terms.epilogue)]
    same_gradients(p, Terms(terms.key_lengths, *parts), backend)


def same_gradients(p: Problem, terms: Terms, backend: str = "gather") -> None:
    """Of q, k and v, for fixed random gradients on the output and the finite log-sums."""
    results = []
    for out, lse in (attend(p, terms, backend), definition(p, terms)):
        rng = torch.Generator().manual_seed(6)
        on_out, on_lse = (torch.randn(x.shape, generator=rng, dtype=x.dtype) for x in (out, lse))
        total = (out * on_out).sum() + (lse * on_lse)[torch.isfinite(lse)].sum()
        results.append(torch.autograd.grad(total, (p.q, p.k, p.v), retain_graph=True))
    for a, b in zip(*results):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_a_spread_of_keys_beyond_fp16_stays_finite() -> None:
    k = torch.full((1, 8, 1, 4), 600.0).half()
    k[:, ::2] *= -1.0
    comp = pooled_compensation(k, k, 4, variance=True)  # 360000, and fp16 ends at 65504
    assert comp.variance is not None and bool(comp.variance.isfinite().all())


def test_finer_pooled_keys_come_closer_to_the_dense_result() -> None:
    rng = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, 512, 2, 32, generator=rng).cumsum(1) * 0.2 for _ in range(2))
    v = torch.randn(1, 512, 2, 32, generator=rng).cumsum(1) * 0.2
    layout = BlockLayout.from_mask(torch.eye(8, dtype=torch.bool)[None, None], 512, 512, 64, 64)
    dense = sparse_attention(q, k, v, BlockLayout.dense(512, 512, 64, 64))
    errors = [(sparse_attention(q, k, v, layout) - dense).norm()]  # type: ignore[operator]
    for tokens in (64, 16, 4, 1):
        found = sparse_attention(q, k, v, layout, compensation=pooled_compensation(k, v, tokens))
        errors.append((found - dense).norm())  # type: ignore[operator]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4 * errors[0]  # one pooled key per token is the token


def test_heads_first_needs_no_copy_and_gives_the_same() -> None:
    p = call()
    turned = replace(p, q=p.q.transpose(1, 2), k=p.k.transpose(1, 2), v=p.v.transpose(1, 2))
    out, lse = attend(turned, Terms(), tensor_layout="bhsd")
    expected = attend(p, Terms())
    assert torch.equal(out.transpose(1, 2), expected[0]) and torch.equal(lse, expected[1])


def test_the_choice_says_why() -> None:
    p = call()
    choice = choose_backend(p.q, p.layout, v=p.v, terms=TERMS["bias"](p))
    assert choice.backend == "gather" and choice.reasons["sdpa"] == "the layout is not known to be dense"
    dense = choose_backend(p.q, BlockLayout.dense(70, 70, 32, 32), terms=TERMS["blend"](p))
    assert dense.reasons["sdpa"] == "it supports none of the optional terms"


def test_the_guard_checks_every_call_and_stops_at_a_wrong_one(monkeypatch: pytest.MonkeyPatch) -> None:
    p = call(dtype=torch.bfloat16)
    cases = [(p, TERMS[name](p)) for name in TERMS] + [(call(layout=make()), Terms()) for make in LAYOUTS.values()]
    with numeric_guard() as report:
        for _ in range(3):
            for q, terms in cases:
                attend(q, terms)
    assert report.calls == 3 * len(cases) and 0 < report.worst < 0.02
    wrong = replace(registry.BACKENDS["gather"], run=lambda p, t, lse: (p.q * float("nan"), None))
    monkeypatch.setitem(registry.BACKENDS, "gather", wrong)
    with pytest.raises(DitAttnError, match="backend 'gather' has relative error nan"), numeric_guard():
        sparse_attention(p.q, p.k, p.v, p.layout, backend="gather")


def test_the_guard_blames_what_is_given_for_what_cannot_be_finite() -> None:
    p = call()
    p.k[:] = float("nan")
    with pytest.raises(DitAttnError, match="check q, k, v and the terms for NaN and infinity"), numeric_guard():
        attend(p, Terms())
        attend(p, Terms())


BAD = {
    "key_lengths must be": {"key_lengths": torch.ones(3, dtype=torch.int32)},
    "key_lengths must be of an integer dtype, got float32": {"key_lengths": torch.ones(2)},
    "key_lengths is on meta and q on cpu; move it": {"key_lengths": torch.ones(2, dtype=torch.int32, device="meta")},
    "epilogue.add is on meta": {"epilogue": Epilogue(add=torch.zeros(1, 1, 3, 16, device="meta"))},
    "bias.k must be of a floating-point dtype": {
        "bias": LogitBias(torch.zeros(1, 1, 70, 2), torch.ones(1, 1, 90, 2).bool())
    },
    "at least 1": {"bias": LogitBias(torch.zeros(1, 1, 70, 0), torch.zeros(1, 1, 90, 0))},
    "compensation.bias is the pooled keys' factor of a bias, and none is given": {
        "compensation": Compensation(
            *(torch.zeros(2, 2, 12, 16),) * 2, torch.zeros(1, 1, 12), 8, bias=torch.zeros(1, 1, 12, 2)
        )
    },
    "bias.k must be": {"bias": LogitBias(torch.zeros(1, 1, 70, 2), torch.zeros(1, 1, 70, 2))},
    "must divide": {"compensation": Compensation(*(torch.zeros(2, 2, 4, 16),) * 2, torch.zeros(1, 1, 4), 24)},
    "compensation.k must be": {"compensation": Compensation(*(torch.zeros(2, 2, 4, 16),) * 2, torch.zeros(1, 1, 4), 8)},
    "epilogue.add must be": {"epilogue": Epilogue(add=torch.zeros(1, 1, 7, 16))},
    "leaves no own value": {"epilogue": Epilogue(blend=torch.zeros(1, 4), value_shift=21)},
    "tensor_layout": {"tensor_layout": "sbhd"},
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
def test_a_term_that_does_not_fit_is_named_with_the_fix(message: str) -> None:
    p = call()
    with pytest.raises(DitAttnError, match=message):
        sparse_attention(p.q, p.k, p.v, p.layout, **BAD[message])
