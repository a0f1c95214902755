"""Memory grows with the sequence, not with its square."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytest.importorskip("resource")

# Peak resident memory, in MB, that selection and attention add on top of q, k, v at a given length.
SCRIPT = """
import resource, sys, torch
from dit_attn.kernels import LogitBias, plan_blocks, pooled_compensation, sparse_attention
torch.set_num_threads(1)
torch.manual_seed(0)

def call(seq):
    q, k, v = (torch.randn(1, seq, 2, 64) for _ in range(3))
    terms = {
        "none": lambda: {},
        "bias": lambda: {"bias": LogitBias(torch.randn(1, 1, seq, 2), torch.randn(1, 1, seq, 2))},
        "compensation": lambda: {"compensation": pooled_compensation(k, v, 16)},
    }[sys.argv[2]]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    layout = plan_blocks(q, k, density=4 * 128 / seq, q_block=128, kv_block=128).layout
    sparse_attention(q, k, v, layout, **terms())
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024

call(1024)  # libraries and thread pools
print(call(int(sys.argv[1])))
"""


def peak(seq: int, terms: str) -> float:
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(seq), terms], capture_output=True, text=True, check=True)
    return float(done.stdout)


@pytest.mark.parametrize("terms", ("none", "bias", "compensation"))
def test_peak_memory_is_far_below_the_map_and_grows_linearly(terms: str) -> None:
    tensor = 32768 * 2 * 64 * 4 / 2**20  # q, k, v or o at the longer length: 16 MB; the map would be 8 GB
    long, short = peak(32768, terms), peak(8192, terms)
    assert long < 6 * tensor
    assert long < 4 * short + 3 * tensor  # four times the length, with room for the allocator
