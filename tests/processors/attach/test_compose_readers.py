"""RectifiedSpaAttn and ReTtention beside what people do to a stock pipeline."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import dit_attn
from dit_attn.processors.attach.attach import session_of
from tests._support.compose import forward, pipeline_run, requires, same, tiny, tiny_pipeline

RECTIFIED = dit_attn.RectifiedSpaAttn(density=0.3, q_block=32, kv_block=32, dense_steps=0)
RESHAPED = dit_attn.ReTtention(density=0.2, q_block=32, kv_block=32, dense_steps=1, period=3)
METHODS = pytest.mark.parametrize("method", [RECTIFIED, RESHAPED], ids=lambda method: method.slug)


def run_twice(model: Any, args: dict[str, Any]) -> list[torch.Tensor]:
    """Two steps: the second answers from what the first left."""
    later = (args["timestep"] * 0.5).to(args["timestep"].dtype)
    return [forward(model, args), forward(model, args, timestep=later)]


@METHODS
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_first_block_cache_skips_steps_and_the_readers_follow(name: str, method: Any) -> None:
    config = requires("FirstBlockCacheConfig")
    pipe, kwargs = tiny_pipeline(name)
    pipe.transformer.enable_cache(config(threshold=0.5))
    dit_attn.enable(pipe, method)
    found = pipeline_run(pipe, kwargs, steps=6)
    summary = dit_attn.summary(pipe)
    session = session_of(pipe.transformer)
    assert torch.isfinite(found).all() and 0 < summary.calls < 6 * 2 * len(summary.layers)
    assert summary.sparse_calls and session is not None
    assert same(found, pipeline_run(pipe, kwargs, steps=6))  # what a skipped last step left is gone


@METHODS
def test_adapters_change_the_answer_and_unloading_restores_it(method: Any) -> None:
    peft = pytest.importorskip("peft")
    model, args = tiny("wan")
    dit_attn.enable(model, method)
    plain = run_twice(model, args)
    torch.manual_seed(5)
    model.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False), adapter_name="tiny")  # type: ignore[operator]
    assert not same(plain, run_twice(model, args))
    model.delete_adapters("tiny")  # type: ignore[operator]
    assert same(plain, run_twice(model, args))


@METHODS
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_one_full_graph_serves_every_step(name: str, method: Any) -> None:
    settings = method if method is RECTIFIED else dit_attn.ReTtention(**{**vars(method), "dense_steps": 0})
    model, args = tiny(name)
    dit_attn.enable(model, settings)
    eager = run_twice(model, args)
    counter = CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled: Any = torch.compile(model, fullgraph=True, backend=counter)
    dit_attn.enable(model, settings)
    assert same(eager, run_twice(compiled, args))
    assert counter.frame_count <= 2
    torch._dynamo.reset()


@METHODS
def test_group_offload_keeps_the_numbers(method: Any) -> None:
    from diffusers.hooks import apply_group_offloading

    model, args = tiny("wan")
    dit_attn.enable(model, method)
    plain = run_twice(model, args)
    cpu = torch.device("cpu")
    apply_group_offloading(model, cpu, cpu, offload_type="block_level", num_blocks_per_group=1)
    dit_attn.enable(model, method)
    assert same(plain, run_twice(model, args))


@METHODS
def test_half_precision_stays_near_full(method: Any) -> None:
    model, args = tiny("wan")
    dit_attn.enable(model, method)
    full = run_twice(model, args)
    half = model.to(torch.bfloat16)
    cast = {key: x.to(torch.bfloat16) if x.is_floating_point() else x for key, x in args.items()}
    found = run_twice(half, cast)
    for a, b in zip(found, full):
        assert float((a.float() - b).norm() / b.norm()) < 0.05


@METHODS
def test_two_readers_conflict(method: Any) -> None:
    model, _ = tiny("wan")
    with pytest.raises(dit_attn.DitAttnError, match="cannot run together"):
        dit_attn.enable(model, method, dit_attn.BlockSparse())
