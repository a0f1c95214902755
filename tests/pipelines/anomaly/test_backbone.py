"""Flux and Qwen-Image: learned on and painted with as PixArt and Stable Diffusion 3 are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage

from dit_attn.errors import DitAttnError
from dit_attn.pipelines.anomaly import AnomalyGenerator, Backbone, GenerateConfig, MaskSource, TrainConfig, train
from dit_attn.pipelines.anomaly.backbone import joined
from dit_attn.pipelines.anomaly.sources import from_folders
from tests._support.inspection_pipelines import data, tiny_pipeline
from tests._support.prompted_pipelines import pipeline_of
from tests.processors.attach.prompt_spans.prompted_cases import CASES


@pytest.mark.parametrize("name", ["flux", "qwen-image"])
def test_packed_pipelines_learn_and_paint(name, tmp_path):
    pipe, _ = pipeline_of(CASES[name])
    if name == "qwen-image":
        mean, deviation = [0.0] * 4, [1.0] * 4
        pipe.vae = AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 2, 4], num_res_blocks=1, temperal_downsample=[False, True],
            latents_mean=mean, latents_std=deviation,
        ).eval()  # fmt: skip
        pipe.vae_scale_factor = 4
    source = from_folders(*data(tmp_path / "data", size=64 if name == "flux" else 32), "metal", "hole")
    backbone = Backbone(pipe, 64 if name == "flux" else 32)
    config = TrainConfig(steps=2, batch=2, tokens=2, mask_tokens=1, lora_rank=2, lora_after=0.0)
    concept = train(backbone, source, config, tmp_path)
    assert any("lora_B" in key and value.any() for key, value in concept.lora.items())
    generator = AnomalyGenerator(pipe, concept, GenerateConfig(steps=2, guidance=2.0))
    masks = MaskSource("real", concept.shapes["metal+hole"])
    order = generator.order("metal", "hole", 0, 0, source.normals["metal"], masks)
    made = generator.make([order])[0]
    from scipy import ndimage

    outside = ndimage.distance_transform_edt(~order.mask) > 2
    np.testing.assert_array_equal(made.image[outside], order.pixels[outside])


def test_other_pipelines_and_sizes_are_one_line():
    with pytest.raises(DitAttnError, match="anomalies are not there yet for Other; they are for FluxPipeline, "):
        Backbone(type("Other", (), {})())
    with pytest.raises(DitAttnError, match="resolution 30 does not fit PixArtSigmaPipeline; take a multiple of 4"):
        Backbone(tiny_pipeline(), 30)


def test_texts_of_several_lengths_are_joined_by_their_mask():
    texts = [{"prompt_embeds": torch.ones(1, n, 3), "mask": torch.ones(1, n)} for n in (2, 4)]
    found = joined(texts, "mask")
    assert found["prompt_embeds"].shape == (2, 4, 3) and found["mask"].sum(1).tolist() == [2, 4]
