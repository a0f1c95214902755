"""Helios: earlier frames in three sizes of patches before the chunk that is made."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, HeliosPipeline, HeliosTransformer3DModel

import dit_attn
from tests._support.family_cases import VideoCase
from tests._support.wan import wan_vae


class TestHelios(VideoCase):
    kinds: tuple[str, ...] = ("reference", "reference", "reference", "video")
    untouched = ("attn2",)
    cross_sockets = 2

    guided_text = True  # the history has no cross attention

    def model(self) -> torch.nn.Module:
        return HeliosTransformer3DModel(
            num_attention_heads=2,
            attention_head_dim=16,
            in_channels=4,
            out_channels=4,
            text_dim=16,
            freq_dim=16,
            ffn_dim=32,
            num_layers=2,
            rope_dim=(4, 6, 6),
            guidance_cross_attn=self.guided_text,
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 4, 16, 20),
            "timestep": torch.tensor([500, 500]),
            "encoder_hidden_states": torch.randn(2, 7, 16),
            "indices_hidden_states": torch.arange(20, 24).expand(2, 4),
            "latents_history_short": torch.randn(2, 4, 2, 16, 20),
            "indices_latents_history_short": torch.tensor([[0, 19]] * 2),
            "latents_history_mid": torch.randn(2, 4, 2, 16, 20),
            "indices_latents_history_mid": torch.arange(17, 19).expand(2, 2),
            "latents_history_long": torch.randn(2, 4, 16, 16, 20),
            "indices_latents_history_long": torch.arange(1, 17).expand(2, 16),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = HeliosPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=wan_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=self.model().eval(),
        )
        embeds = torch.randn(2, 1, 7, 16)
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "guidance_scale": 3.0,
            "height": 64,
            "width": 80,
            "num_frames": 13,
            "num_latent_frames_per_chunk": 4,
            "history_sizes": [4, 2, 1],
        }

    def test_a_second_chunk_is_another_run(self) -> None:
        pipe, kwargs = self.made()
        session = dit_attn.enable(pipe)
        made = self._run(pipe, {**kwargs, "num_frames": 26}, 2)
        assert [call.step for call in self._first_layer(made.calls)] == self._steps(session, 2) * 2
        assert session.clock.run == 2 and session.doubt is None


class TestHeliosWithoutHistory(TestHelios):
    """The first chunk of a model whose history has cross attention too."""

    kinds = ("video",)
    guided_text = False
    no_pipeline = "the pipeline always gives a history; the run with one tests it"

    def inputs(self) -> dict[str, Any]:
        return {name: value for name, value in super().inputs().items() if "history" not in name}
