"""The peak memory is that of the work since the last reset."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

# A process of its own: in one that has run other tests the block may lie in memory it already holds.
CODE = """
import json, torch
from dit_attn.pipelines.benchmark import peak_memory
cpu = torch.device("cpu")
torch.ones(160, 2**20).sum()
peak_memory.reset(cpu)
before = peak_memory.read(cpu)
block = torch.ones(96, 2**20)
after = peak_memory.read(cpu)
print(json.dumps([before, after, block.nbytes, peak_memory.label(cpu)]))
"""


def test_the_peak_is_that_of_the_work_since_the_reset() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    before, after, size, label = json.loads(done.stdout)
    if before is None:
        pytest.skip("this machine does not tell the peak of a process")
    assert after - before > 0.9 * size
    assert "process" in label
