"""Video families that join text and video in one sequence: the mixin on a tiny model of each class."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLCogVideoX,
    AutoencoderKLMagvit,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    ConsisIDTransformer3DModel,
    EasyAnimatePipeline,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    MochiPipeline,
    MochiTransformer3DModel,
)

import dit_attn
from tests.families.mixin import FamilyMixin


class VideoCase(FamilyMixin):
    grid = (4, 8, 10)
    probe = (2, 3, 5)
    sockets = 2


class TestCogVideoX2b(VideoCase):
    """The 2b style: absolute positions, no rotary embedding."""

    kinds = ("text", "video")
    text_args = ("encoder_hidden_states",)
    grid = (3, 10, 12)

    def model(self) -> torch.nn.Module:
        return CogVideoXTransformer3DModel(**self.settings())

    def settings(self) -> dict[str, Any]:
        return {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 16,
            "num_layers": 2,
            "sample_width": 24,
            "sample_height": 20,
            "sample_frames": 9,
            "patch_size": 2,
            "temporal_compression_ratio": 4,
            "max_text_seq_length": 8,
        }

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 3, 4, 20, 24),
            "encoder_hidden_states": torch.randn(2, 8, 16),
            "timestep": torch.tensor([500, 500]),
        }

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        t, y, x = at
        inputs["hidden_states"][:, t, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] += 1.0

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 4,
            up_block_types=("CogVideoXUpBlock3D",) * 4,
            block_out_channels=(8, 8, 8, 8),
            latent_channels=4,
            layers_per_block=1,
            norm_num_groups=2,
            temporal_compression_ratio=4,
        )
        pipe = CogVideoXPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vae,
            scheduler=CogVideoXDDIMScheduler(),
            transformer=self.model().eval(),
        )
        embeds = torch.randn(2, 1, 8, 16)
        size = {"height": 160, "width": 192, "num_frames": 9}
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "guidance_scale": 3.0,
            "max_sequence_length": 8,
            **size,
        }


class TestCogVideoX5b(TestCogVideoX2b):
    """The 5b style: rotary embedding on the video part."""

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "use_rotary_positional_embeddings": True}

    def inputs(self) -> dict[str, Any]:
        return {**super().inputs(), "image_rotary_emb": (torch.rand(360, 16), torch.rand(360, 16))}


class TestCogVideoXPatchedTime(TestCogVideoX2b):
    """The 1.5 style: two latent frames per token."""

    grid = (2, 10, 14)
    probe = (1, 3, 5)

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "patch_size_t": 2, "use_rotary_positional_embeddings": True}

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 4, 20, 28),
            "encoder_hidden_states": torch.randn(2, 8, 16),
            "timestep": torch.tensor([500, 500]),
            "image_rotary_emb": (torch.rand(280, 16), torch.rand(280, 16)),
        }

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        t, y, x = at
        inputs["hidden_states"][:, 2 * t : 2 * t + 2, :, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] += 1.0

    def pipeline(self) -> None:  # type: ignore[override]
        return None  # the 2b style covers this pipeline


class TestConsisId(TestCogVideoX2b):
    """CogVideoX with cross attention to face features between the blocks."""

    untouched = ("perceiver_cross_attention", "local_facial_extractor")

    def settings(self) -> dict[str, Any]:
        face = {"LFE_id_dim": 2, "LFE_vit_dim": 2, "LFE_dim_head": 8, "LFE_num_heads": 2, "LFE_num_id_token": 1}
        more = {"LFE_num_querie": 1, "LFE_output_dim": 21, "LFE_ff_mult": 1, "LFE_num_scale": 1}
        cross = {"cross_attn_interval": 1, "cross_attn_dim_head": 1, "cross_attn_num_heads": 1}
        return {**super().settings(), "is_train_face": True, **face, **more, **cross}

    def model(self) -> torch.nn.Module:
        return ConsisIDTransformer3DModel(**self.settings())

    def inputs(self) -> dict[str, Any]:
        return {**super().inputs(), "id_cond": torch.ones(2, 2), "id_vit_hidden": [torch.ones(2, 2, 2)]}

    def pipeline(self) -> None:  # type: ignore[override]
        return None  # it wants OpenCV; its loop is CogVideoX's


class TestMochi(VideoCase):
    # The text is pooled into the time embedding as well, so it moves every token: no text_args.
    kinds = ("video", "text")

    def model(self) -> torch.nn.Module:
        return MochiTransformer3DModel(
            patch_size=2,
            num_attention_heads=2,
            attention_head_dim=8,
            num_layers=2,
            pooled_projection_dim=16,
            in_channels=4,
            text_embed_dim=16,
            time_embed_dim=8,
            max_sequence_length=12,
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 4, 4, 16, 20),
            "encoder_hidden_states": torch.randn(1, 12, 16),
            "encoder_attention_mask": torch.ones(1, 12).bool(),
            "timestep": torch.tensor([500]),
        }

    def test_samples_of_unequal_text_length_are_resolved_one_by_one(self, net: Any) -> None:
        torch.manual_seed(2)
        mask = torch.ones(2, 12).bool()
        mask[1, 5:] = False
        arguments = {
            "hidden_states": torch.randn(2, 4, 4, 16, 20),
            "encoder_hidden_states": torch.randn(2, 12, 16),
            "encoder_attention_mask": mask,
            "timestep": torch.tensor([500, 500]),
        }
        dit_attn.enable(net, dit_attn.BlockSparse(density=0.5, q_block=32, kv_block=32, dense_steps=0))
        self.call(net, arguments)
        summary = dit_attn.summary(net)
        assert summary.sparse_calls == summary.calls == 2 * 2

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        from diffusers import AutoencoderKLMochi

        vae = AutoencoderKLMochi(
            latent_channels=4,
            out_channels=3,
            encoder_block_out_channels=(32, 32, 32, 32),
            decoder_block_out_channels=(32, 32, 32, 32),
            layers_per_block=(1, 1, 1, 1, 1),
        )
        pipe = MochiPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            transformer=self.model().eval(),
        )
        embeds, mask = torch.randn(2, 1, 12, 16), torch.ones(1, 12).bool()
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
            "guidance_scale": 3.0,
            "height": 128,
            "width": 160,
            "num_frames": 19,
        }

    def _expected_branches(self, session: Any, calls: list[Any]) -> list[tuple[str, ...]]:
        # One attention call per sample: the rows of the batch come one after the other.
        return [(self._order(session)[i % 2],) for i in range(len(calls))]

    def _steps(self, session: Any, steps: int) -> list[int]:
        return [step for step in range(steps) for _ in range(2)]


class TestEasyAnimate(VideoCase):
    kinds = ("text", "video")
    text_args = ("encoder_hidden_states",)

    def model(self) -> torch.nn.Module:
        return EasyAnimateTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            patch_size=2,
            num_layers=2,
            mmdit_layers=2,
            time_embed_dim=8,
            text_embed_dim=16,
            sample_width=20,
            sample_height=16,
            time_position_encoding_type="3d_rope",
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 4, 16, 20),
            "timestep": torch.tensor([500, 500]),
            "timestep_cond": None,
            "encoder_hidden_states": torch.randn(2, 7, 16),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = EasyAnimatePipeline(
            text_encoder=None,
            tokenizer=None,
            vae=AutoencoderKLMagvit(
                latent_channels=4, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=2
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            transformer=self.model().eval(),
        )
        embeds, mask = torch.randn(2, 1, 7, 16), torch.ones(1, 7)
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
            "guidance_scale": 3.0,
            "height": 128,
            "width": 160,
            "num_frames": 13,
        }
