"""Bria FIBO: every block gets its own layer of the text encoder."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import BriaFiboPipeline, BriaFiboTransformer2DModel, FlowMatchEulerDiscreteScheduler

import dit_attn
from tests._support.family_cases import HEIGHT, SIZE, WIDTH, PackedCase, image_ids
from tests._support.family_mixin import SPARSE
from tests._support.word_encoder import WordEncoder


class TestFibo(PackedCase):
    kinds: tuple[str, ...] = ("text", "image")
    text_args = ("encoder_hidden_states",)

    def model(self) -> torch.nn.Module:
        return BriaFiboTransformer2DModel(
            in_channels=16,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            text_encoder_dim=8,
            axes_dims_rope=[0, 8, 8],
        )

    def inputs(self) -> dict[str, Any]:
        mask = torch.ones(2, 1, 1, 9 + HEIGHT * WIDTH, dtype=torch.bool)
        mask[1, :, :, 5:9] = False
        return {
            "hidden_states": torch.randn(2, HEIGHT * WIDTH, 16),
            "encoder_hidden_states": torch.randn(2, 9, 16),
            "text_encoder_layers": [torch.randn(2, 9, 8), torch.randn(2, 9, 8)],
            "timestep": torch.tensor([500.0, 500.0]),
            "img_ids": image_ids(),
            "txt_ids": torch.zeros(9, 3),
            "joint_attention_kwargs": {"attention_mask": mask},
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = BriaFiboPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
            vae=None,
            text_encoder=WordEncoder(8),
            tokenizer=None,
            transformer=self.model().eval(),
        )
        texts = {"a": encoded(9), "": encoded(5)}
        pipe.get_prompt_embeds = lambda prompt, **_: texts[prompt[0]]
        return pipe, {"prompt": "a", "guidance_scale": 3.0, **SIZE}

    def test_a_mask_of_all_pairs_is_read_by_a_row_of_the_image(self, net: Any, args: Any) -> None:
        """diffusers before 0.42 gives the outer product of what exists, 0 or -inf."""
        exists = args["joint_attention_kwargs"]["attention_mask"][:, :, 0].float()
        pairs = torch.where(exists.mT @ exists == 1, 0.0, -torch.inf)[:, None]
        pairs[:, :, range(pairs.shape[-1]), range(pairs.shape[-1])] = 0.0  # a row without keys is no number
        found = []
        for mask in (args["joint_attention_kwargs"]["attention_mask"], pairs):
            dit_attn.enable(net, SPARSE)
            found.append(self.call(net, {**args, "joint_attention_kwargs": {"attention_mask": mask}})[0])
            summary = dit_attn.summary(net)
            assert summary.sparse_calls == summary.calls == 2, summary.fallbacks
        torch.testing.assert_close(found[0], found[1], atol=1e-5, rtol=1e-4)


class TestFiboEdit(TestFibo):
    """The context picture stands behind the one that is made."""

    kinds = ("text", "image", "reference")
    no_pipeline = "the edit pipeline asks its text encoder for a caption of the picture"

    def inputs(self) -> dict[str, Any]:
        given = super().inputs()
        mask = given["joint_attention_kwargs"]["attention_mask"]
        mask = torch.cat([mask, mask.new_ones(2, 1, 1, 54)], -1)
        return {
            **given,
            "hidden_states": torch.randn(2, HEIGHT * WIDTH + 54, 16),
            "img_ids": torch.cat([image_ids(), image_ids(kind=1, height=6, width=9)]),
            "joint_attention_kwargs": {"attention_mask": mask},
        }


def encoded(length: int) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """What the pipeline makes of a text: embeddings, a layer for each block, the mask."""
    layers = [torch.randn(1, length, 8) for _ in range(2)]
    return torch.cat(layers, -1), layers, torch.ones(1, length)
