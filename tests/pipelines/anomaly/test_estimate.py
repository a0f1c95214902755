"""An estimate is that of the step itself: measured on small models, carried on over blocks, stated for Flux."""

from __future__ import annotations

import copy

import pytest
import torch

from dit_attn.cli.commands.anomaly.estimate import shape_of
from dit_attn.models import nets
from dit_attn.pipelines.anomaly import Backbone, GenerateConfig, TrainConfig
from dit_attn.pipelines.anomaly import estimate as estimates
from dit_attn.pipelines.anomaly.concept import ConceptSettings
from dit_attn.pipelines.anomaly.meta_memory import LiveBytes
from dit_attn.pipelines.anomaly.sources import from_folders
from dit_attn.pipelines.anomaly.training import ConceptTraining, masked_loss
from tests._support.inspection_pipelines import data, tiny_pipeline

CONFIG = TrainConfig(batch=4, tokens=2, mask_tokens=1, lora_rank=2)


@pytest.fixture(scope="module", params=["image", "joint"])
def saved(request, tmp_path_factory):
    """A random pipeline and its folder."""
    folder, pipe = tmp_path_factory.mktemp("model"), tiny_pipeline(request.param)
    nets.save_folder(pipe, folder / "model")
    return pipe, folder


def test_the_estimate_of_a_step_is_its_live_tensors(saved):
    pipe, folder = saved
    source = from_folders(*data(folder / "data"), "metal", "hole")
    found = estimates.estimate_training(shape_of({"model": str(folder / "model"), "resolution": 32}), CONFIG, 1)
    training = ConceptTraining(Backbone(copy.deepcopy(pipe), 32), source, CONFIG)
    batch = training.batch()
    with LiveBytes() as live:
        torch.autograd.backward(masked_loss(training.backbone, training.concept, *batch))
    assert found.activations == pytest.approx(live.peak, rel=0.15)
    assert found.trained == sum(p.numel() for group in training.optimizer.param_groups for p in group["params"])
    parts = (pipe.transformer, pipe.vae)
    weights = [4 * sum(p.numel() for p in part.parameters()) for part in parts]
    assert (found.transformer, found.autoencoder) == tuple(weights)
    encoders = [getattr(pipe, name, None) for name in ("text_encoder", "text_encoder_2", "text_encoder_3")]
    assert found.text_encoders == 4 * sum(p.numel() for one in encoders if one is not None for p in one.parameters())
    assert found.peak == max(found.loading, found.running) and found.checkpointed < found.activations


def test_further_blocks_of_a_kind_go_on_in_a_straight_line(tmp_path, monkeypatch):
    from dit_attn.models.recipe import NetSize
    from tests._support import inspection_pipelines

    size = NetSize(hidden=32, layers=6, heads=2, text_width=32, text_layers=1)
    monkeypatch.setattr(inspection_pipelines, "SIZE", size)
    nets.save_folder(tiny_pipeline(), tmp_path / "model")
    shape = shape_of({"model": str(tmp_path / "model"), "resolution": 32})
    few = estimates.estimate_training(shape, CONFIG, 1)
    monkeypatch.setattr(estimates, "FEW", 6)
    every = estimates.estimate_training(shape, CONFIG, 1)
    assert few.activations == pytest.approx(every.activations, rel=0.01)
    assert few.checkpointed == pytest.approx(every.checkpointed, rel=0.05)


def test_pairs_take_no_gradients_and_guidance_takes_more(saved):
    _, folder = saved
    shape = shape_of({"model": str(folder / "model"), "resolution": 32})
    concept = ConceptSettings("", "", 0, 32, ("a+b",), tokens=2, mask_tokens=1, lora_rank=2)
    guided, plain = (
        estimates.estimate_generation(shape, GenerateConfig(batch=8, guidance=scale), concept) for scale in (2.0, 1.0)
    )
    assert guided.optimizer == guided.trained == 0 and guided.checkpointed is None
    assert 1.1 * plain.activations < guided.activations < 2.5 * plain.activations


def test_attention_on_the_meta_device_stores_no_logits():
    from dit_attn.pipelines.anomaly.meta_memory import AsOnDevice

    with torch.device("meta"):
        q = torch.zeros(1, 2, 512, 8, requires_grad=True)
    with AsOnDevice(torch.float32), LiveBytes() as live:
        torch.autograd.backward(torch.nn.functional.scaled_dot_product_attention(q, q, q).sum())
    assert live.peak < 2 * 512 * 512 * 4
