"""Memory grows with the sequence, not with its square."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("resource")

# Peak resident memory, in MB, that selection and attention add on top of q, k, v at a given length.
SCRIPT = """
import resource, sys, torch
from dit_attn.kernels import block_scores, select_blocks, sparse_attention
torch.set_num_threads(1)
torch.manual_seed(0)

def call(seq):
    q, k, v = (torch.randn(1, seq, 2, 64) for _ in range(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    scores = block_scores(q, k, 128, 128)
    layout = select_blocks(scores, density=4 * 128 / seq, q_len=seq, kv_len=seq, q_block=128, kv_block=128)
    sparse_attention(q, k, v, layout)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

call(1024)  # libraries and thread pools
print(call(int(sys.argv[1])))
"""


def peak(seq: int) -> float:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(seq)], capture_output=True, text=True, check=True)
    return float(done.stdout)


def test_peak_memory_is_far_below_the_map_and_grows_linearly() -> None:
    tensor = 32768 * 2 * 64 * 4 / 2**20  # q, k, v or o at the longer length: 16 MB; the map would be 8 GB
    long, short = peak(32768), peak(8192)
    assert long < 6 * tensor
    assert long < 4 * short + 3 * tensor  # four times the length, with room for the allocator
