"""Re-weighting while pairs are painted: weights from clean predictions, what the run records, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler

from dit_attn import AdaptiveReweighting, DitAttnError
from dit_attn.pipelines.anomaly import AnomalyGenerator, Backbone, Concept, GenerateConfig, MaskSource, TrainConfig
from dit_attn.pipelines.anomaly.blend import Blend, blended, factors
from dit_attn.pipelines.anomaly.manifest import read_rows
from dit_attn.pipelines.anomaly.reweighting import token_change
from dit_attn.pipelines.anomaly.sources import from_folders
from dit_attn.pipelines.anomaly.training import train
from dit_attn.processors.core.row_weights import RowWeights
from tests._support.inspection_pipelines import data, tiny_pipeline

PAIR = ("metal", "hole")
STRONG = AdaptiveReweighting(start=0.0, stop=1.0, w_max=30.0, blur=False, ema=0.0)


@pytest.fixture(scope="module")
def source(tmp_path_factory: Any) -> Any:
    return from_folders(*data(tmp_path_factory.mktemp("data")), *PAIR)


@pytest.fixture(scope="module", params=["image", "joint"])
def learned(request: Any, source: Any, tmp_path_factory: Any) -> tuple[Any, Path]:
    """Pipeline and concept file after three steps, with strong vectors."""
    pipe, folder = tiny_pipeline(request.param), tmp_path_factory.mktemp("concept")
    config = TrainConfig(steps=3, batch=2, tokens=2, mask_tokens=1, lora_rank=2, lora_after=0.0)
    train(Backbone(pipe, 32), source, config, folder)
    return pipe, folder / "concept.safetensors"


def made(learned: Any, source: Any, *methods: Any, given: list[Any] | None = None, **config: Any) -> Any:
    """A painted batch of two; ``given`` gets the weights of every step."""
    pipe, path = learned
    generator = AnomalyGenerator(pipe, path, GenerateConfig(steps=4, **config), methods=methods)
    masks = MaskSource("real", Concept.load(path).shapes["metal+hole"])
    orders = [generator.order(*PAIR, i, 0, source.normals["metal"], masks) for i in range(2)]
    if given is not None:
        from dit_attn.pipelines.anomaly import reweighting

        class Recorded(reweighting.Reweighting):
            def _give(self, weights: torch.Tensor) -> None:
                super()._give(weights)
                given.append(self.session.given["reweighting"])

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("dit_attn.pipelines.anomaly.painter.Reweighting", Recorded)
            return generator.make(orders)
    return generator.make(orders)


def test_weights_of_every_step_follow_the_clean_prediction(learned: Any, source: Any) -> None:
    given: list[RowWeights] = []
    stock, other = made(learned, source), made(learned, source, STRONG, given=given)
    assert len(given) == 5 and (given[0].weights == 1).all()
    for one in given[1:]:
        assert one.region is not None and one.columns is not None
        assert (one.weights[~one.region] == 1).all() and one.weights.min() >= 1 and one.weights.max() <= 30
        assert one.columns[0, -3:].all() and int(one.columns.sum()) == 3  # two of the defect, one of the mask
    assert any((one.weights > 1).any() for one in given)
    assert any((a.image != b.image).any() for a, b in zip(stock, other))
    for a, b in zip(stock, other):
        far = (a.image == a.order.pixels).all(-1)
        assert ((b.image == b.order.pixels).all(-1) == far).mean() > 0.95  # the background stays


def test_nothing_changes_where_no_weight_does(learned: Any, source: Any) -> None:
    stock = made(learned, source)
    for method in (AdaptiveReweighting(w_max=1.0), AdaptiveReweighting(start=0, stop=0)):
        for a, b in zip(stock, made(learned, source, method)):
            np.testing.assert_array_equal(a.image, b.image)


def test_a_run_records_the_mode_and_the_control_has_no_weights(learned: Any, source: Any, tmp_path: Path) -> None:
    pipe, path = learned
    generator = AnomalyGenerator(pipe, path, GenerateConfig(steps=2, retries=0, reweighting="gain"))
    masks = {PAIR: MaskSource("real", Concept.load(path).shapes["metal+hole"])}
    generator.run(tmp_path, source.normals, {PAIR: 1}, masks, controls=1)
    (row,) = read_rows(tmp_path / "manifest.jsonl")
    assert row["config"]["reweighting"] == "gain"
    assert row["methods"] == [AdaptiveReweighting(mode="gain").to_dict()]


def test_the_report_of_a_batch_has_the_share_of_the_concept(learned: Any, source: Any) -> None:
    pipe, path = learned
    generator = AnomalyGenerator(pipe, path, GenerateConfig(steps=3), methods=(replace(STRONG, observe=True),))
    masks = MaskSource("real", Concept.load(path).shapes["metal+hole"])
    generator.make([generator.order(*PAIR, 0, 0, source.normals["metal"], masks)])
    report = generator.painter.reports["reweighting"]
    assert list(report.shares) == [0, 1, 2] and all(0 < share < 1 for share in report.shares.values())
    assert report.means[0] == 1.0


def test_what_cannot_be_weighted_is_one_line(source: Any) -> None:
    with pytest.raises(DitAttnError, match="re-weighting is for the learned vectors of a concept"):
        AnomalyGenerator(tiny_pipeline(), None, resolution=32, methods=("reweighting",))
    with pytest.raises(DitAttnError, match="unknown mode of re-weighting 'on'"):
        GenerateConfig(reweighting="on")


def test_changes_are_means_over_tokens_in_both_forms() -> None:
    predicted = torch.zeros(1, 2, 4, 6)
    predicted[0, 0, 2:, :2] = 3.0
    change = token_change(predicted, torch.zeros_like(predicted), (2, 3))
    assert change.tolist() == [[[0, 0, 0], [4.5, 0, 0]]]
    packed = predicted.unflatten(3, (3, 2)).unflatten(2, (2, 2)).permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)
    torch.testing.assert_close(token_change(packed, torch.zeros_like(packed), (2, 3)), change)


@pytest.mark.parametrize("name", ["flow", "solver", "solver of noise", "ddim"])
def test_clean_predictions_are_exact_or_refused(name: str) -> None:
    scheduler = {
        "flow": lambda: FlowMatchEulerDiscreteScheduler(shift=3.0),
        "solver": lambda: DPMSolverMultistepScheduler(solver_order=2),
        "solver of noise": lambda: DPMSolverMultistepScheduler(
            algorithm_type="dpmsolver", final_sigmas_type="sigma_min"
        ),
        "ddim": DDIMScheduler,
    }[name]()
    scheduler.set_timesteps(5)
    clean, noise = torch.randn(2, 1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    target = clean.flip(-1)  # what a perfect model would paint
    found: list[torch.Tensor] = []
    blend = Blend(clean, noise, lambda level: torch.ones_like(clean), found.append)
    sample = noise
    if name in ("solver of noise", "ddim"):
        with pytest.raises(DitAttnError, match="not known"), blended(scheduler, blend):
            scheduler.step(noise, scheduler.timesteps[0], sample)
        return
    with blended(scheduler, blend):
        for index, time in enumerate(scheduler.timesteps):
            alpha, sigma = factors(scheduler, index)
            eps = (sample - alpha * target) / sigma
            output = eps - target if name == "flow" else eps
            sample = scheduler.step(output, time, sample, return_dict=False)[0]
    assert len(found) == 5
    for one in found:
        torch.testing.assert_close(one, target, atol=1e-4, rtol=1e-4)
