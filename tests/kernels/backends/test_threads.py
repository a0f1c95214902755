"""Threads of the gather backend: the same result as one thread, and torch's settings as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial

import pytest
import torch

from dit_attn.kernels import BlockLayout, inward_window, plan_blocks, sparse_attention
from dit_attn.kernels.backends.gather.forward import precision
from dit_attn.kernels.backends.gather.head_groups import split_heads
from dit_attn.kernels.backends.gather.threads import run_items, run_parts
from dit_attn.kernels.problem import Problem

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("inference", (False, True))
@pytest.mark.parametrize("window", (False, True))
def test_two_threads_compute_what_one_does(window: bool, inference: bool) -> None:
    q, k, v = torch.randn(3, 1, 2048, 2, 64)
    plan = plan_blocks(q, k, density=0.3, q_block=64, kv_block=64).layout
    layout = inward_window((32, 64), 9, q_block=64, kv_block=64) if window else plan
    with torch.inference_mode(inference):
        two = sparse_attention(q, k, v, layout, backend="gather", return_lse=True)
        torch.set_num_threads(1)
        one = sparse_attention(q, k, v, layout, backend="gather", return_lse=True)
    for a, b in zip(two, one):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_gradients_go_through_a_call_on_threads() -> None:
    q, k, v = (torch.randn(1, 1024, 1, 16, requires_grad=True) for _ in range(3))
    layout = plan_blocks(q, k, density=0.3, q_block=32, kv_block=32).layout
    out = sparse_attention(q, k, v, layout, backend="gather")
    assert isinstance(out, torch.Tensor)
    found = torch.autograd.grad(out.square().sum(), (q, k, v))
    torch.set_num_threads(1)
    out = sparse_attention(q, k, v, layout, backend="gather")
    assert isinstance(out, torch.Tensor)
    for a, b in zip(found, torch.autograd.grad(out.square().sum(), (q, k, v))):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_ranges_cover_everything_once_on_threads_of_one_core() -> None:
    seen = torch.zeros(1001)
    names, cores = set(), set()

    def work(low: int, high: int) -> None:
        seen[low:high] += 1
        names.add(threading.current_thread().name)
        cores.add(torch.get_num_threads())
        assert not torch.is_grad_enabled()

    run_parts(work, 1001, CPU)
    assert bool((seen == 1).all()) and cores == {1} and threading.current_thread().name not in names
    assert torch.get_num_threads() == 2
    later: list[int] = []
    thread = threading.Thread(target=lambda: later.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert later == [2]  # as for any thread that starts after


@pytest.mark.parametrize("n", (7, 100))
def test_what_is_small_or_elsewhere_stays_on_the_thread(n: int) -> None:
    calls = []
    device = CPU if n == 7 else torch.device("meta")
    run_parts(lambda low, high: calls.append((low, high, threading.current_thread().name)), n, device)
    run_parts(lambda low, high: calls.append((low, high, threading.current_thread().name)), 100, CPU, large=False)
    name = threading.current_thread().name
    assert calls == [(0, n, name), (0, 100, name)]


def test_an_error_is_raised_to_the_caller() -> None:
    def work(low: int, high: int) -> None:
        raise ValueError(f"at {low}")

    with pytest.raises(ValueError, match="at 0"):
        run_parts(work, 100, CPU)


@pytest.mark.parametrize("batch, heads, key_heads", ((1, 2, 2), (1, 3, 3), (2, 4, 2)))
def test_heads_side_by_side_are_exact(batch: int, heads: int, key_heads: int) -> None:
    q = torch.randn(batch, 1100, heads, 48)
    k, v = torch.randn(2, batch, 1100, key_heads, 48)
    mask = torch.rand(batch, 1100) > 0.2
    bias = 0.3 * torch.randn(batch, heads, 1100)
    layout = inward_window((25, 44), (9, 11), q_block=64, kv_block=64)
    call = partial(sparse_attention, layout=layout, key_mask=mask, key_bias=bias, return_lse=True)
    found = call(q, k, v, backend="gather")
    exact = call(q.double(), k.double(), v.double(), backend="reference")
    torch.set_num_threads(1)
    alone = call(q, k, v, backend="gather")
    for a, b, reference in zip(found, alone, exact):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(a.double(), reference.double(), rtol=1e-5, atol=1e-5)


def test_every_thread_computes_heads_of_its_own_and_all_share_the_last() -> None:
    seen: list[tuple[int, str, int]] = []

    def work(i: int) -> None:
        seen.append((i, threading.current_thread().name, torch.get_num_threads()))
        assert i == 4 or not torch.is_grad_enabled()

    run_items(work, 5, CPU)
    own = threading.current_thread().name
    assert sorted(i for i, *_ in seen) == [0, 1, 2, 3, 4]
    assert {cores for i, name, cores in seen if name != own} == {1} and seen[-1] == (4, own, 2)


@pytest.mark.parametrize("n, device, at_once", ((1, CPU, True), (4, CPU, False), (4, torch.device("meta"), True)))
def test_heads_that_cannot_go_side_by_side_are_computed_in_turn(n: int, device: torch.device, at_once: bool) -> None:
    calls: list[tuple[int, str]] = []
    run_items(lambda i: calls.append((i, threading.current_thread().name)), n, device, at_once)
    assert calls == [(i, threading.current_thread().name) for i in range(n)]


@pytest.mark.parametrize(
    "seq, heads, threads, ranges, fits",
    (
        (1024, 4, 2, ((0, 0, 2), (0, 2, 4)), True),  # as many groups as threads, though all heads fit one
        (4096, 2, 2, ((0, 0, 1), (0, 1, 2)), True),
        (16384, 2, 2, ((0, 0, 1), (0, 1, 2)), True),  # two copies at once are half of q, k, v and o
        (16384, 2, 4, ((0, 0, 1), (0, 1, 2)), False),
        (16384, 8, 2, tuple((0, h, h + 1) for h in range(8)), True),
    ),
)
def test_groups_of_heads_go_side_by_side_where_memory_allows(
    seq: int, heads: int, threads: int, ranges: tuple[tuple[int, int, int], ...], fits: bool
) -> None:
    q = torch.empty(1, seq, heads, 64)
    layout = BlockLayout.dense(seq, seq, q_block=128, kv_block=128)
    split = split_heads(Problem(q, q, q, layout, 1.0, None, None), precision(q.dtype, CPU), threads)
    assert split.ranges == ranges and split.fits is fits


def test_an_error_in_a_head_is_raised_to_the_caller() -> None:
    def work(i: int) -> None:
        raise ValueError(f"head {i}")

    with pytest.raises(ValueError, match="head 0"):
        run_items(work, 2, CPU)
