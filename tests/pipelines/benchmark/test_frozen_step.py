"""The clock stands at a step that the method computes, and methods without one are refused."""

from __future__ import annotations

import pytest
import torch

import dit_attn
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.benchmark.frozen_step import STEPS, FrozenPipeline, make_competitor, time_call
from tests.pipelines.benchmark.conftest import CPU, sparse_method


@pytest.mark.parametrize("first", [0.0, 0.3, 40, 0.98])
@pytest.mark.parametrize("slug", ["block-sparse", "rectified-spaattn", "re-ttention"])
def test_the_clock_stands_at_a_step_the_method_computes(wan, slug, first) -> None:
    model, inputs, _ = wan
    if slug == "re-ttention" and first == 0.98:
        first = 0.96  # it needs two steps
    one = make_competitor(slug, [sparse_method(slug, density=0.25, dense_steps=first)])
    frozen = FrozenPipeline(model, inputs, CPU)
    with torch.no_grad(), dit_attn.enabled(frozen, one.method) as session:
        for phase in one.phases:
            frozen.set_step(phase.step)
            before = dit_attn.summary(frozen).sparse_calls
            frozen.run_step()
            assert dit_attn.summary(frozen).sparse_calls == before + 3 and not dit_attn.summary(frozen).fallbacks
            assert (session.clock.step, session.clock.total) == (phase.step, STEPS)


@pytest.mark.parametrize(
    ("methods", "parts"),
    [
        ([], ("nothing", "one sparse method")),
        ([sparse_method("block-sparse"), sparse_method("re-ttention")], ("block-sparse + re-ttention",)),
        ([sparse_method("block-sparse", density=1.0)], ("keeps everything", "density")),
        ([sparse_method("block-sparse", dense_steps=1.0)], ("no sparse step", "dense_steps")),
        ([sparse_method("re-ttention", dense_steps=49)], ("no sparse step", "dense_steps")),
    ],
)
def test_a_method_without_a_sparse_step_is_refused(methods, parts) -> None:
    with pytest.raises(DitAttnError) as caught:
        make_competitor("mine", methods)
    assert all(part in str(caught.value) for part in ("--method mine", *parts))


def test_a_timed_call_counts_its_own_work() -> None:
    wall, cpu = time_call(lambda: sum(range(2_000_000)), CPU)
    assert wall > 0.0 and cpu > 0.0
