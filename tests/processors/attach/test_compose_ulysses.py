"""Sequence parallelism: two gloo processes give what one gives."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.processors.core.positions import PositionMap
from tests._support.compose import SPARSE, forward, pipeline_run, requires, tiny, tiny_pipeline
from tests._support.cross_mixin import TextBiases
from tests._support.position_maps import Placed
from tests._support.ranks import run_ranks
from tests._support.span_biases import HeadBiases

NAMES = ("wan", "flux")
RECTIFIED = dit_attn.RectifiedSpaAttn(density=0.3, q_block=32, kv_block=32, dense_steps=0)
RESHAPED = dit_attn.ReTtention(density=0.2, q_block=32, kv_block=32, dense_steps=0)
PLACED = Placed((PositionMap(scale=(1, 0.5, 0.5)), PositionMap(offset=(0, 1, 2.5), region=slice(30, 200))))
TOP_P = dit_attn.BlockSparse(top_p=0.6, q_block=32, kv_block=32, dense_steps=0)
PER_HEAD = {  # of two heads, one on each rank
    "density": (dit_attn.BlockSparse(density=(0.2, 0.7), q_block=32, kv_block=32, dense_steps=0),),
    "one rank dense": (dit_attn.BlockSparse(density=(1.0, 0.3), q_block=32, kv_block=32, dense_steps=0),),
    "compensated": (dit_attn.RectifiedSpaAttn(density=(0.2, 0.7), q_block=32, kv_block=32, dense_steps=0),),
    "biases": (HeadBiases(),),
    "biases and a layout": (HeadBiases(), SPARSE),
}
GUIDED = (dit_attn.SoftPAG(scale=2.0, u=0.8), HeadBiases(), PER_HEAD["density"][0])


CROSS = (TextBiases(), SPARSE)


def split_model(name: str) -> tuple[Any, dict[str, Any]]:
    """A tiny model with a text that two ranks can share; LTX's ranks have half of it each, Wan's all of it."""
    model, args = tiny(name)
    if name == "ltx":
        args |= {"encoder_hidden_states": args["encoder_hidden_states"][:, :6], "encoder_attention_mask": None}
    return model, args


def rank(index: int, folder: Path) -> None:
    """One of two ranks: writes what it computed, with and without a method."""
    from diffusers import ContextParallelConfig

    torch.accelerator.device_count = lambda: 1  # type: ignore[assignment]  # diffusers divides by it; a CPU has none
    results: dict[str, Any] = {}
    for name in NAMES:
        for order in ("enable first", "parallel first"):
            model, args = tiny(name)
            if order == "enable first":
                dit_attn.enable(model, SPARSE)
            model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))  # type: ignore[operator]
            if order == "parallel first":
                results[f"{name} stock"] = forward(model, args)
                dit_attn.enable(model)
                results[f"{name} pass-through"] = forward(model, args)
                dit_attn.enable(model, PLACED)
                results[f"{name} placed"] = forward(model, args)
                dit_attn.enable(model, TOP_P)
                results[f"{name} top-p"] = forward(model, args)
                dit_attn.enable(model, RECTIFIED)
                results[f"{name} rectified"] = forward(model, args)
                dit_attn.enable(model, RESHAPED)
                forward(model, args)
                results[f"{name} reshaped"] = forward(model, args, timestep=args["timestep"] * 0.5)
                for label, methods in PER_HEAD.items():
                    dit_attn.enable(model, *methods)
                    results[f"{name} {label}"] = forward(model, args)
                    layers = dit_attn.summary(model).layers
                    results[f"{name} {label} stats"] = [(layer.density, layer.fallbacks) for layer in layers]
                dit_attn.enable(model, SPARSE)
            results[f"{name} {order}"] = forward(model, args)
            results[f"{name} {order} summary"] = dit_attn.summary(model).to_dict()
            dit_attn.disable(model)
            results[f"{name} {order} disabled"] = forward(model, args)
    pipe, kwargs = tiny_pipeline("wan")
    pipe.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    dit_attn.enable(pipe, *GUIDED)
    results["guided"] = pipeline_run(pipe, kwargs)
    results["guided passes"] = dit_attn.summary(pipe).to_dict()["guidance"]["evaluations"]
    for name in ("wan", "ltx"):
        model, args = split_model(name)
        model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        stock = forward(model, args)
        dit_attn.enable(model, TextBiases(value=0.0))
        unbiased = torch.equal(stock, forward(model, args))
        dit_attn.enable(model, *CROSS)
        biased, layers = forward(model, args), dit_attn.summary(model).cross_layers
        dit_attn.disable(model)
        results[f"{name} cross"] = biased, unbiased, layers, torch.equal(stock, forward(model, args))
    if index == 0:
        torch.save(results, folder / "results.pt")


@pytest.fixture(scope="module")
def parallel(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What rank 0 of two wrote."""
    requires("ContextParallelConfig")
    folder = tmp_path_factory.mktemp("ulysses")
    run_ranks(rank, 2, folder)
    return torch.load(folder / "results.pt", weights_only=False)


@pytest.mark.parametrize("name", NAMES)
def test_pass_through_and_disable_differ_by_nothing(name: str, parallel: dict[str, Any]) -> None:
    stock = parallel[f"{name} stock"]
    assert torch.equal(stock, parallel[f"{name} pass-through"])
    assert torch.equal(stock, parallel[f"{name} enable first disabled"])
    assert torch.equal(stock, parallel[f"{name} parallel first disabled"])


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_compute_what_one_process_computes(name: str, parallel: dict[str, Any]) -> None:
    model, args = tiny(name)
    stock = forward(model, args)
    for method, orders in ((SPARSE, ("enable first", "parallel first")), (TOP_P, ("top-p",))):
        layers = len(dit_attn.enable(model, method).layers)
        single = forward(model, args)
        assert (single - stock).abs().max() > 1e-3
        for order in orders:
            torch.testing.assert_close(parallel[f"{name} {order}"], single, atol=1e-5, rtol=1e-4)
            if order != "top-p":
                assert parallel[f"{name} {order} summary"]["sparse_calls"] == layers


@pytest.mark.parametrize("name", NAMES)
def test_the_compensating_readers_see_the_whole_sequence(name: str, parallel: dict[str, Any]) -> None:
    model, args = tiny(name)
    dit_attn.enable(model, RECTIFIED)
    torch.testing.assert_close(parallel[f"{name} rectified"], forward(model, args), atol=1e-5, rtol=1e-4)
    dit_attn.enable(model, RESHAPED)
    forward(model, args)
    single = forward(model, args, timestep=args["timestep"] * 0.5)
    torch.testing.assert_close(parallel[f"{name} reshaped"], single, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_positions_are_moved_in_the_shards_as_in_one_process(name: str, parallel: dict[str, Any]) -> None:
    model, args = tiny(name)
    stock = forward(model, args)
    dit_attn.enable(model, PLACED)
    single = forward(model, args)
    assert (single - stock).abs().max() > 1e-3
    torch.testing.assert_close(parallel[f"{name} placed"], single, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("label", PER_HEAD)
@pytest.mark.parametrize("name", NAMES)
def test_a_rank_uses_the_budgets_and_biases_of_its_own_heads(name: str, label: str, parallel: dict[str, Any]) -> None:
    model, args = tiny(name)
    stock = forward(model, args)
    dit_attn.enable(model, *PER_HEAD[label])
    single = forward(model, args)
    assert (single - stock).abs().max() > 1e-3
    torch.testing.assert_close(parallel[f"{name} {label}"], single, atol=1e-5, rtol=1e-4)
    swapped = [method for method in PER_HEAD[label] if isinstance(getattr(method, "density", None), tuple)]
    if swapped:  # the other rank's budget is another result
        dit_attn.enable(model, dataclasses.replace(swapped[0], density=swapped[0].density[::-1]))
        assert (forward(model, args) - single).abs().max() > 1e-3
    assert all(not fallbacks for _, fallbacks in parallel[f"{name} {label} stats"])


def test_a_guided_run_with_biases_and_a_layout_is_that_of_one_process(parallel: dict[str, Any]) -> None:
    pipe, kwargs = tiny_pipeline("wan")
    stock = pipeline_run(pipe, kwargs)
    dit_attn.enable(pipe, *GUIDED[1:])
    unguided = pipeline_run(pipe, kwargs)
    dit_attn.enable(pipe, *GUIDED)
    single = pipeline_run(pipe, kwargs)
    assert (single - stock).abs().max() > 1e-3 and (single - unguided).abs().max() > 1e-3
    torch.testing.assert_close(parallel["guided"], single, atol=1e-4, rtol=1e-3)
    guidance = dit_attn.summary(pipe).guidance
    assert guidance is not None and parallel["guided passes"] == guidance.evaluations > 0


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_cross_attention_of_two_ranks_is_that_of_one_process(name: str, parallel: dict[str, Any]) -> None:
    model, args = split_model(name)
    stock = forward(model, args)
    dit_attn.enable(model, *CROSS)
    single = forward(model, args)
    split, unbiased, layers, restored = parallel[f"{name} cross"]
    assert (single - stock).abs().max() > 1e-3
    torch.testing.assert_close(split, single, atol=1e-5, rtol=1e-4)
    assert unbiased and restored
    assert [(layer.biased_calls, layer.fallbacks) for layer in layers] == [(1, {})] * 2
