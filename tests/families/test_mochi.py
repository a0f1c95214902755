"""Mochi: the valid text alone is joined to the video."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, MochiPipeline, MochiTransformer3DModel

import dit_attn
from tests._support.family_cases import VideoCase


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
