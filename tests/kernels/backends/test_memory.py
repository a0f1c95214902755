"""Memory: a call needs little beyond q, k, v and o, whatever is asked of it, and grows with the sequence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.skipif(
    not (os.path.exists("/proc/self/clear_refs") and hasattr(os, "fork")), reason="needs Linux's /proc"
)

# Peak resident memory, in MB, that a call adds on top of its inputs; every call in a process of its own.
SCRIPT = """
import json, os, sys, torch
from dit_attn.kernels import Epilogue, LogitBias, plan_blocks, pooled_compensation, sparse_attention
torch.set_num_threads(1)

def field(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

def call(seq, heads, dim, dtype, terms, selection):
    torch.manual_seed(0)
    q, k, v = (torch.empty(1, seq, heads, dim, dtype=getattr(torch, dtype)).normal_() for _ in range(3))
    blocks = dict(density=8 * 128 / seq, q_block=128, kv_block=128)
    layout, n = None if selection else plan_blocks(q, k, **blocks).layout, -(-seq // 128)
    given = {}
    if "bias" in terms:
        given["bias"] = LogitBias(torch.randn(1, 1, seq, 2), torch.randn(1, 1, seq, 2))
    if "mask" in terms:
        given["key_mask"] = torch.rand(1, seq) > 0.1
    if "epilogue" in terms:
        scale, add = torch.rand(1, heads, n), torch.randn(1, heads, n, dim)
        given["epilogue"] = Epilogue(scale, torch.randn(1, heads, seq), add=add, blend=torch.rand(1, heads))
    wanted = [x.requires_grad_() for x in (q, k, v)] if "grad" in terms else []
    before = field("VmRSS")
    open("/proc/self/clear_refs", "w").write("5")  # the high-water mark starts again
    if layout is None:
        layout = plan_blocks(q, k, **blocks).layout
    if "compensation" in terms:
        given["compensation"] = pooled_compensation(k, v, 16, variance="variance" in terms)
    out = sparse_attention(q, k, v, layout, return_lse="lse" in terms, **given)
    if wanted:
        torch.autograd.grad(out.square().sum(), wanted)
    return (field("VmHWM") - before) / 1024

def alone(case):
    read, write = os.pipe()
    if os.fork() == 0:
        call(2048, *case[1:])  # libraries, and the buffers of a chunk, which stay with the thread
        os.write(write, json.dumps(call(*case)).encode())
        os._exit(0)
    os.close(write)
    os.wait()
    return json.loads(os.read(read, 99))

print(json.dumps([alone(case) for case in json.loads(sys.argv[1])]))
"""
TERMS = ("plain", "lse", "mask", "bias", "compensation", "compensation+variance", "epilogue")
ALL = "lse+mask+bias+compensation+variance+epilogue"
SHAPES = (
    (16384, 2, 64, "float32"),
    (16384, 1, 128, "float32"),
    (8192, 4, 128, "bfloat16"),
    (16384, 2, 128, "bfloat16"),
)
GRADIENTS = ("grad", "grad+compensation+variance")
GROWN = (*TERMS[::2], *GRADIENTS)
GROWING = tuple((seq, 2, 64, "float32", terms, True) for terms in GROWN for seq in (4096, 8192, 16384))
CHUNK = 2  # MB: logits of pooled keys and their square term


@pytest.fixture(scope="module")
def peaks() -> dict[tuple[Any, ...], float]:
    cases = [(*shape, terms, False) for shape in SHAPES for terms in (*TERMS, ALL)] + list(GROWING)
    # Large tensors go back to the system at once, so that what is measured is what is held and not holes in the heap.
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    command = [sys.executable, "-c", SCRIPT, json.dumps(cases)]
    root = Path(__file__).parents[3]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=root, env=environment)
    return dict(zip(cases, json.loads(done.stdout)))


@pytest.mark.parametrize("terms", (*TERMS, ALL))
@pytest.mark.parametrize("seq, heads, dim, dtype", SHAPES)
def test_a_call_adds_less_than_three_tenths_of_its_tensors(
    peaks: dict[tuple[Any, ...], float], seq: int, heads: int, dim: int, dtype: str, terms: str
) -> None:
    o = seq * heads * dim * (4 if dtype == "float32" else 2) / 2**20  # MB; as much as q, k or v
    assert peaks[seq, heads, dim, dtype, terms, False] <= o + 0.3 * 4 * o + CHUNK


@pytest.mark.parametrize("short, middle, long", zip(*(GROWING[i::3] for i in range(3))), ids=GROWN)
def test_selection_and_call_grow_linearly(
    peaks: dict[tuple[Any, ...], float], short: tuple[Any, ...], middle: tuple[Any, ...], long: tuple[Any, ...]
) -> None:
    # Increments, so that buffers of a fixed size cancel: twice as large for twice the tokens, four times if quadratic.
    assert peaks[long] - peaks[middle] < 2.5 * (peaks[middle] - peaks[short])
