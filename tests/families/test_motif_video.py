"""Motif-Video: the last blocks are a decoder, whose sequence is the video twice and no text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    ClassifierFreeGuidance,
    FlowMatchEulerDiscreteScheduler,
    MotifVideoPipeline,
    MotifVideoTransformer3DModel,
)

import dit_attn
from tests._support.family_cases import VideoCase
from tests._support.recorded_calls import watching
from tests._support.wan import wan_vae


class TestMotifVideo(VideoCase):
    kinds = ("video", "text")
    text_args = ("encoder_hidden_states",)
    sockets = 3
    untouched = ("cross_attn",)

    def model(self) -> torch.nn.Module:
        return MotifVideoTransformer3DModel(
            in_channels=9,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            num_layers=1,
            num_single_layers=2,
            num_decoder_layers=1,
            text_embed_dim=16,
            rope_axes_dim=(4, 6, 6),
            enable_text_cross_attention_dual=True,
            enable_text_cross_attention_single=True,
        )

    def inputs(self) -> dict[str, Any]:
        mask = torch.ones(2, 9)
        mask[1, 6:] = 0
        return {
            "hidden_states": torch.randn(2, 9, 4, 16, 20),
            "timestep": torch.tensor([500, 500]),
            "encoder_hidden_states": torch.randn(2, 9, 16),
            "encoder_attention_mask": mask,
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = MotifVideoPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=wan_vae(),
            text_encoder=None,
            tokenizer=None,
            transformer=self.model().eval(),
            guider=ClassifierFreeGuidance(guidance_scale=3.0),
        )
        embeds = torch.randn(2, 1, 9, 16)
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "prompt_attention_mask": torch.ones(1, 9),
            "negative_prompt_attention_mask": torch.ones(1, 9),
            "height": 64,
            "width": 80,
            "num_frames": 13,
        }

    def test_the_decoder_has_a_sequence_of_its_own(self, net: Any, args: Any) -> None:
        dit_attn.enable(net)
        with watching() as seen:
            self.call(net, args)
        *_, decoder = seen
        assert [(span.kind, span.length) for span in decoder.tokens.spans] == [("video", 320), ("condition", 320)]
        assert [call.mask is None for call in seen] == [False, False, True]
