"""The dual path: when twin passes run, for whom, and what they leave; its definition is a test of every family."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import DitAttnError, InwardWindow
from dit_attn.processors.attach import attach
from dit_attn.processors.methods.dual_path import Stored, stored_bytes
from tests._support.compose import forward, pipeline_run, same, tiny, tiny_pipeline

SMALL: dict[str, Any] = {"window": (4, 5), "snap": "no", "q_block": 32, "kv_block": 16, "override": "text"}


@pytest.mark.parametrize("store", ["model", "bf16", "fp8"])
@pytest.mark.parametrize("offload", [False, True])
def test_a_store_takes_what_was_told_and_gives_the_rows_back(store: str, offload: bool) -> None:
    rows = (
        torch.randn(2, 50, 3, 16, generator=torch.Generator().manual_seed(0)) * torch.tensor([1e-3, 1.0, 1e3])[:, None]
    )
    kept = Stored(rows, store, offload)
    assert kept.nbytes == 2 * stored_bytes(50, 3, 16, 4, store)
    error = (kept.rows(rows) - rows).norm(dim=-1) / rows.norm(dim=-1)
    assert float(error.max()) <= {"model": 0.0, "bf16": 4e-3, "fp8": 0.04}[store]


@pytest.mark.parametrize(
    "changes, passes, replaced",
    [({"interval": 1}, 8, 8), ({"interval": 2}, 4, 8), ({"interval": 3, "override_uncond": False}, 2, 4)],
)
def test_the_twin_runs_every_few_steps_for_the_branches_that_take_part(
    changes: Any, passes: int, replaced: int
) -> None:
    pipe, kwargs = tiny_pipeline("wan")
    session = dit_attn.enable(pipe, InwardWindow(**SMALL, **changes))
    pipeline_run(pipe, kwargs, steps=4)
    twin = attach.session_of(pipe.transformer).twin
    assert twin is not None and twin.evaluations == passes
    cross = [layer.stats for layer in attach.session_of(pipe.transformer).layers if layer.kind == "cross"]
    assert cross and {stats.replaced_calls for stats in cross} == {replaced}
    assert session is not None


def test_rows_without_the_prompt_keep_their_own_text_where_they_take_no_part() -> None:
    seen: dict[str, list[torch.Tensor]] = {}
    for name, changes in (("none", {"override": "none"}), ("cond", {"override_uncond": False}), ("both", {})):
        pipe, kwargs = tiny_pipeline("pixart")
        outputs = seen.setdefault(name, [])

        def note(call: Any, request: Any, out: torch.Tensor, outputs: Any = outputs) -> None:
            if call.pass_name == "plain":
                outputs.append(out.clone())

        window = InwardWindow(**{**SMALL, **changes})
        with dit_attn.enabled(pipe, window), dit_attn.observing(pipe, note, sites=("cross",)):
            pipeline_run(pipe, kwargs, steps=1)
    uncond, cond = [0], [1]
    torch.testing.assert_close(seen["cond"][0][uncond], seen["none"][0][uncond], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(seen["cond"][0][cond], seen["both"][0][cond], atol=1e-6, rtol=1e-5)
    assert not same(seen["none"][0][cond], seen["both"][0][cond])
    assert not same(seen["none"][0][uncond], seen["both"][0][uncond])


def test_the_twin_has_positions_and_a_temperature_of_its_own() -> None:
    model, args = tiny("flux")
    native = {"native": (8, 9), "window": (16, 9), "override": "text", "snap": "no", "interval": 1}
    scales: dict[str, set[float]] = {}
    with dit_attn.enabled(model, InwardWindow(**native, twin_rotary="interpolated", twin_temperature="entropy")):
        moved = forward(model, args)
        with dit_attn.observing(model, lambda c, r, o: scales.setdefault(c.pass_name, set()).add(c.softmax_scale)):
            forward(model, args)
        layers = attach.session_of(model).layers
        assert all("x0.5" in what for layer in layers for what in layer.stats.moved)
    with dit_attn.enabled(model, InwardWindow(**native)):
        plain = forward(model, args)
    assert not same(moved, plain)
    assert scales["plain"] == {0.25}
    assert [*scales["twin"]] == pytest.approx([0.25 * math.sqrt(math.log(288) / math.log(72))])


def test_its_size_is_told_before_a_run() -> None:
    pipe, _ = tiny_pipeline("wan")
    found = dit_attn.explain(pipe, InwardWindow(**SMALL, store="fp8"), height=64, width=80, num_frames=13)
    layers = 2 * found.layers
    assert found.memory == layers * stored_bytes(found.tokens, 2, 12, 4, "fp8")
    assert found.host_memory == 0 and "main memory" not in str(found)
    there = dit_attn.explain(pipe, InwardWindow(**SMALL, store="fp8", offload=True), height=64, width=80, num_frames=13)
    assert there.host_memory == there.memory == found.memory and "of it in main" in str(there)
    half = dit_attn.explain(pipe, InwardWindow(**SMALL, override_uncond=False), height=64, width=80, num_frames=13)
    assert half.memory == layers * stored_bytes(found.tokens, 2, 12, 4, "model") // 2


@pytest.mark.parametrize("changes, message", [({"store": "int4"}, "store"), ({"twin_temperature": -1.0}, "above 0")])
def test_settings_out_of_range_are_refused(changes: Any, message: str) -> None:
    with pytest.raises(DitAttnError, match=message):
        InwardWindow(**{**SMALL, **changes})
