"""Kandinsky 5, with its own sparse attention left alone."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)

import dit_attn
from tests._support.family_cases import VideoCase
from tests._support.family_mixin import SPARSE
from tests._support.outputs import same


class TestKandinsky5(VideoCase):
    kinds = ("video",)
    untouched = ("text_transformer_blocks", "cross_attention")
    cross_sockets = 2

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

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = Kandinsky5T2VPipeline(
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            vae=AutoencoderKLHunyuanVideo(
                latent_channels=4,
                block_out_channels=(8, 8, 8, 8),
                layers_per_block=1,
                norm_num_groups=4,
                mid_block_add_attention=False,
            ),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
            transformer=self.model().eval(),
        )
        qwen, clip, lengths = torch.randn(2, 1, 7, 16), torch.randn(2, 1, 8), torch.tensor([0, 7], dtype=torch.int32)
        return pipe, {
            "prompt_embeds_qwen": qwen[0],
            "prompt_embeds_clip": clip[0],
            "prompt_cu_seqlens": lengths,
            "negative_prompt_embeds_qwen": qwen[1],
            "negative_prompt_embeds_clip": clip[1],
            "negative_prompt_cu_seqlens": lengths,
            "guidance_scale": 3.0,
            "height": 128,
            "width": 160,
            "num_frames": 13,
        }

    def test_its_own_sparse_attention_is_left_alone(self, net: Any, args: Any) -> None:
        # It reorders the tokens into squares of 8 x 8 and brings a block mask.
        net.set_attention_backend("flex")
        args = {
            **args,
            "hidden_states": torch.randn(1, 4, 16, 32, 4),
            "visual_rope_pos": (torch.arange(4), torch.arange(8), torch.arange(16)),
            "sparse_params": {"sta_mask": torch.ones(1, 1, 8, 8, dtype=torch.bool), "P": 0.9, "to_fractal": True},
        }
        before = self.call(net, args)
        dit_attn.enable(net, SPARSE)
        assert same(before, self.call(net, args))
        assert dit_attn.summary(net).fallbacks == {"BlockMask attention mask": 2}
