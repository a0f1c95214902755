"""LongCat-Image and LongCat-Image-Edit: positions of kind 1 for the picture and 2 for the one that is edited."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    LongCatImageEditPipeline,
    LongCatImagePipeline,
    LongCatImageTransformer2DModel,
)

import dit_attn
from dit_attn.processors.attach import attach
from tests._support.family_cases import HEIGHT, SIZE, WIDTH, PackedCase, image_ids, tiny_vae
from tests._support.pipeline_runs import real, run


class TestLongCatImage(PackedCase):
    kinds: tuple[str, ...] = ("text", "image")
    text_args = ("encoder_hidden_states",)

    def model(self) -> torch.nn.Module:
        return LongCatImageTransformer2DModel(
            in_channels=64,
            num_layers=1,
            num_single_layers=1,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=16,
            pooled_projection_dim=16,
            axes_dims_rope=[4, 4, 8],
        )

    def inputs(self) -> dict[str, Any]:
        text = torch.arange(9.0)
        image = image_ids(kind=1)
        image[:, 1:] += 512
        return {
            "hidden_states": torch.randn(2, HEIGHT * WIDTH, 64),
            "encoder_hidden_states": torch.randn(2, 9, 16),
            "timestep": torch.tensor([0.5, 0.5]),
            "img_ids": image,
            "txt_ids": torch.stack([torch.zeros(9), text, text], 1),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = LongCatImagePipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            text_processor=None,
            transformer=self.model().eval(),
        )
        plain = {"enable_prompt_rewrite": False, "enable_cfg_renorm": False}
        return encoded(pipe), {"prompt": "a", **negative(), **plain, **SIZE}


class TestLongCatImageEdit(TestLongCatImage):
    """The picture that is edited stands behind the one that is made."""

    kinds = ("text", "image", "reference")

    @pytest.fixture(autouse=True)
    def small(self, monkeypatch: Any) -> None:
        """Pictures of the tests' size; the pipeline makes them of a megapixel."""
        module = LongCatImageEditPipeline.__module__
        if module.startswith("diffusers."):  # elsewhere is what stands in for a class that an older one lacks
            monkeypatch.setattr(f"{module}.calculate_dimensions", lambda area, ratio: (SIZE["width"], SIZE["height"]))

    def inputs(self) -> dict[str, Any]:
        given = super().inputs()
        reference = image_ids(kind=2, height=6, width=9)
        reference[:, 1:] += 512
        latents = torch.randn(2, HEIGHT * WIDTH + 54, 64)
        return {**given, "hidden_states": latents, "img_ids": torch.cat([given["img_ids"], reference])}

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        from PIL import Image

        stock, _ = super().pipeline()
        parts = {**stock.components, "vae": tiny_vae(16), "text_processor": Processor()}
        pipe = encoded(LongCatImageEditPipeline(**parts))
        return pipe, {"image": Image.new("RGB", (64, 64), (200, 30, 30)), "prompt": "a", **negative()}


class Processor:
    """Stands in for the processor of the text encoder, which is not asked."""

    image_processor = None


def encoded(pipe: Any) -> Any:
    """The pipeline with the embeddings of any prompt: it takes none without a prompt."""
    embeds = torch.randn(1, 9, 16)
    pipe._encode_prompt = lambda prompt, image=None: embeds.expand(len(prompt), -1, -1)
    return pipe


def negative() -> dict[str, Any]:
    """Guidance with the embeddings of a negative prompt."""
    return {"negative_prompt_embeds": torch.randn(1, 9, 16), "guidance_scale": 3.0}


def test_the_rescaling_of_the_pipeline_is_pushed_behind_and_can_be_turned_off() -> None:
    pipe, kwargs = real(TestLongCatImage)
    ways: dict[str, list[torch.Tensor]] = {}
    for renorm in (True, False):
        for way in ("auto", "step", "shift"):
            dit_attn.enable(pipe, dit_attn.SoftPAG(heads="0:0", scale=1.5, inject=way))
            ways.setdefault(way, []).append(run(pipe, kwargs, 2, enable_cfg_renorm=renorm))
    assert attach.session_of(pipe.transformer) is not None
    assert torch.equal(ways["auto"][0], ways["step"][0]) and not torch.equal(ways["auto"][0], ways["shift"][0])
    assert torch.equal(ways["auto"][1], ways["shift"][1])
