"""Lumina-Next (Lumina-T2X): the prompt in cross attention, three channels guided."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LuminaNextDiT2DModel, LuminaPipeline
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina

import dit_attn
from tests._support.family_cases import HEIGHT, SIZE, WIDTH, ImageCase
from tests._support.pipeline_runs import real, run


class TestLuminaNext(ImageCase):
    kinds = ("image",)
    untouched = ("attn2",)
    cross_sockets = 2

    def model(self) -> torch.nn.Module:
        return LuminaNextDiT2DModel(
            hidden_size=32,
            num_layers=2,
            num_attention_heads=2,
            num_kv_heads=1,
            cross_attention_dim=16,
            multiple_of=16,
            sample_size=32,
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
            "timestep": torch.tensor([0.5, 0.5]),
            "encoder_hidden_states": torch.randn(2, 7, 16),
            "encoder_mask": torch.ones(2, 7, dtype=torch.long),
            "image_rotary_emb": get_2d_rotary_pos_embed_lumina(16, 384, 384),
            "cross_attention_kwargs": {},
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = LuminaPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=self.model().eval(),
        )
        embeds, mask = torch.randn(2, 1, 7, 16), torch.ones(1, 7, dtype=torch.long)
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
            "guidance_scale": 3.0,
            **SIZE,
        }


def test_the_conditional_branch_alone_takes_no_update_because_one_channel_is_not_guided() -> None:
    pipe, kwargs = real(TestLuminaNext)
    dit_attn.enable(pipe, dit_attn.SoftPAG(heads="0:0", inject="cond"))
    with pytest.raises(dit_attn.DitAttnError, match="inject='shift'"):
        run(pipe, kwargs, 2)
