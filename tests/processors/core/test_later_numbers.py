"""Numbers that are read at a later step: all of them, in order, those of a GPU through an event."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_attn.processors.core.later_numbers import LaterNumbers


def test_numbers_are_read_in_order_as_often_as_wanted() -> None:
    numbers = LaterNumbers(torch.tensor([[0.5, float("inf")], [-1.0, 0.25]]))
    assert numbers.read() == numbers.read() == [0.5, float("inf"), -1.0, 0.25]
    assert LaterNumbers(torch.tensor(3.0)).read() == [3.0]


def test_numbers_of_a_gpu_are_copied_at_once_and_waited_for_when_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    class Event:
        def record(self) -> None:
            done.append("recorded")

        def synchronize(self) -> None:
            done.append("waited")

    class OnGPU:
        device = torch.device("cuda", 0)

        def to(self, device: str, non_blocking: bool) -> torch.Tensor:
            done.append(f"copied to {device}, {non_blocking}")
            return torch.tensor([1.0])

    monkeypatch.setattr(torch.cuda, "Event", Event)
    values: Any = OnGPU()
    numbers = LaterNumbers(values)
    assert done == ["copied to cpu, True", "recorded"]
    assert numbers.read() == [1.0] and done[2:] == ["waited"]
