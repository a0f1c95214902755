"""Threads of the gather backend: the same result as one thread, and torch's settings as they were."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from dit_attn.kernels import inward_window, plan_blocks, sparse_attention
from dit_attn.kernels.backends.gather.threads import run_parts

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
