"""What people do to a stock pipeline before and after ``enable``: caches, LoRA, offload, copies, threads, faults."""

from __future__ import annotations

import copy
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig, FluxTransformer2DModel
from diffusers.hooks import apply_group_offloading
from torch.overrides import TorchFunctionMode

import dit_attn
from dit_attn.processors.attach import attach, attention_processor
from tests._support.family_mixin import SPARSE
from tests._support.outputs import same
from tests.families.test_flux import TestFlux as FluxCase
from tests.families.test_pixart import TestPixArt as PixArtCase
from tests.families.test_wan import TestWan as WanCase


def build(case: Any) -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    model = case().model().eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    torch.manual_seed(1)
    return model, case().inputs()


def run(model: Any, arguments: dict[str, Any]) -> torch.Tensor:
    with torch.no_grad():
        return model(**copy.deepcopy(arguments), return_dict=False)[0]


def run_pipeline(pipe: Any, kwargs: dict[str, Any], steps: int = 4) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    arguments = {**copy.deepcopy(kwargs), "num_inference_steps": steps, "generator": generator}
    with torch.no_grad():
        return pipe(**arguments, output_type="latent", return_dict=False)[0]


# -- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", [WanCase, FluxCase])
def test_first_block_cache_over_a_whole_run(case: Any) -> None:
    torch.manual_seed(0)
    pipe, kwargs = case().pipeline()
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.5))
    cached = run_pipeline(pipe, kwargs)
    dit_attn.enable(pipe)
    assert same(cached, run_pipeline(pipe, kwargs))
    passed = dit_attn.summary(pipe).calls
    dit_attn.enable(pipe, SPARSE)
    sparse = run_pipeline(pipe, kwargs)
    assert torch.isfinite(sparse).all() and not same(cached, sparse)
    summary = dit_attn.summary(pipe)
    assert 0 < summary.sparse_calls == summary.calls
    full = 4 * 2 * len(summary.layers)
    assert passed < full  # the cache really skipped blocks, and the statistics show it
    dit_attn.disable(pipe)
    assert same(cached, run_pipeline(pipe, kwargs))
    pipe.transformer.disable_cache()


# -- adapters, precision, offload ------------------------------------------------------------------------------------


def lora(model: Any) -> None:
    from peft import LoraConfig

    torch.manual_seed(5)
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q", "to_v"], init_lora_weights=False), adapter_name="tiny")


@pytest.mark.parametrize("case", [WanCase, FluxCase])
def test_adapters_load_and_unload_around_a_session(case: Any) -> None:
    model, arguments = build(case)
    plain = run(model, arguments)
    lora(model)
    adapted = run(model, arguments)
    assert not same(plain, adapted)
    model.delete_adapters("tiny")
    dit_attn.enable(model)
    lora(model)
    assert same(adapted, run(model, arguments))
    model.disable_adapters()
    assert same(plain, run(model, arguments))
    model.enable_adapters()
    dit_attn.disable(model)
    assert same(adapted, run(model, arguments))


def test_layerwise_casting_composes() -> None:
    model, arguments = build(WanCase)
    model.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    cast = run(model, arguments)
    dit_attn.enable(model)
    assert same(cast, run(model, arguments))
    dit_attn.enable(model, SPARSE)
    run(model, arguments)
    assert dit_attn.summary(model).sparse_calls == 2


@pytest.mark.parametrize("kind", ["block_level", "leaf_level"])
def test_group_offload_composes(kind: str) -> None:
    model, arguments = build(WanCase)
    plain = run(model, arguments)
    dit_attn.enable(model)
    extra = {"num_blocks_per_group": 1} if kind == "block_level" else {}
    cpu = torch.device("cpu")
    apply_group_offloading(model, onload_device=cpu, offload_device=cpu, offload_type=kind, **extra)
    assert same(plain, run(model, arguments))
    dit_attn.enable(model, SPARSE)
    run(model, arguments)
    assert dit_attn.summary(model).sparse_calls == 2


# -- copies and files ------------------------------------------------------------------------------------------------


def test_a_copied_pipeline_has_its_own_session() -> None:
    torch.manual_seed(0)
    pipe, kwargs = WanCase().pipeline()
    dit_attn.enable(pipe, SPARSE)
    first = run_pipeline(pipe, kwargs)
    transformer = copy.deepcopy(pipe.transformer)
    session, other = attach.session_of(pipe.transformer), attach.session_of(transformer)
    assert session is not None and other is not None and session is not other and other.model is transformer
    original, pipe.transformer = pipe.transformer, transformer
    assert same(first, run_pipeline(pipe, kwargs))
    dit_attn.disable(pipe)
    pipe.transformer = original
    assert same(first, run_pipeline(pipe, kwargs))


def test_saving_and_pickling_leave_no_trace_of_a_session(tmp_path: Path) -> None:
    model, arguments = build(FluxCase)
    plain = run(model, arguments)
    dit_attn.enable(model, SPARSE)
    model.save_pretrained(tmp_path)
    assert same(plain, run(FluxTransformer2DModel.from_pretrained(tmp_path).eval(), arguments))
    processor = model.transformer_blocks[0].attn.processor
    copied = pickle.loads(pickle.dumps(processor))
    assert type(copied).__name__ == "FluxAttnProcessor" and not attention_processor.is_wrapped(copied)


# -- other code around the attention call ----------------------------------------------------------------------------


class ValueOnly(TorchFunctionMode):
    """What diffusers' perturbed-attention hook does: the attention call returns its values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            bound = {**dict(zip(("query", "key", "value"), args)), **(kwargs or {})}
            if bound["query"].shape == bound["key"].shape:
                return bound["value"]
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("case", [WanCase, PixArtCase])
def test_an_outer_function_mode_is_respected(case: Any) -> None:
    model, arguments = build(case)
    with ValueOnly():
        stock = run(model, arguments)
    dit_attn.enable(model, SPARSE)
    with ValueOnly():
        assert same(stock, run(model, arguments))
    assert set(dit_attn.summary(model).fallbacks) == {"ValueOnly is active around the attention call"}


def test_class_keyed_registries_know_the_derived_classes() -> None:
    from diffusers.hooks._helpers import AttentionProcessorRegistry

    model, _ = build(FluxCase)
    stock = type(model.transformer_blocks[0].attn.processor)
    AttentionProcessorRegistry.get(stock)
    dit_attn.enable(model)
    derived = type(model.transformer_blocks[0].attn.processor)
    assert derived is not stock and isinstance(model.transformer_blocks[0].attn.processor, stock)
    assert AttentionProcessorRegistry.get(derived) is AttentionProcessorRegistry.get(stock)


def test_processors_that_are_modules_keep_their_weights() -> None:
    from diffusers.models.transformers.transformer_flux import FluxIPAdapterAttnProcessor

    model, arguments = build(FluxCase)
    torch.manual_seed(7)
    model.transformer_blocks[0].attn.processor = FluxIPAdapterAttnProcessor(32, 32, num_tokens=(4,), scale=0.5)
    arguments["joint_attention_kwargs"] = {"ip_hidden_states": [torch.randn(2, 4, 32)]}
    keys, plain = set(model.state_dict()), run(model, arguments)
    assert any("processor.to_k_ip" in key for key in keys)
    dit_attn.enable(model)
    assert set(model.state_dict()) == keys and same(plain, run(model, arguments))
    dit_attn.disable(model)
    assert set(model.state_dict()) == keys and same(plain, run(model, arguments))


# -- the calls themselves --------------------------------------------------------------------------------------------


def test_attn_processors_work_through_the_stock_setter() -> None:
    model, arguments = build(WanCase)
    plain = run(model, arguments)
    dit_attn.enable(model, SPARSE)
    expected = run(model, arguments)
    dit_attn.disable(model)
    processors = dit_attn.attn_processors(model, SPARSE)
    assert set(processors) == set(model.attn_processors)
    assert same(plain, run(model, arguments))  # nothing is on before the setter is called
    model.set_attn_processor(dict(processors))
    assert same(expected, run(model, arguments))
    assert dit_attn.summary(model).sparse_calls == 2
    dit_attn.disable(model)
    assert same(plain, run(model, arguments))


def test_enabled_restores_what_was_on_before() -> None:
    model, arguments = build(WanCase)
    plain = run(model, arguments)
    with dit_attn.enabled(model, SPARSE):
        half = run(model, arguments)
        with dit_attn.enabled(model, dit_attn.BlockSparse(density=0.2, q_block=32, kv_block=32, dense_steps=0)):
            assert not same(half, run(model, arguments))
        assert same(half, run(model, arguments))
    assert same(plain, run(model, arguments))


def test_two_readers_conflict_and_nothing_is_changed() -> None:
    model, _ = build(WanCase)
    with pytest.raises(dit_attn.DitAttnError, match="cannot run together"):
        dit_attn.enable(model, SPARSE, dit_attn.BlockSparse(top_p=0.9))
    assert attach.session_of(model) is None


def test_two_threads_do_not_mix() -> None:
    jobs = [(*build(case), method) for case, method in ((WanCase, SPARSE), (FluxCase, SPARSE))]
    expected = []
    for model, arguments, method in jobs:
        dit_attn.enable(model, method)
        expected.append(run(model, arguments))
    found: list[list[torch.Tensor]] = [[], []]

    def work(i: int) -> None:
        for _ in range(5):
            found[i].append(run(jobs[i][0], jobs[i][1]))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(expected[i], out) for i in range(2) for out in found[i])


# -- the guard -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["raises", "nan"])
def test_a_failing_kernel_leaves_its_layer_dense_and_says_so(fault: str, monkeypatch: Any) -> None:
    from dit_attn.processors.core import executor

    model, arguments = build(WanCase)
    plain = run(model, arguments)

    def broken(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if fault == "raises":
            raise RuntimeError("no image for this device")
        return torch.full_like(q, float("nan"))

    monkeypatch.setattr(executor, "sparse_attention", broken)
    dit_attn.enable(model, SPARSE)
    with pytest.warns(UserWarning, match="goes back to dense attention"):
        assert same(plain, run(model, arguments))
    summary = dit_attn.summary(model)
    assert summary.sparse_calls == 0 and sum(summary.fallbacks.values()) == 2
    assert ("no image for this device" if fault == "raises" else "NaN") in next(iter(summary.fallbacks))
