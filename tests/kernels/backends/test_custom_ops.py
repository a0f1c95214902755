"""Around the operator: gradients, registration, compilation, precision, how the work is cut, and who runs it."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dit_attn.errors import DitAttnError
from dit_attn.kernels import (
    BACKENDS,
    BlockLayout,
    block_scores,
    choose_backend,
    device,
    pooled_compensation,
    reference_attention,
    select_blocks,
    sparse_attention,
)
from dit_attn.kernels.backends import preference
from dit_attn.kernels.backends.custom_ops import flat_call, flat_terms, fused_attention_op, sparse_attention_op
from dit_attn.kernels.backends.gather import forward as gather
from dit_attn.kernels.layouts.patterns import band, from_segments
from dit_attn.kernels.layouts.token_order import token_order
from dit_attn.kernels.layouts.windows import inward_window
from dit_attn.kernels.problem import Problem
from tests._support.kernel_cases import TERMS, call

Given = dict[str, Any]


def problem(dtype: torch.dtype = torch.float32, grad: bool = False) -> tuple[list[torch.Tensor], BlockLayout, Given]:
    """Two batch rows, grouped heads, ragged blocks on both sides, rows of different counts, one of them empty."""
    rng = torch.Generator().manual_seed(5)
    q, k, v = (torch.randn(2, n, h, d, generator=rng).to(dtype) for n, h, d in ((70, 4, 8), (90, 2, 8), (90, 2, 6)))
    blocks = torch.rand(2, 4, 5, 6, generator=rng) < 0.5
    blocks[:, 1, 2], blocks[:, :, 0, 5] = False, True
    mask = torch.rand(2, 90, generator=rng) < 0.8
    bias = torch.randn(1, 4, 90, generator=rng, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    for x in (q, k, v, bias):
        x.requires_grad_(grad)
    return [q, k, v], BlockLayout.from_mask(blocks, 70, 90, 16, 16), {"key_mask": mask, "key_bias": bias}


def gradients(tensors: list[torch.Tensor], layout: BlockLayout, terms: Given, backend: str) -> list[torch.Tensor]:
    """Of q, k, v and the key bias, for fixed random gradients on the output and on the finite log-sum-exps."""
    out, lse = sparse_attention(*tensors, layout, return_lse=True, backend=backend, **terms)
    rng = torch.Generator().manual_seed(6)
    on_out, on_lse = (torch.randn(x.shape, generator=rng, dtype=x.dtype) for x in (out, lse))
    total = (out * on_out).sum() + (lse * on_lse)[torch.isfinite(lse)].sum()
    return list(torch.autograd.grad(total, [*tensors, terms["key_bias"]]))


@pytest.mark.parametrize("reads_counts", (True, False))
def test_gradients_of_every_input_equal_those_of_the_definition(
    monkeypatch: pytest.MonkeyPatch, reads_counts: bool
) -> None:
    if not reads_counts:  # as on an accelerator, where reading a count would stop it
        monkeypatch.setattr(Problem, "on_host", property(lambda self: False))
    tensors, layout, terms = problem(torch.float64, grad=True)
    found, expected = (gradients(tensors, layout, terms, name) for name in ("gather", "reference"))
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_gradients_pass_the_numerical_check() -> None:
    tensors, layout, terms = problem(torch.float64, grad=True)
    rows = torch.isfinite(sparse_attention(*tensors, layout, return_lse=True, **terms)[1])

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bias: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out, lse = sparse_attention(
            q, k, v, layout, key_mask=terms["key_mask"], key_bias=bias, return_lse=True, backend="gather"
        )
        return out, lse[rows]

    assert torch.autograd.gradcheck(call, (*tensors, terms["key_bias"]), fast_mode=True)


def test_nan_in_blocks_that_are_not_read_never_reaches_a_gradient() -> None:
    blocks = torch.ones(1, 2, 3, 4, dtype=torch.bool)
    blocks[..., [0, 2]] = False
    layout = BlockLayout.from_mask(blocks, 40, 60, 16, 16)
    q, k, v = (torch.randn(1, n, 2, 8) for n in (40, 60, 60))
    for x in (k, v):
        x[:, :16], x[:, 32:48] = float("nan"), float("nan")
        x.requires_grad_()
    sparse_attention(q.requires_grad_(), k, v, layout).sum().backward()
    assert all(bool(torch.isfinite(x.grad).all()) for x in (q, k, v))  # type: ignore[arg-type]
    assert not k.grad[:, :16].any() and not v.grad[:, 32:48].any()  # type: ignore[index]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float64))
@pytest.mark.parametrize("variant", ("plain", "keys", "window", "segments"))
def test_the_operator_is_registered_as_torch_requires(dtype: torch.dtype, variant: str) -> None:
    (q, k, v), layout, terms = problem(dtype, grad=True)
    layout = BlockLayout.from_mask(layout.block_mask() | (torch.arange(6) == 3), 70, 90, 16, 16)  # finite sums only
    terms["key_mask"][:, 48:64] = True
    altered = variant == "keys"
    if variant == "window":
        layout = band(70, 90, 9, 5, sinks=3, q_block=16, kv_block=16)
    elif variant == "segments":
        layout = from_segments(torch.arange(70)[None] // 30, torch.arange(90)[None] // 40, q_block=16, kv_block=16)
    keys = (terms["key_mask"], terms["key_bias"]) if altered else (None, None)
    torch.library.opcheck(sparse_attention_op, (*flat_call(Problem(q, k, v, layout, 0.3, *keys)), "gather"))


@pytest.mark.parametrize("name", TERMS)
def test_the_operator_with_terms_is_registered_as_torch_requires(name: str) -> None:
    p = call()
    blocks = p.layout.block_mask() | (torch.arange(3) == 0)
    p = replace(p, layout=BlockLayout.from_mask(blocks, 70, 90, 32, 32))  # finite sums only
    torch.library.opcheck(fused_attention_op, (*flat_call(p), *flat_terms(TERMS[name](p)), "gather"))


def test_selection_and_attention_compile_to_one_graph_with_the_same_result() -> None:
    q, k, v = (torch.randn(1, 100, 2, 16) for _ in range(3))

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = block_scores(q, k, 16, 16)
        forced = torch.eye(7, dtype=torch.bool)[None, None]
        layout = select_blocks(scores, density=0.4, forced=forced, q_len=100, kv_len=100, q_block=16, kv_block=16)
        return sparse_attention(q, k, v, layout, return_lse=True)

    compiled = torch.compile(attend, backend="aot_eager", fullgraph=True)
    for found, expected in zip(compiled(q, k, v), attend(q, k, v)):
        torch.testing.assert_close(found, expected)
    assert all(x.is_contiguous() for x in compiled(q, k, v))


def test_autocast_decides_the_type_like_it_does_for_torch() -> None:
    q, k, v = (torch.randn(1, 32, 2, 8) for _ in range(3))
    layout = BlockLayout.dense(32, 32, 16, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, lse = sparse_attention(q, k.bfloat16(), v, layout, return_lse=True)
        assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    expected = sparse_attention(q.bfloat16(), k.bfloat16(), v.bfloat16(), layout, return_lse=True)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@pytest.mark.parametrize("sharpness", (1.0, 3.0))
def test_low_precision_is_as_close_to_the_truth_as_torch_is(sharpness: float) -> None:
    rng = torch.Generator().manual_seed(1)
    q, k, v = (torch.randn(1, 512, 2, 64, generator=rng) for _ in range(3))
    q, k, v = (q * sharpness).bfloat16(), k.bfloat16(), v.bfloat16()
    layout = BlockLayout.dense(512, 512, 64, 64)
    truth = reference_attention(q.double(), k.double(), v.double(), layout)[0]
    ours = sparse_attention(q, k, v, layout, backend="gather")
    torchs = sparse_attention(q, k, v, layout, backend="sdpa")
    assert isinstance(ours, torch.Tensor) and isinstance(torchs, torch.Tensor)
    assert (ours.double() - truth).norm() <= 1.35 * (torchs.double() - truth).norm()


@pytest.mark.skipif(not gather.cpu_has_bf16(), reason="this CPU does not multiply bf16 itself")
def test_rounded_logits_are_picked_for_bf16_unless_the_log_sum_or_gradients_need_better(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(preference, "unsupported_reason_amx", lambda dtype: "it is left out here")
    q, k, v = (torch.randn(1, 512, 2, 64).bfloat16() for _ in range(3))
    layout = BlockLayout.from_topk(torch.randn(1, 2, 8, 8), 4, q_len=512, kv_len=512, q_block=64, kv_block=64)
    assert choose_backend(q, layout).backend == "gather-bf16"
    assert choose_backend(q, layout, return_lse=True).backend == "gather"
    assert choose_backend(q.float(), layout).backend == "gather"
    truth = reference_attention(q.double(), k.double(), v.double(), layout)[0]
    exact, fast = (
        (sparse_attention(q, k, v, layout, backend=name).double() - truth).norm() / truth.norm()  # type: ignore
        for name in ("gather", "gather-bf16")
    )
    assert exact < fast < 2.5 * exact
    q.requires_grad_()
    leaf = sparse_attention(q, k, v, layout)
    expected = sparse_attention(q, k, v, layout, backend="gather")
    assert torch.equal(leaf, expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("bound", (1.0, 99.0, 101.0, 3000.0))
def test_logits_of_any_size_neither_overflow_nor_vanish(bound: float, dtype: torch.dtype) -> None:
    """Below a bound on |q| |k| no maximum is taken off before the exponential; above it one is."""
    rng = torch.Generator().manual_seed(2)
    q, k = (F.normalize(torch.randn(1, 48, 2, 16, generator=rng), dim=-1) for _ in range(2))
    q[:, 16:32], k[:, ::5] = k[:, 16:32], -q[:, ::5]  # rows whose logits reach the bound from both sides
    q, k = (q * bound**0.5).to(dtype), (k * bound**0.5).to(dtype)
    v = torch.randn(1, 48, 2, 16, generator=rng).to(dtype)
    layout = BlockLayout.from_mask(torch.rand(1, 2, 3, 3, generator=rng) < 0.9, 48, 48, 16, 16)
    terms = {"scale": 0.6931 * 0.999}  # base-2 logits of size bound
    out, lse = sparse_attention(q, k, v, layout, return_lse=True, backend="gather", **terms)
    good, good_lse = reference_attention(q.double(), k.double(), v.double(), layout, **terms)
    tolerance = {torch.float32: 1e-4, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(out.double(), good, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), good_lse, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("chunk, group", ((1, 1), (1, 1 << 20), (6_000, 3_000), (1 << 30, 1 << 30)))
def test_the_result_does_not_depend_on_how_the_work_is_cut(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int, group: int
) -> None:
    tensors, layout, terms = problem(dtype)
    expected = reference_attention(*tensors, layout, **terms)
    monkeypatch.setitem(device.CHUNK_SIZES, "cpu", device.ChunkSizes(chunk, group, group))
    found = sparse_attention(*tensors, layout, return_lse=True, backend="gather", **terms)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}[dtype]
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(found[1], expected[1], rtol=1e-4, atol=1e-4)


def test_counts_need_not_be_read() -> None:
    """What runs on an accelerator, where reading a count would stop it: full-width lists and masks."""
    (q, k, v), layout, terms = problem()
    expected = sparse_attention(q, k, v, layout, return_lse=True, **terms)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Problem, "on_host", property(lambda self: False))
        for x in (k, v):
            x[:, :16] = float("nan")  # lists are padded with block 0
        without = BlockLayout.from_mask(layout.block_mask() & (torch.arange(6) > 0), 70, 90, 16, 16)
        found = sparse_attention(q, k, v, without, return_lse=True, **terms)
        assert all(not bool(x.isnan().any()) for x in found)
        for x in (k, v):
            x[:, :16] = 0.0
        blind = sparse_attention(q, k, v, layout, return_lse=True, **terms)
    seeing = sparse_attention(q, k, v, layout, return_lse=True, **terms)
    for a, b in zip(blind, seeing):
        torch.testing.assert_close(a, b)
    assert not torch.equal(seeing[0], expected[0])


def test_what_inference_mode_leaves_behind_serves_training() -> None:
    """Working memory, static layouts and orders are cached; tensors of inference mode are read-only."""
    found: list[Any] = []

    def work() -> None:  # a thread of its own has no working memory yet
        try:
            with torch.inference_mode():
                order = token_order("hilbert", (3, 5, 7))
                layout = inward_window((3, 5, 7), (1, 3, 3), q_block=16, kv_block=16)
                x = torch.randn(1, 105, 2, 8)
                sparse_attention(x, x, x, layout)
            x = torch.randn(1, 105, 2, 8, requires_grad=True)
            out = sparse_attention(*(order.apply(x),) * 3, layout, compensation=pooled_compensation(x, x, 8))
            found.append(torch.autograd.grad(out.sum(), x)[0])  # type: ignore[union-attr]
        except RuntimeError as error:
            found.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert isinstance(found[0], torch.Tensor) and bool(found[0].isfinite().all()), found


def test_threads_do_not_share_working_memory() -> None:
    cases = [problem() for _ in range(2)]
    cases[1][0][0].mul_(2.0)
    expected = [sparse_attention(*tensors, layout, **terms) for tensors, layout, terms in cases]
    wrong: list[int] = []

    def work(i: int) -> None:
        tensors, layout, terms = cases[i]
        for _ in range(20):
            if not torch.equal(sparse_attention(*tensors, layout, **terms), expected[i]):  # type: ignore[arg-type]
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_rows_of_a_fused_projection_are_read_in_place() -> None:
    fused = torch.randn(2, 50, 3, 4, 16)
    q, k, v = fused.unbind(2)
    layout = BlockLayout.from_mask(torch.rand(1, 4, 4, 4) < 0.7, 50, 50, 16, 16)
    expected = sparse_attention(q.contiguous(), k.contiguous(), v.contiguous(), layout)
    assert torch.equal(sparse_attention(q, k, v, layout), expected)  # type: ignore[arg-type]


def test_a_dense_layout_goes_to_torchs_own_attention_and_is_equal_to_it() -> None:
    q, k, v = (torch.randn(1, 40, 4, 8) for _ in range(3))
    layout = BlockLayout.dense(40, 40, 16, 16)
    assert choose_backend(q, layout).backend == "sdpa"
    expected = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v))).transpose(1, 2)
    assert torch.equal(sparse_attention(q, k, v, layout), expected)  # type: ignore[arg-type]


@pytest.mark.parametrize("asked", ({"return_lse": True}, {"key_mask": torch.ones(1, 40, dtype=torch.bool)}))
def test_what_torch_cannot_do_is_done_by_gathering_and_the_reason_is_given(asked: Given) -> None:
    q = torch.randn(1, 40, 4, 8)
    choice = choose_backend(q, BlockLayout.dense(40, 40, 16, 16), **asked)
    assert choice.backend == "gather" and set(choice.reasons) == set(BACKENDS) - {"gather"}
    assert all(name in str(choice) for name in BACKENDS)


def test_a_forced_backend_that_cannot_run_the_call_says_why_and_what_to_do() -> None:
    q, k, v = (torch.randn(1, 40, 4, 8) for _ in range(3))
    layout = BlockLayout.from_mask(torch.eye(3, dtype=torch.bool)[None, None], 40, 40, 16, 16)
    with pytest.raises(DitAttnError, match=r"sdpa.*not known to be dense.*backend='gather'"):
        sparse_attention(q, k, v, layout, backend="sdpa")
