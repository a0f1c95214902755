"""The numeric guard: poison and errors above the bound send a layer dense, whenever in a session they come."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import BlockSparse, models
from dit_attn.processors.core import dispatch, executor

BLOCKS: dict[str, Any] = {"q_block": 32, "kv_block": 32, "dense_steps": 0}
CALL = {**models.call_defaults("tiny-image"), "height": 64, "width": 64, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe() -> Any:
    pipe = models.load("tiny-image")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    out: torch.Tensor = pipe("a circle", generator=generator, output_type="latent", **CALL).images
    return out


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_poison_in_a_later_run_is_found_and_ends_with_the_session(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, value: float
) -> None:
    dit_attn.disable(pipe)
    stock = latents(pipe)
    with dit_attn.enabled(pipe, BlockSparse(density=0.25, **BLOCKS)):
        clean = latents(pipe)
        assert dit_attn.summary(pipe).sparse_calls
        with monkeypatch.context() as patch:
            patch.setattr(executor, "sparse_attention", lambda q, *args, **kwargs: torch.full_like(q, value))
            with pytest.warns(UserWarning, match="NaN or infinity"):
                assert torch.equal(latents(pipe), stock)
        assert torch.equal(latents(pipe), stock)  # no layer is trusted again
        report = dit_attn.summary(pipe)
        assert report.sparse_calls == 0 and "NaN or infinity" in str(report)
    with dit_attn.enabled(pipe, BlockSparse(density=0.25, **BLOCKS)):
        assert torch.equal(latents(pipe), clean)


def test_the_bound_is_measured_for_every_density_of_a_layer(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[int, int]] = []
    monkeypatch.setattr(
        executor, "sampled_error", lambda call, request, out: seen.append((call.layer.index, call.clock.step)) or 0.1
    )
    same, other = (0.5,) * 6 * 2, (0.5,) * 6 + (0.25,) * 6
    for table, times in ((same, 1), (other, 2)):
        seen.clear()
        with dit_attn.enabled(pipe, BlockSparse(densities=table, parts=2, max_error=0.5, **BLOCKS)):
            latents(pipe)
        assert sorted(seen) == sorted((layer, step) for layer in range(6) for step in range(times))


def test_a_part_of_the_run_that_is_too_sparse_sends_its_layers_dense(pipe: Any) -> None:
    with dit_attn.enabled(pipe, BlockSparse(density=0.5, max_error=10.0, **BLOCKS)):
        latents(pipe)
        bound = 1.5 * max(layer.error for layer in dit_attn.summary(pipe).layers)
    table = BlockSparse(densities=(0.5,) * 6 + (0.125,) * 6, parts=2, max_error=bound, **BLOCKS)
    with dit_attn.enabled(pipe, table), pytest.warns(UserWarning, match="above max_error"):
        latents(pipe)
        report = dit_attn.summary(pipe)
    broken = [layer for layer in report.layers if layer.fallbacks]
    assert broken and all(layer.sparse_calls == 1 and layer.error > bound for layer in broken)
    assert report.worst_error is not None and report.worst_error[0] > bound


def test_an_error_that_is_not_a_number_is_above_every_bound(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch.executor, "sampled_error", lambda *args: float("nan"))
    dit_attn.disable(pipe)
    stock = latents(pipe)
    with dit_attn.enabled(pipe, BlockSparse(density=0.25, max_error=100.0, **BLOCKS)):
        with pytest.warns(UserWarning, match="error nan is above"):
            assert torch.equal(latents(pipe), stock)
        assert dit_attn.summary(pipe).sparse_calls == 0
