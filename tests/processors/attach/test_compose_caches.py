"""Other caches, fused adapters, and model offload over whole stock runs: exact with no method, alive with one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_attn
from tests._support.compose import SPARSE, forward, pipeline_run, requires, same, tiny, tiny_pipeline


def config(kind: str, pipe: Any) -> Any:
    """A cache that skips something within four steps."""
    if kind == "TaylorSeerCacheConfig":
        return requires(kind)(cache_interval=2, disable_cache_before_step=1, max_order=1)
    if kind == "MagCacheConfig":
        return requires(kind)(num_inference_steps=4, retention_ratio=0.1, threshold=1.0, mag_ratios=torch.ones(8))
    return requires(kind)(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 2000),
        current_timestep_callback=lambda: pipe.current_timestep,
    )


# TaylorSeer's default patterns find no attention in Wan's blocks, so that nothing of it would be tested there.
@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("flux", "TaylorSeerCacheConfig"),
        ("wan", "MagCacheConfig"),
        ("flux", "MagCacheConfig"),
        ("wan", "PyramidAttentionBroadcastConfig"),
        ("flux", "PyramidAttentionBroadcastConfig"),
    ],
)
def test_a_cache_keeps_its_decisions(name: str, kind: str) -> None:
    outputs = []
    for ours in (False, True):
        pipe, kwargs = tiny_pipeline(name)
        if ours:
            dit_attn.enable(pipe)
        pipe.transformer.enable_cache(config(kind, pipe))
        outputs.append(pipeline_run(pipe, kwargs, steps=4))
    assert same(*outputs)
    full = 4 * 2 * len(dit_attn.summary(pipe).layers)
    assert 0 < dit_attn.summary(pipe).calls < full  # the cache really skipped
    pipe, kwargs = tiny_pipeline(name)
    pipe.transformer.enable_cache(config(kind, pipe))
    dit_attn.enable(pipe, SPARSE)
    sparse = pipeline_run(pipe, kwargs, steps=4)
    summary = dit_attn.summary(pipe)
    assert torch.isfinite(sparse).all() and not same(sparse, outputs[0])
    assert 0 < summary.sparse_calls == summary.calls < full


@pytest.mark.parametrize("kind", ["FirstBlockCacheConfig", "TaylorSeerCacheConfig"])
def test_a_perturbed_pass_leaves_the_cache_context_that_several_calls_share(kind: str) -> None:
    chosen = requires(kind)(threshold=10.0) if kind.startswith("First") else config(kind, None)
    outputs, ran = [], []
    for guided in (False, True):
        model, args = tiny("flux")
        args["timestep"] = torch.tensor([0.9])
        if guided:
            dit_attn.enable(model, dit_attn.SoftPAG(heads="1"))
        model.enable_cache(chosen)  # type: ignore[operator]
        seen: list[bool] = []
        model.transformer_blocks[-1].norm2.register_forward_hook(lambda *_, seen=seen: seen.append(True))
        with model.cache_context("cond"):  # type: ignore[operator]
            first = forward(model, args)
            outputs.append((first, forward(model, args | {"timestep": torch.tensor([0.5])})))
        ran.append(len(seen))
    assert ran[1] == 2 * ran[0]  # the cache answers in the second pass of either
    assert not any(same(plain, guided) for plain, guided in zip(*outputs))


def test_fused_and_switched_adapters_are_exact() -> None:
    peft = pytest.importorskip("peft")
    outputs = []
    for ours in (False, True):
        model, args = tiny("wan")
        for name in ("one", "two"):
            adapter = peft.LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False)
            model.add_adapter(adapter, adapter_name=name)  # type: ignore[operator]
            if ours and name == "one":
                dit_attn.enable(model)
        found = []
        for chosen, weights in ((["one"], [1.0]), (["one", "two"], [0.5, 0.25])):
            model.set_adapters(chosen, weights)  # type: ignore[operator]
            found.append(forward(model, args))
        model.fuse_lora(adapter_names=["one"])  # type: ignore[operator]
        found.append(forward(model, args))
        model.unfuse_lora()  # type: ignore[operator]
        found.append(forward(model, args))
        outputs.append(found)
    assert same(*outputs) and not same(outputs[0][0], outputs[0][1])


def test_model_offload_hooks_are_kept() -> None:
    pipe, kwargs = tiny_pipeline("wan")
    plain = pipeline_run(pipe, kwargs)
    dit_attn.enable(pipe)
    pipe.enable_model_cpu_offload(device="cpu")
    assert same(plain, pipeline_run(pipe, kwargs))
    dit_attn.disable(pipe)
    assert hasattr(pipe.transformer, "_hf_hook")
    assert same(plain, pipeline_run(pipe, kwargs))
