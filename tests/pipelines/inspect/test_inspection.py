"""An inspection changes nothing about a run, covers every layer, head, step and branch, and survives the disk."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.errors import DitAttnError
from dit_attn.eval import attention_stats as stats
from dit_attn.pipelines.inspect import Collector, Inspection, inspect, inspect_run
from dit_attn.pipelines.inspect.collector import AXES
from dit_attn.processors.attach.attach import session_of
from tests._support.compose import pipeline_run, tiny_pipeline

STEPS = 2


def arguments(kwargs: dict[str, Any]) -> dict[str, Any]:
    return {**kwargs, "num_inference_steps": STEPS, "output_type": "latent", "return_dict": False, "seed": 5}


@pytest.fixture(scope="module", params=("wan", "flux", "pixart", "cogvideox", "sd3"))
def inspected(request: pytest.FixtureRequest) -> tuple[Any, dict[str, Any], Inspection]:
    """A tiny random pipeline, its arguments and an inspection of a run."""
    pipe, kwargs = tiny_pipeline(request.param)
    return pipe, kwargs, inspect(pipe, arguments(kwargs), rows=16, block=16)


def test_the_result_is_that_of_a_run_without_measuring(inspected: tuple[Any, dict[str, Any], Inspection]) -> None:
    pipe, kwargs, found = inspected
    assert torch.equal(found.output[0], pipeline_run(pipe, kwargs, STEPS, seed=5))
    timing = found.meta["timing"]
    assert timing["unchanged"] is True
    assert timing["overhead"] == pytest.approx(timing["observed_seconds"] / timing["plain_seconds"] - 1)
    assert 0 < timing["watching_seconds"] < timing["observed_seconds"]
    assert session_of(pipe.transformer) is None


def test_every_layer_head_and_step_has_every_statistic(inspected: tuple[Any, dict[str, Any], Inspection]) -> None:
    _, _, found = inspected
    axes = found.meta["axes"]
    shape = [len(axes[axis]) for axis in AXES]
    assert shape[2] == STEPS and axes["step"] == ["step 1", "step 2"] and len(set(axes["layer"])) == shape[1]
    assert {"keys_90", "blocks_90", "best_25", "recall_25", "entropy", "lse", "dh", "dw"} <= set(found.tensors)
    for name, tensor in found.tensors.items():
        assert list(tensor.shape) == shape == found.meta["statistics"][name]["shape"], name
        assert bool(tensor.isfinite().all()), name
        low, high = stats.describe(name).scale or (-torch.inf, torch.inf)
        assert low - 1e-5 <= float(tensor.min()) and float(tensor.max()) <= high + 1e-5, name


def test_masses_of_the_spans_sum_to_one_and_text_is_named(inspected: tuple[Any, dict[str, Any], Inspection]) -> None:
    pipe, _, found = inspected
    masses = [tensor for name, tensor in found.tensors.items() if name.startswith("mass.")]
    torch.testing.assert_close(sum(masses), torch.ones_like(masses[0]), atol=1e-4, rtol=0)
    joint = type(pipe.transformer).__name__ in ("FluxTransformer2DModel", "SD3Transformer2DModel")
    assert "mass.text" in found.tensors or not joint


def test_recall_lies_between_uniform_and_the_best_blocks(inspected: tuple[Any, dict[str, Any], Inspection]) -> None:
    _, _, found = inspected
    for share in ("10", "25"):
        assert bool((found.tensors[f"recall_{share}"] <= found.tensors[f"best_{share}"] + 1e-5).all())


def test_branches_of_guidance_are_kept_apart() -> None:
    pipe, kwargs = tiny_pipeline("wan")
    found = inspect(pipe, {**arguments(kwargs), "guidance_scale": 4.0}, overhead=False)
    assert found.meta["axes"]["branch"] == ["cond", "uncond"]
    assert not torch.equal(found.tensors["lse"][0], found.tensors["lse"][1])
    alone = inspect(pipe, {**arguments(kwargs), "guidance_scale": 1.0}, overhead=False)
    assert alone.meta["axes"]["branch"] == ["cond"]
    torch.testing.assert_close(alone.tensors["lse"][0, :, 0], found.tensors["lse"][0, :, 0])
    assert found.meta["timing"]["overhead"] is None and found.meta["timing"]["unchanged"] is None


def test_the_same_seed_looks_at_the_same_rows_and_a_run_under_a_method_is_the_methods() -> None:
    pipe, kwargs = tiny_pipeline("wan")
    first, again = (inspect(pipe, arguments(kwargs), rows=8, overhead=False) for _ in range(2))
    other = inspect(pipe, arguments(kwargs), rows=8, seed=9, overhead=False)
    assert all(torch.equal(tensor, again.tensors[name]) for name, tensor in first.tensors.items())
    assert not torch.equal(first.tensors["lse"], other.tensors["lse"])
    method = dit_attn.BlockSparse(density=0.2, q_block=32, kv_block=32, dense_steps=0)
    with dit_attn.enabled(pipe, method):
        sparse = inspect(pipe, arguments(kwargs), rows=8, overhead=False)
        assert dit_attn.summary(pipe).density < 0.9
    assert not torch.equal(first.tensors["lse"][:, -1], sparse.tensors["lse"][:, -1])


def test_saved_and_loaded_it_is_the_same(inspected: tuple[Any, dict[str, Any], Inspection], tmp_path: Path) -> None:
    _, _, found = inspected
    tensors, meta = found.save(tmp_path / "a" / "b")
    assert sorted(path.name for path in meta.parent.iterdir()) == [meta.name, tensors.name]
    back = Inspection.load(tmp_path / "a" / "b")
    assert back.meta == json.loads(json.dumps(found.meta))
    assert set(back.tensors) == set(found.tensors)
    assert all(torch.equal(tensor, back.tensors[name]) for name, tensor in found.tensors.items())


def test_damaged_files_are_refused_in_one_line(
    inspected: tuple[Any, dict[str, Any], Inspection], tmp_path: Path
) -> None:
    _, _, found = inspected
    with pytest.raises(DitAttnError, match=r"holds no inspection.*inspect\.json"):
        Inspection.load(tmp_path)
    tensors, meta = found.save(tmp_path)
    tensors.write_bytes(tensors.read_bytes()[:40])
    with pytest.raises(DitAttnError, match="holds no inspection"):
        Inspection.load(tmp_path)
    found.save(tmp_path)
    meta.write_text(json.dumps({**found.meta, "statistics": {"lse": {}}}))
    with pytest.raises(DitAttnError, match="not of one run"):
        Inspection.load(tmp_path)


def test_a_run_without_a_call_that_can_be_measured_is_refused() -> None:
    pipe, _ = tiny_pipeline("wan")
    with pytest.raises(DitAttnError, match=r"no self-attention call of .*no call at all"):
        inspect_run(pipe, lambda: None, Collector(), overhead=False)
    assert session_of(pipe.transformer) is None
