"""What a sparse call takes besides its kernels, on a model that is small."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.kernels.cost import Cost, CostTable
from dit_attn.kernels.cost.lookup import this_machine
from dit_attn.pipelines.benchmark import fixed_cost
from dit_attn.processors.attach.summary import Summary


def test_it_is_the_time_of_a_call_beyond_what_the_table_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fixed_cost, "TOKENS", 256)
    monkeypatch.setattr(fixed_cost, "ROUNDS", 1)
    cpu = torch.device("cpu")
    free = CostTable(this_machine(cpu), (Cost(64, "float32", 256, 0.5, 1e-6),))  # as if kernels took no time
    seen: list[Summary] = []

    def summary(model: Any) -> Summary:
        seen.append(dit_attn.summary(model))
        return seen[-1]

    monkeypatch.setattr(fixed_cost, "summary", summary)
    found = fixed_cost.measure_fixed(cpu, free)
    calls = [
        sum(layer.seconds for layer in one.layers) / sum(layer.sparse_calls for layer in one.layers)
        for one in seen[1::2]
    ]
    assert len(seen) == 4 and 0.0 < found <= 1.001 * max(calls)
    slow = replace(free, costs=(Cost(64, "float32", 256, 0.5, 1e6),))
    assert fixed_cost.measure_fixed(cpu, slow) == 0.0
