"""The kernel of sparse calls is said in one line where this machine decides on it, before a run and after it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.processors.core.kernel_choice import expected_kernel
from tests._support.compose import forward, tiny

LINE = "gather-sdpa: this CPU has AMX for this type"


@pytest.mark.parametrize("amx", (False, True))
def test_explain_and_summary_say_which_kernel_and_why(monkeypatch: pytest.MonkeyPatch, amx: bool) -> None:
    for name in ("_is_amx_tile_supported", "_init_amx"):
        monkeypatch.setattr(torch.cpu, name, lambda: amx, raising=False)
    model, given = tiny("wan")
    model = model.to(torch.bfloat16)
    given = {name: x.bfloat16() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in given.items()}
    method = dit_attn.BlockSparse(density=0.5, dense_steps=0, dense_last_steps=0, q_block=32, kv_block=32)
    size: Any = {"height": 256, "width": 320, "num_frames": 13}
    row = f"kernel         {LINE}"
    assert (row in str(dit_attn.explain(model, method, **size)).splitlines()) == amx
    dit_attn.enable(model, method)
    forward(model, given)
    found = dit_attn.summary(model)
    calls = found.sparse_calls
    assert calls and found.layers[0].kernels == ({LINE: found.layers[0].sparse_calls} if amx else {})
    assert (f"{calls} x {LINE}" in str(found)) == amx


def test_calls_on_other_devices_are_not_said() -> None:
    assert expected_kernel(torch.device("cuda"), torch.bfloat16, 64, 4096, 0.25) == ""
