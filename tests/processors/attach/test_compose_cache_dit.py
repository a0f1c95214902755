"""cache-dit on the embedded pipelines: its bits without a method, methods in both orders, exact guidance."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import models
from tests._support.outputs import same

cache_dit = pytest.importorskip("cache_dit", reason="cache-dit is installed by `make`")

NAMES = ("tiny-image", "tiny-joint", "tiny-video")
STEPS = 4
COMPUTED, CACHED = (0, 1, 3), (2,)  # by the settings below
BLOCKS: dict[str, Any] = {"q_block": 16, "kv_block": 16, "density": 0.4, "dense_steps": 0}
SPARSE = (dit_attn.BlockSparse(**BLOCKS), dit_attn.RectifiedSpaAttn(**BLOCKS), dit_attn.ReTtention(**BLOCKS))
PAG = dit_attn.SoftPAG(heads="3", scale=2.0)
SLG = dit_attn.SLG(layers="1", scale=2.0, start=0.0, stop=1.0)


@pytest.fixture(scope="module", params=NAMES)
def pipe(request: pytest.FixtureRequest) -> Any:
    pipe = models.load(request.param)
    pipe.set_progress_bar_config(disable=True)
    size = 32 if request.param == "tiny-video" else 64
    small = {"height": size, "width": size, **({"num_frames": 3} if size == 32 else {})}
    pipe.test_call = {**models.call_defaults(request.param), **small, "num_inference_steps": STEPS}
    pipe.test_stock = run(pipe)
    cached(pipe)
    pipe.test_alone = run(pipe)
    assert cached_steps(pipe) == [*CACHED] and not same(pipe.test_alone, pipe.test_stock)
    cache_dit.disable_cache(pipe)
    return pipe


@pytest.fixture(autouse=True)
def clean(pipe: Any) -> Iterator[None]:
    yield
    dit_attn.disable(pipe)
    if hasattr(pipe, "_context_manager"):
        cache_dit.disable_cache(pipe)


def cached(pipe: Any, warmup: int = 2) -> None:
    """Enable cache-dit: after ``warmup`` steps every second one is answered by the cache."""
    config = cache_dit.DBCacheConfig(
        Fn_compute_blocks=1, Bn_compute_blocks=0, residual_diff_threshold=100.0, max_warmup_steps=warmup,
        max_continuous_cached_steps=1, num_inference_steps=None,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cache_dit.enable_cache(pipe, cache_config=config)


def both(pipe: Any, order: str, *methods: Any, **settings: Any) -> None:
    """Enable cache-dit and methods, in one of the two orders."""
    if order == "cache-first":
        cached(pipe, **settings)
    dit_attn.enable(pipe, *methods)
    if order != "cache-first":
        cached(pipe, **settings)


def run(pipe: Any, **changes: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    call = {**pipe.test_call, "output_type": "latent", "return_dict": False, **changes}
    return pipe("a large red circle at the left on white", generator=generator, **call)[0]


def cached_steps(pipe: Any) -> list[int]:
    return pipe.transformer._context_manager.get_context(pipe.transformer._context_names[0]).cached_steps


@pytest.mark.parametrize("order", ["cache-first", "cache-last"])
def test_without_a_method_the_bits_are_those_of_the_cache_alone(pipe: Any, order: str) -> None:
    alone = pipe.test_alone
    both(pipe, order)
    assert same(run(pipe), alone) and cached_steps(pipe) == [*CACHED]
    assert dit_attn.summary(pipe).calls > 0 and set(dit_attn.summary(pipe).fallbacks) == {"no method enabled"}
    dit_attn.enable(pipe, dit_attn.BlockSparse(**{**BLOCKS, "dense_steps": STEPS}))
    assert same(run(pipe), alone) and dit_attn.summary(pipe).sparse_calls == 0
    dit_attn.disable(pipe)
    assert same(run(pipe), alone)
    cache_dit.disable_cache(pipe)
    assert same(run(pipe), pipe.test_stock)


@pytest.mark.parametrize("method", SPARSE, ids=lambda method: method.slug)
def test_a_method_runs_in_every_layer_that_the_cache_computes_in_both_orders(pipe: Any, method: Any) -> None:
    dit_attn.enable(pipe, method)
    alone = run(pipe)
    full = dit_attn.summary(pipe)
    dit_attn.disable(pipe)
    found = []
    both(pipe, "cache-first", method, warmup=STEPS)
    assert same(run(pipe), alone)  # nothing is cached
    for order in ("cache-first", "cache-last"):
        dit_attn.disable(pipe)
        cache_dit.disable_cache(pipe)
        both(pipe, order, method)
        found.append(run(pipe))
        report = dit_attn.summary(pipe)
        assert cached_steps(pipe) == [*CACHED]
        first = report.layers[0].calls  # the layer of the block that the cache always computes
        assert all(layer.calls * STEPS == first * len(COMPUTED) for layer in report.layers[1:])
        assert report.sparse_calls > 0 and set(report.fallbacks) <= set(full.fallbacks)
    assert same(*found) and not same(found[0], alone)


@pytest.mark.parametrize("order", ["cache-first", "cache-last"])
def test_a_perturbed_pass_leaves_the_cache_alone(pipe: Any, order: str) -> None:
    both(pipe, order, dit_attn.SoftPAG(heads="3", scale=1e-20))  # too small to change a bit
    assert same(run(pipe), pipe.test_alone) and cached_steps(pipe) == [*CACHED]
    report = dit_attn.summary(pipe).guidance
    assert report is not None and (report.evaluations, report.steps) == (len(COMPUTED), STEPS)


def test_guidance_is_exact_at_computed_steps_and_its_last_update_serves_the_others(pipe: Any) -> None:
    method = SLG if "PixArt" in type(pipe).__name__ else PAG
    dit_attn.enable(pipe, method)
    alone = run(pipe)
    cached(pipe, warmup=STEPS)
    assert torch.allclose(run(pipe), alone, atol=1e-5)  # nothing is cached; no prefix is shared either
    dit_attn.disable(pipe)
    cache_dit.disable_cache(pipe)
    plain: list[torch.Tensor] = []
    guided: list[torch.Tensor] = []
    handles = [pipe.transformer.register_forward_hook(lambda *args: plain.append(args[-1][0].double()))]
    both(pipe, "cache-first", method)
    handles += [pipe.transformer.register_forward_hook(lambda *args: guided.append(args[-1][0].double()))]
    run(pipe)
    for handle in handles:
        handle.remove()
    calls = len(plain) // STEPS  # of a step
    updates = [(after - before)[-1] for before, after in zip(plain[::calls], guided[::calls])]
    for step in COMPUTED[1:]:
        assert not torch.allclose(updates[step], updates[step - 1], atol=1e-4)
    for step in CACHED:
        torch.testing.assert_close(updates[step], updates[step - 1], atol=1e-5, rtol=1e-4)
    (warning,) = dit_attn.summary(pipe).warnings
    assert f"a step cache answered {len(CACHED)} of {STEPS} passes" in warning and "Disable the cache" in warning
