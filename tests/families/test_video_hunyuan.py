"""HunyuanVideo, 1.5 and Framepack: text joined behind the video, masks per key and square."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Pipeline,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoFramepackPipeline,
    HunyuanVideoFramepackTransformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
)

import dit_attn
from tests.families.mixin import FamilyMixin

SIZES = (("", 9), ("_2", 5))  # text tokens of HunyuanVideo 1.5's two encoders


def hunyuan_vae() -> AutoencoderKLHunyuanVideo:
    """A random autoencoder; runs stop at the latents, so it mostly tells sizes."""
    return AutoencoderKLHunyuanVideo(
        latent_channels=4,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=4,
        mid_block_add_attention=False,
    )


def hunyuan_arguments() -> dict[str, Any]:
    """Call arguments with guidance on: two transformer calls for every step."""
    embeds, pooled, mask = torch.randn(2, 1, 12, 16), torch.randn(2, 1, 8), torch.ones(1, 12)
    return {
        "prompt_embeds": embeds[0],
        "pooled_prompt_embeds": pooled[0],
        "prompt_attention_mask": mask,
        "negative_prompt_embeds": embeds[1],
        "negative_pooled_prompt_embeds": pooled[1],
        "negative_prompt_attention_mask": mask,
        "true_cfg_scale": 3.0,
        "height": 128,
        "width": 160,
        "num_frames": 13,
    }


class VideoCase(FamilyMixin):
    grid = (4, 8, 10)
    probe = (2, 3, 5)
    sockets = 2


class TestHunyuanVideo(VideoCase):
    kinds = ("video", "text")
    text_args = ("encoder_hidden_states",)
    sockets = 3
    untouched = ("context_embedder",)

    def model(self) -> torch.nn.Module:
        return HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=10,
            num_layers=1,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=2,
            patch_size_t=1,
            guidance_embeds=True,
            text_embed_dim=16,
            pooled_projection_dim=8,
            rope_axes_dim=(2, 4, 4),
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
            "guidance": torch.tensor([6000.0, 6000.0]),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = HunyuanVideoPipeline(
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            vae=hunyuan_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            transformer=self.model().eval(),
        )
        return pipe, hunyuan_arguments()


class TestHunyuanVideo15(VideoCase):
    # Its text is reordered before the first layer (valid tokens of three encoders first): no text_args.
    kinds = ("video", "text")
    untouched = ("context_embedder",)

    def model(self) -> torch.nn.Module:
        return HunyuanVideo15Transformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            num_refiner_layers=1,
            text_embed_dim=16,
            text_embed_2_dim=8,
            image_embed_dim=8,
            rope_axes_dim=(4, 4, 8),
            target_size=16,
            task_type="t2v",
        )

    def inputs(self) -> dict[str, Any]:
        mask = torch.ones(2, 9)
        mask[1, 6:] = 0
        return {
            "hidden_states": torch.randn(2, 4, 4, 8, 10),
            "timestep": torch.tensor([500.0, 500.0]),
            "encoder_hidden_states": torch.randn(2, 9, 16),
            "encoder_attention_mask": mask,
            "encoder_hidden_states_2": torch.randn(2, 5, 8),
            "encoder_attention_mask_2": torch.ones(2, 5),
            "image_embeds": torch.zeros(2, 3, 8),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        # The pipeline joins conditioning latents and a mask to the channels: 4 + 4 + 1.
        config = {**dict(self.model().config), "in_channels": 9}
        pipe = HunyuanVideo15Pipeline(
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            vae=AutoencoderKLHunyuanVideo15(latent_channels=4, block_out_channels=(8, 8, 8, 8, 8), layers_per_block=1),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            transformer=HunyuanVideo15Transformer3DModel.from_config(config).eval(),
            guider=ClassifierFreeGuidance(guidance_scale=3.0),
        )
        pipe.vision_num_semantic_tokens = 3
        embeds, embeds_2 = torch.randn(2, 1, 9, 16), torch.randn(2, 1, 5, 8)
        masks = {f"{sign}prompt_embeds_mask{n}": torch.ones(1, s) for sign in ("", "negative_") for n, s in SIZES}
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "prompt_embeds_2": embeds_2[0],
            "negative_prompt_embeds_2": embeds_2[1],
            **masks,
            "height": 128,
            "width": 160,
            "num_frames": 13,
        }


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
