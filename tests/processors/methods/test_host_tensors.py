"""Tensors in main memory: they come back as they were, and the next layer's are on their way while one computes."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import InwardWindow
from dit_attn.processors.methods import host_tensors
from dit_attn.processors.methods.host_tensors import HostTensors, PinnedMover, PlainMover, mover_for
from tests._support.compose import forward, pipeline_run, same, tiny, tiny_pipeline

WINDOW: dict[str, Any] = {"window": (4, 5), "snap": "no", "q_block": 32, "kv_block": 16, "override": "text"}


class FakeMover:
    """Copies that have arrived only when somebody waited for them; says what was begun and waited for."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self.stored = self.under_way = self.most = 0

    def store(self, x: torch.Tensor) -> tuple[int, torch.Tensor]:
        self.stored += 1
        return self.stored - 1, x.clone()

    def begin(self, stored: tuple[int, torch.Tensor]) -> Callable[[], torch.Tensor]:
        number, value = stored
        out = torch.full_like(value, float("nan"))
        self.events.append(("begin", number))
        self.under_way += 1
        self.most = max(self.most, self.under_way)

        def wait() -> torch.Tensor:
            self.events.append(("wait", number))
            self.under_way -= 1
            return out.copy_(value)

        return wait


@pytest.fixture
def mover(monkeypatch: pytest.MonkeyPatch) -> FakeMover:
    fake = FakeMover()
    monkeypatch.setattr(host_tensors, "mover_for", lambda device: fake)
    return fake


def test_the_next_tensors_come_while_one_waits_for_its_own(mover: FakeMover) -> None:
    stored = [HostTensors([torch.full((3,), float(i))]) for i in range(3)]
    for one, following in itertools.pairwise(stored):
        one.following = following
    for _ in range(2):
        assert [float(one.take()[0][0]) for one in stored] == [0.0, 1.0, 2.0]
    once = [("begin", 0), ("begin", 1), ("wait", 0), ("begin", 2), ("wait", 1), ("wait", 2)]
    assert mover.events == 2 * once and mover.most == 2


@pytest.mark.parametrize("name", ["wan", "flux"])
def test_the_layers_of_a_model_are_fetched_one_ahead(name: str, mover: FakeMover) -> None:
    model, args = tiny(name)
    with dit_attn.enabled(model, InwardWindow(**WINDOW)):
        expected = forward(model, args)
    with dit_attn.enabled(model, InwardWindow(**WINDOW, offload=True)):
        assert same(forward(model, args), expected)
    layers = mover.stored
    assert layers > 1 and mover.most == 2
    begun = [number for what, number in mover.events if what == "begin"]
    assert begun == [number for what, number in mover.events if what == "wait"] == list(range(layers))
    assert mover.events.index(("begin", 1)) < mover.events.index(("wait", 0))


def test_branches_and_later_steps_have_orders_of_their_own(mover: FakeMover) -> None:
    outputs = []
    for offload in (False, True):
        pipe, kwargs = tiny_pipeline("wan")
        with dit_attn.enabled(pipe, InwardWindow(**WINDOW, interval=2, offload=offload)):
            outputs.append(pipeline_run(pipe, kwargs, steps=4))
    assert same(*outputs) and mover.most == 2 and mover.under_way == 0


def test_without_a_stream_tensors_come_when_asked_for() -> None:
    assert isinstance(mover_for(torch.device("cpu")), PlainMover)
    x = torch.randn(2, 5, 3)
    (found,) = HostTensors([x]).take()
    assert torch.equal(found, x)


def test_bytes_are_pinned_in_pieces_of_any_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_tensors, "_CHUNK", 64)
    for dtype in (torch.float8_e4m3fn, torch.bfloat16, torch.float32):
        x = torch.randn(7, 11).to(dtype)
        pieces = [piece.clone() for piece in host_tensors._bytes_of(x).split(host_tensors._CHUNK)]
        out = torch.empty_like(x)
        for there, here in zip(host_tensors._bytes_of(out).split(host_tensors._CHUNK), pieces, strict=True):
            there.copy_(here)
        assert len(pieces) > 1 and torch.equal(out.view(torch.uint8), x.view(torch.uint8))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_pinned_copies_are_bit_equal() -> None:
    device = torch.device("cuda")
    assert isinstance(mover_for(device), PinnedMover)
    stored = []
    for number in range(4):
        x = torch.randn(1 << 22, device=device) + number
        stored.append((x.cpu(), HostTensors([x])))
        del x
    for (_, one), (_, following) in itertools.pairwise(stored):
        one.following = following
    for _ in range(2):
        for value, one in stored:
            assert torch.equal(one.take()[0].cpu(), value)
