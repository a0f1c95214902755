"""``auto`` in runs: the bits of what it picks, stock bits where it picks nothing, dense where sparse is slow."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import Auto, DitAttnError, models
from dit_attn.kernels.cost.store import VARIABLE
from dit_attn.processors.core import dispatch, executor
from dit_attn.processors.methods.auto import VIDEO
from dit_attn.processors.methods.base import Method
from dit_attn.processors.methods.presets import method_for
from tests._support.compose import forward, tiny
from tests._support.cost_files import FAST, measured
from tests._support.outputs import same

SIZES = {
    "tiny-image": {"height": 64, "width": 64},
    "tiny-video": {"height": 32, "width": 32, "num_frames": 4},
    "tiny-joint": {"height": 64, "width": 64},
}


def load(name: str) -> Any:
    pipe = models.load(name)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def text_of(summary: dit_attn.Summary) -> str:
    """A summary without its line breaks."""
    return " ".join(str(summary).split())


def run(pipe: Any, name: str, steps: int) -> torch.Tensor:
    call = {**models.call_defaults(name), **SIZES[name], "num_inference_steps": steps, "output_type": "latent"}
    return pipe("a red circle", generator=torch.Generator().manual_seed(0), return_dict=False, **call)[0]


class Ticks:
    """A clock that goes on by one second whenever it is read, and by more where a kernel is slow."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1.0
        return self.now


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    """The clock of attention calls: dense and sparse ones take a second each."""
    found = Ticks()
    monkeypatch.setattr(dispatch, "time", found)
    return found


@pytest.mark.parametrize(
    ("name", "steps", "slug"),
    [
        ("tiny-joint", 10, "rectified-spaattn"),
        ("tiny-video", 10, "re-ttention"),
        ("tiny-video", 4, "rectified-spaattn"),
    ],
)
def test_auto_is_bit_equal_to_the_method_that_it_picks(
    name: str, steps: int, slug: str, tmp_path: Path, monkeypatch: Any
) -> None:
    measured(tmp_path, monkeypatch)
    pipe = load(name)
    settings = {"dense_steps": 0, "max_error": 0.5} if steps < 10 else {}
    dit_attn.enable(pipe, slug, **settings)
    alone = run(pipe, name, steps)
    calls = dit_attn.summary(pipe).sparse_calls
    dit_attn.enable(pipe, Auto(watch=False, max_error=0.5))
    assert same(run(pipe, name, steps), alone)
    found = dit_attn.summary(pipe)
    assert found.sparse_calls == calls > 0 and f"{slug}, density" in str(found)
    assert "costs: measured on this machine" in str(found) and f"preset {name}" in str(found)
    (decision,) = found.reports["auto"].decisions
    picked = method_for(slug, pipe.transformer).to_dict()
    assert decision["method"]["density"] == picked["density"] and decision["steps"] == steps
    assert json.dumps(found.to_dict())


def test_timing_leaves_the_bits_alone_where_sparse_calls_are_not_slower(
    tmp_path: Path, monkeypatch: Any, ticks: Ticks
) -> None:
    measured(tmp_path, monkeypatch)
    pipe = load("tiny-image")
    dit_attn.enable(pipe, "rectified-spaattn")
    alone = run(pipe, "tiny-image", 10)
    dit_attn.enable(pipe, "auto")
    assert same(run(pipe, "tiny-image", 10), alone)
    assert "dense calls are timed first" not in dit_attn.summary(pipe).fallbacks  # the dense step has them


@pytest.mark.parametrize("name", ["wan", "flux", "sd3", "pixart"])
def test_sequences_below_the_table_are_stock_bit_for_bit_with_the_reason(
    name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    measured(tmp_path, monkeypatch, tokens=100_000)
    model, args = tiny(name)
    stock = forward(model, args)
    dit_attn.enable(model, "auto")
    assert same(forward(model, args), stock)
    found = dit_attn.summary(model)
    assert found.sparse_calls == 0 and set(found.fallbacks) <= {
        "auto expects no gain", "sequence under 256 tokens", "visual tokens are not consecutive"
    }  # fmt: skip
    if "auto expects no gain" in found.fallbacks:
        assert "fewer than the fewest measured, 100,000" in str(found)
    dit_attn.disable(model)
    assert same(forward(model, args), stock)


def test_a_corrupt_table_is_one_line_in_the_summary_and_the_run_goes_on(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "costs.json").write_text("{")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "costs.json"))
    pipe = load("tiny-image")
    stock = run(pipe, "tiny-image", 1)
    dit_attn.enable(pipe, "auto")
    with pytest.warns(UserWarning, match="is not used .*run dit-attn bench kernels --save again"):
        assert same(run(pipe, "tiny-image", 1), stock)
    assert text_of(dit_attn.summary(pipe)).count("is not used") == 1


@pytest.mark.parametrize(("steps", "name"), [(10, "tiny-image"), (4, "tiny-image"), (10, "tiny-video")])
def test_sparse_calls_that_are_slower_than_dense_ones_end_for_the_run(
    steps: int, name: str, tmp_path: Path, monkeypatch: Any, ticks: Ticks
) -> None:
    measured(tmp_path, monkeypatch)
    stock = executor.run

    def slow(*args: Any, **kwargs: Any) -> torch.Tensor:
        ticks.now += 1.0
        return stock(*args, **kwargs)

    monkeypatch.setattr(executor, "run", slow)
    pipe = load(name)
    dit_attn.enable(pipe, Auto(max_error=9.0))
    run(pipe, name, steps)
    found = dit_attn.summary(pipe)
    slowed = found.fallbacks["sparse calls were slower than dense ones"]
    assert slowed > 0 and found.sparse_calls + sum(found.fallbacks.values()) == found.calls
    assert "measured: a sparse call took 2.00 of" in text_of(found) and "bench kernels --save" in text_of(found)
    if name == "tiny-image":
        assert found.sparse_calls <= 8 + 1  # one judgement
    assert found.fallbacks.get("dense calls are timed first", 0) == (2 if steps < 10 else 0)
    monkeypatch.setattr(executor, "run", stock)
    run(pipe, name, steps)
    assert dit_attn.summary(pipe).sparse_calls > found.sparse_calls  # the next run tries again


def test_nothing_is_timed_where_results_shall_not_depend_on_it(tmp_path: Path, monkeypatch: Any) -> None:
    measured(tmp_path, monkeypatch)
    monkeypatch.setattr("dit_attn.processors.methods.auto.Watch", lambda: pytest.fail("timed"))
    pipe = load("tiny-image")
    dit_attn.enable(pipe, Auto(watch=False, max_error=9.0))
    run(pipe, "tiny-image", 2)
    assert dit_attn.summary(pipe).sparse_calls > 0


def test_the_bound_of_short_runs_holds_at_every_step(tmp_path: Path, monkeypatch: Any) -> None:
    measured(tmp_path, monkeypatch)
    seen: list[float] = []
    stock = executor.sampled_error
    monkeypatch.setattr(executor, "sampled_error", lambda *args: seen.append(stock(*args)) or seen[-1])
    pipe = load("tiny-image")
    dit_attn.enable(pipe, Auto(watch=False, max_error=9.0))
    run(pipe, "tiny-image", 4)
    assert len(seen) == dit_attn.summary(pipe).sparse_calls
    bound = sorted(seen)[len(seen) // 2]
    dit_attn.enable(pipe, Auto(watch=False, max_error=bound))
    with pytest.warns(UserWarning, match="goes back to dense attention: error"):
        run(pipe, "tiny-image", 4)
    assert any("is above max_error" in reason for reason in dit_attn.summary(pipe).fallbacks)


def test_a_call_that_is_differentiated_is_not_given_to_a_method_with_a_history(
    tmp_path: Path, monkeypatch: Any
) -> None:
    measured(tmp_path, monkeypatch)
    pipe = load("tiny-video")
    dit_attn.enable(pipe.transformer, Auto(watch=False, candidates=VIDEO))
    latents = torch.randn(1, pipe.transformer.config.in_channels, 3, 24, 24, requires_grad=True)
    text = torch.randn(1, 8, pipe.transformer.config.text_dim)
    with dit_attn.run_context(pipe.transformer, step=9, steps=20):
        pipe.transformer(latents, torch.tensor([500]), text, return_dict=False)[0].sum().backward()
    assert latents.grad is not None and dit_attn.summary(pipe.transformer).sparse_calls > 0


def test_settings_paste_back_and_the_preset_of_the_model_is_filled_in() -> None:
    pipe = load("tiny-image")
    session = dit_attn.enable(pipe, "auto")
    (method,) = session.methods
    assert method == Auto(preset="tiny-image") and eval(repr(method), {"Auto": Auto}) == method
    assert Method.from_dict(method.to_dict()) == method and hash(method) == hash(Auto(preset="tiny-image"))
    (kept,) = dit_attn.enable(pipe, Auto(preset="none")).methods
    assert kept == Auto(preset="none")
    model, _ = tiny("pixart")
    assert dit_attn.enable(model, "auto").methods == (Auto(preset="none"),)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"preset": "wan"}, "unknown preset 'wan'"),
        ({"candidates": ("sla",)}, "unknown value of auto.candidates 'sla'"),
        ({"min_gain": 0.9}, "auto.min_gain must be at least 1.0"),
    ],
)
def test_wrong_settings_are_one_line(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(DitAttnError, match=words):
        Auto(**settings)


def test_a_preset_that_does_not_fit_the_model_and_a_second_sparse_method_are_refused() -> None:
    pipe = load("tiny-image")
    with pytest.raises(DitAttnError, match="dense_layers names layer"):
        dit_attn.enable(pipe, Auto(preset="flux.1"))
    with pytest.raises(DitAttnError, match="both decide which keys"):
        dit_attn.enable(pipe, "auto", "block-sparse")


def test_guidance_runs_with_it(tmp_path: Path, monkeypatch: Any) -> None:
    measured(tmp_path, monkeypatch, FAST)
    pipe = load("tiny-image")
    dit_attn.enable(pipe, Auto(watch=False, max_error=9.0), dit_attn.SoftPAG(heads="1"))
    run(pipe, "tiny-image", 3)
    found = dit_attn.summary(pipe)
    assert found.sparse_calls > 0 and found.guidance is not None and found.guidance.steps == 3
