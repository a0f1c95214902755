"""PRX: the image attends to the text and itself; the text is never a query."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, PRXPipeline, PRXTransformer2DModel

import dit_attn
from tests._support.family_cases import SIZE, ImageCase, tiny_vae
from tests._support.family_mixin import SPARSE
from tests._support.outputs import same
from tests._support.recorded_calls import watching


class TestPRX(ImageCase):
    kinds = ("text", "image")
    text_args = ("encoder_hidden_states",)

    def model(self) -> torch.nn.Module:
        return PRXTransformer2DModel(
            in_channels=4, context_in_dim=16, hidden_size=32, num_heads=2, depth=2, axes_dim=[8, 8]
        )

    def inputs(self) -> dict[str, Any]:
        mask = torch.ones(2, 9, dtype=torch.bool)
        mask[1, 6:] = False
        return {
            "hidden_states": torch.randn(2, 4, 32, 36),
            "timestep": torch.tensor([0.5, 0.5]),
            "encoder_hidden_states": torch.randn(2, 9, 16),
            "attention_mask": mask,
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = PRXPipeline(
            transformer=self.model().eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            text_encoder=None,
            tokenizer=None,
            vae=tiny_vae(),
        )
        embeds, mask = torch.randn(2, 1, 9, 16), torch.ones(1, 9, dtype=torch.bool)
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
            "guidance_scale": 3.0,
            "use_resolution_binning": False,
            **SIZE,
        }

    def test_the_queries_are_the_image_and_the_keys_the_text_too(self, net: Any, args: Any) -> None:
        stock = self.call(net, args)
        dit_attn.enable(net, dit_attn.BlockSparse(density=1.0, q_block=32, kv_block=32, dense_steps=0))
        with watching() as seen:
            assert same(stock, self.call(net, args))
        assert {(call.q.shape[1], call.k.shape[1], call.out.shape[1]) for call in seen} == {(288, 297, 288)}
        dit_attn.enable(net, SPARSE)
        self.call(net, args)
        assert dit_attn.summary(net).sparse_calls == 2
