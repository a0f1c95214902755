"""HunyuanVideo Framepack: earlier frames in three sizes of patches before the video."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
)

import dit_attn
from tests._support.family_cases import VideoCase
from tests._support.hunyuan_video import hunyuan_arguments, hunyuan_vae


class TestFramepack(VideoCase):
    """Earlier frames stand before the video in three sizes of patches, the coarse ones padded up."""

    kinds = ("reference", "reference", "reference", "video", "text")
    text_args = ("encoder_hidden_states", "image_embeds")
    sockets = 3
    untouched = ("context_embedder",)

    def model(self) -> torch.nn.Module:
        return HunyuanVideoFramepackTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=2,
            patch_size_t=1,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(2, 4, 4),
            has_image_proj=True,
            image_proj_dim=8,
            has_clean_x_embedder=True,
        )

    def inputs(self) -> dict[str, Any]:
        mask = torch.ones(2, 12)
        mask[1, 7:] = 0
        return {
            "hidden_states": torch.randn(2, 4, 4, 16, 20),
            "timestep": torch.tensor([500, 500]),
            "encoder_hidden_states": torch.randn(2, 12, 16),
            "encoder_attention_mask": mask,
            "pooled_projections": torch.randn(2, 8),
            "image_embeds": torch.randn(2, 3, 8),
            "indices_latents": torch.arange(1, 5),
            "guidance": torch.tensor([6000.0, 6000.0]),
            "latents_clean": torch.randn(2, 4, 2, 16, 20),
            "indices_latents_clean": torch.tensor([0, 5]),
            "latents_history_2x": torch.randn(2, 4, 2, 16, 20),
            "indices_latents_history_2x": torch.arange(6, 8),
            "latents_history_4x": torch.randn(2, 4, 16, 16, 20),
            "indices_latents_history_4x": torch.arange(8, 24),
        }

    def test_history_is_padded_up_to_whole_patches(self, net: Any, args: Any) -> None:
        dit_attn.enable(net)
        tokens = self._first_keys(net, args).tokens
        assert tokens is not None
        references = [span.grid for span in tokens.spans if span.kind == "reference"]
        assert references == [(4, 2, 3), (1, 4, 5), (2, 8, 10)]

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        from transformers import SiglipImageProcessor, SiglipVisionConfig, SiglipVisionModel

        vision = SiglipVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16
        )
        pipe = HunyuanVideoFramepackPipeline(
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            vae=hunyuan_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            transformer=self.model().eval(),
            image_encoder=SiglipVisionModel(vision).eval(),
            feature_extractor=SiglipImageProcessor(size={"height": 32, "width": 32}),
        )
        return pipe, {**hunyuan_arguments(), "image": torch.rand(1, 3, 128, 160), "latent_window_size": 4}
