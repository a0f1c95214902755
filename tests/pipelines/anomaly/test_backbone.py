"""Flux and Qwen-Image: learned on and painted with as PixArt and Stable Diffusion 3 are."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage
from scipy import ndimage

from dit_attn.errors import DitAttnError
from dit_attn.pipelines.anomaly import AnomalyGenerator, Backbone, GenerateConfig, MaskSource, TrainConfig, train
from dit_attn.pipelines.anomaly.backbone import joined
from dit_attn.pipelines.anomaly.blend import Blend, blended
from dit_attn.pipelines.anomaly.sources import from_folders
from tests._support.inspection_pipelines import data, tiny_pipeline
from tests._support.prompted_pipelines import pipeline_of
from tests.processors.attach.prompt_spans.prompted_cases import CASES


def _qwen_image():
    """Qwen-Image with an autoencoder that has a time axis and normalizes its latents."""
    pipe, _ = pipeline_of(CASES["qwen-image"])
    torch.manual_seed(1)
    pipe.vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
        latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[0.5, 1.0, 2.0, 1.5],
    ).eval()  # fmt: skip
    pipe.vae_scale_factor = 4
    return pipe


def _order(generator, source, concept, number, product="metal"):
    masks = MaskSource("real", concept.shapes["metal+hole"])
    order = generator.order("metal", "hole", number, 0, source.normals["metal"], masks)
    return replace(order, product=product)


@pytest.mark.parametrize("name", ["flux", "qwen-image"])
def test_packed_pipelines_learn_and_paint(name, tmp_path):
    pipe, size = (_qwen_image(), 32) if name == "qwen-image" else (pipeline_of(CASES[name])[0], 64)
    source = from_folders(*data(tmp_path / "data", size=size), "metal", "hole")
    config = TrainConfig(steps=2, batch=2, tokens=2, mask_tokens=1, lora_rank=2, lora_after=0.0)
    concept = train(Backbone(pipe, size), source, config, tmp_path)
    assert any("lora_B" in key and value.any() for key, value in concept.lora.items())
    generator = AnomalyGenerator(pipe, concept, GenerateConfig(steps=2, guidance=2.0))
    order = _order(generator, source, concept, 0)
    made = generator.make([order])[0]
    outside = ndimage.distance_transform_edt(~order.mask) > 2
    np.testing.assert_array_equal(made.image[outside], order.pixels[outside])
    assert (made.image[order.mask] != order.pixels[order.mask]).any()


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_a_qwen_image_pair_depends_on_no_longer_prompt_in_its_batch(guidance, tmp_path):
    pipe = _qwen_image()
    source = from_folders(*data(tmp_path / "data"), "metal", "hole")
    settings = TrainConfig(steps=1, batch=1, tokens=2, mask_tokens=1, lora_rank=0)
    concept = train(Backbone(pipe, 32), source, settings, tmp_path)
    longer = "brushed steel plate with four bolts"
    concept.settings = replace(concept.settings, pairs=("metal+hole", f"{longer}+hole"))
    concept.appearance = torch.nn.Parameter(concept.appearance.repeat(2, 1, 1))
    generator = AnomalyGenerator(pipe, concept, GenerateConfig(steps=2, guidance=guidance))
    orders = [_order(generator, source, concept, 0), _order(generator, source, concept, 1, longer)]
    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    masks = torch.ones(2, 1, 32, 32)
    both = generator.painter.paint(orders, images, masks)
    alone = generator.painter.paint(orders[:1], images[:1], masks[:1])
    torch.testing.assert_close(both[:1], alone, atol=1e-4, rtol=0)


def test_qwen_image_latents_are_those_of_the_pipeline():
    pipe = _qwen_image()
    backbone = Backbone(pipe, 32)
    pixels = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    latents = backbone.pack(backbone.encode(pixels))
    text = backbone.text("metal")
    with blended(pipe.scheduler, Blend(latents, torch.zeros_like(latents), lambda level: torch.zeros_like(latents))):
        out = backbone.sample(torch.randn(backbone.encode(pixels).shape), text, steps=2)
    torch.testing.assert_close(out, backbone.round_trip(pixels), atol=1e-4, rtol=0)


def test_other_pipelines_and_sizes_are_one_line():
    with pytest.raises(DitAttnError, match="anomalies are not there yet for Other; they are for FluxPipeline, "):
        Backbone(type("Other", (), {})())
    with pytest.raises(DitAttnError, match="resolution 30 does not fit PixArtSigmaPipeline; take a multiple of 4"):
        Backbone(tiny_pipeline(), 30)


def test_texts_of_several_lengths_are_joined_by_their_mask():
    texts = [{"prompt_embeds": torch.ones(1, n, 3), "mask": torch.ones(1, n)} for n in (2, 4)]
    found = joined(texts, "mask")
    assert found["prompt_embeds"].shape == (2, 4, 3) and found["mask"].sum(1).tolist() == [2, 4]
