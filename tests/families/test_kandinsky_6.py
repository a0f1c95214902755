"""Kandinsky 6: video with sound, and a first frame that stands last in the sequence."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky6TI2VAPipeline, Kandinsky6Transformer3DModel

from tests._support.family_cases import VideoCase


class TestKandinsky6(VideoCase):
    kinds: tuple[str, ...] = ("video",)
    untouched = ("text_transformer_blocks", "audio_dec_block", "cross_attention")
    cross_sockets = 2

    def model(self) -> torch.nn.Module:
        return Kandinsky6Transformer3DModel(
            in_visual_dim=4,
            out_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=8,
            time_dim=16,
            model_dim=32,
            ff_dim=64,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
            visual_cond=True,
            in_audio_dim=6,
            out_audio_dim=6,
            model_dim_a=32,
            time_dim_a=16,
            ff_dim_a=64,
            axes_dims_a=(4, 6, 6),
        )

    def inputs(self) -> dict[str, Any]:
        latents = torch.randn(1, 4, 16, 20, 9)
        latents[..., 4:] = 0.0  # no frame is given
        return {
            "hidden_states": latents,
            "encoder_hidden_states": torch.randn(1, 7, 16),
            "pooled_projections": torch.randn(1, 8),
            "timestep": torch.tensor([500.0]),
            "audio_hidden_states": torch.randn(1, 12, 6),
        }

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        t, y, x = at
        inputs["hidden_states"][:, t, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2, :4] += 1.0

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = Kandinsky6TI2VAPipeline(
            transformer=self.model().eval(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            scheduler=FlowMatchEulerDiscreteScheduler(),
        )
        embeds, pooled = torch.randn(2, 1, 7, 16), torch.randn(2, 1, 8)
        return pipe, {
            "prompt_embeds": embeds[0],
            "pooled_prompt_embeds": pooled[0],
            "negative_prompt_embeds": embeds[1],
            "negative_pooled_prompt_embeds": pooled[1],
            "guidance_scale": 3.0,
            "height": 128,
            "width": 160,
            "num_frames": 13,
            "sample_audio": False,
        }


class TestKandinsky6FirstFrame(TestKandinsky6):
    """The given frame stands behind the others and reuses the time of the first."""

    kinds = ("video", "reference")
    no_pipeline = "the first frame comes from the autoencoder; the run of text to video tests the pipeline"

    def inputs(self) -> dict[str, Any]:
        latents = torch.cat([torch.randn(1, 5, 16, 20, 4), torch.zeros(1, 5, 16, 20, 5)], -1)
        latents[:, -1, ..., -1] = 1.0
        positions = (torch.tensor([0, 1, 2, 3, 0]), torch.arange(8), torch.arange(10))
        return {**super().inputs(), "hidden_states": latents, "visual_rope_pos": positions}
