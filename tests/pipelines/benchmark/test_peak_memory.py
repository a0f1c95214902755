"""The peak memory is that of the work since the last reset."""

from __future__ import annotations

import gc

import pytest
import torch

from dit_attn.pipelines.benchmark import peak_memory
from tests.pipelines.benchmark.conftest import CPU


def test_the_peak_is_that_of_the_work_since_the_reset() -> None:
    if peak_memory.read(CPU) is None:
        pytest.skip("this machine does not tell the peak of a process")
    torch.ones(64, 2**20).sum()
    gc.collect()  # what earlier tests left behind must not be freed between the two readings
    peak_memory.reset(CPU)
    before = peak_memory.read(CPU)
    block = torch.ones(96, 2**20)
    after = peak_memory.read(CPU)
    assert before is not None and after is not None and after - before > 0.9 * block.nbytes
    del block
    assert "process" in peak_memory.label(CPU)
