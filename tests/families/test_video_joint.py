"""Video families that join text and video, and the remaining ones: the mixin on a tiny model of each class."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import (
    AllegroTransformer3DModel,
    AutoencoderKLCogVideoX,
    AutoencoderKLHunyuanVideo,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CogVideoXTransformer3DModel,
    CosmosTransformer3DModel,
    EasyAnimateTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoPipeline,
    HunyuanVideoTransformer3DModel,
    Kandinsky5Transformer3DModel,
    LTX2VideoTransformer3DModel,
    MochiPipeline,
    MochiTransformer3DModel,
    SanaVideoTransformer3DModel,
)

import dit_attn
from tests.families.mixin import FamilyMixin


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
        vae = AutoencoderKLHunyuanVideo(
            latent_channels=4,
            block_out_channels=(8, 8, 8, 8),
            layers_per_block=1,
            norm_num_groups=4,
            mid_block_add_attention=False,
        )
        pipe = HunyuanVideoPipeline(
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
            transformer=self.model().eval(),
        )
        embeds, pooled, mask = torch.randn(2, 1, 12, 16), torch.randn(2, 1, 8), torch.ones(1, 12)
        return pipe, {
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
        assert summary.engaged == summary.calls == 2 * 2

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
        # One attention call per sample: the batch is taken apart, so a call's rows say nothing of the branch.
        return [call.branches for call in calls]

    def _steps(self, session: Any, steps: int) -> list[int]:
        return [step for step in range(steps) for _ in range(2)]


class TestAllegro(VideoCase):
    kinds = ("video",)
    untouched = ("attn2",)

    def model(self) -> torch.nn.Module:
        return AllegroTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            cross_attention_dim=24,
            sample_width=20,
            sample_height=16,
            sample_frames=4,
            caption_channels=16,
        )

    def inputs(self) -> dict[str, Any]:
        from diffusers.models.embeddings import get_3d_rotary_pos_embed_allegro

        freqs_t, freqs_h, freqs_w, grid_t, grid_h, grid_w = get_3d_rotary_pos_embed_allegro(
            embed_dim=12,
            crops_coords=((0, 0), (8, 10)),
            grid_size=(8, 10),
            temporal_size=4,
            interpolation_scale=(1.0, 1.0, 1.0),
        )
        rotary = (freqs_t, freqs_h, freqs_w)
        grid = tuple(torch.cartesian_prod(grid_t.long(), grid_h.long(), grid_w.long()).T[:, None].contiguous())
        return {
            "hidden_states": torch.randn(2, 4, 4, 16, 20),
            "encoder_hidden_states": torch.randn(2, 1, 7, 16),
            "timestep": torch.tensor([500, 500]),
            "attention_mask": torch.ones(2, 4, 16, 20),
            "encoder_attention_mask": torch.ones(2, 1, 7),
            "image_rotary_emb": (rotary, grid),
        }


class TestCosmos(VideoCase):
    kinds = ("video",)
    untouched = ("attn2",)

    def model(self) -> torch.nn.Module:
        return CosmosTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=2,
            mlp_ratio=2,
            text_embed_dim=16,
            adaln_lora_dim=4,
            max_size=(4, 32, 32),
            patch_size=(1, 2, 2),
            rope_scale=(2.0, 1.0, 1.0),
            concat_padding_mask=False,
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 4, 16, 20),
            "timestep": torch.tensor([500.0, 500.0]),
            "encoder_hidden_states": torch.randn(2, 7, 16),
            "attention_mask": torch.ones(2, 7),
            "fps": 30,
        }


class TestKandinsky5(VideoCase):
    kinds = ("video",)
    untouched = ("text_transformer_blocks", "cross_attention")

    def model(self) -> torch.nn.Module:
        return Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=8,
            time_dim=16,
            out_visual_dim=4,
            patch_size=(1, 2, 2),
            model_dim=24,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 4, 4),
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 4, 16, 20, 4),
            "encoder_hidden_states": torch.randn(1, 7, 16),
            "timestep": torch.tensor([500.0]),
            "pooled_projections": torch.randn(1, 8),
            "visual_rope_pos": (torch.arange(4), torch.arange(8), torch.arange(10)),
            "text_rope_pos": torch.arange(7),
        }

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        t, y, x = at
        inputs["hidden_states"][:, t, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] += 1.0


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


class TestLtx2(VideoCase):
    kinds = ("video",)
    untouched = ("audio", "attn2")

    def model(self) -> torch.nn.Module:
        return LTX2VideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            audio_in_channels=4,
            audio_out_channels=4,
            audio_num_attention_heads=2,
            audio_attention_head_dim=8,
            audio_cross_attention_dim=16,
            num_layers=2,
            caption_channels=16,
            rope_double_precision=False,
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 320, 4),
            "audio_hidden_states": torch.randn(1, 6, 4),
            "encoder_hidden_states": torch.randn(1, 7, 16),
            "audio_encoder_hidden_states": torch.randn(1, 7, 16),
            "timestep": torch.tensor([500.0]),
            "num_frames": 4,
            "height": 8,
            "width": 10,
            "audio_num_frames": 6,
            "fps": 25.0,
        }

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        inputs["hidden_states"][:, (at[0] * 8 + at[1]) * 10 + at[2]] += 1.0

    def test_key_frames_are_appended_to_the_video(self, net: Any, args: Any) -> None:
        # The condition pipeline joins key frame tokens and their coordinates to the end of the sequence.
        session = dit_attn.enable(net)
        coords = net.rope.prepare_video_coords(1, 4, 8, 10, torch.device("cpu"), fps=25.0)
        longer = {
            **args,
            "hidden_states": torch.cat([args["hidden_states"], torch.randn(1, 80, 4)], dim=1),
            "video_coords": torch.cat([coords, coords[:, :, 160:240]], dim=2),
        }
        before = self._first_keys(net, longer)
        assert [(span.kind, span.start, span.stop) for span in before.tokens.spans] == [
            ("video", 0, 320),
            ("reference", 320, 400),
        ]
        moved = copy.deepcopy(longer)
        self.poke_token(moved, self.probe)
        assert self._changed(before, self._first_keys(net, moved)) == {(2 * 8 + 3) * 10 + 5}
        named = dict.fromkeys(("num_frames", "height", "width"))
        self.call(net, {**args, **named, "video_coords": coords})
        assert session.tokens(320).grid == (4, 8, 10)


def test_linear_attention_is_refused_with_the_reason() -> None:
    model = SanaVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=1,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=16,
    )
    with pytest.raises(dit_attn.DitAttnError, match=r"SanaVideoTransformer3DModel.*linear"):
        dit_attn.enable(model)
