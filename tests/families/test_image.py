"""Image families: Flux and its relatives, SD3, PixArt, Sana. The mixin on a tiny random transformer of each class."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    ChromaTransformer2DModel,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtAlphaPipeline,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
)

import dit_attn
from tests.families import image_pipelines
from tests.families.mixin import SPARSE, FamilyMixin

HEIGHT, WIDTH = 16, 18
SIZE = {"height": 16 * HEIGHT, "width": 16 * WIDTH}  # in pixels, two pixels of an eighth per token


def tiny_vae(channels: int = 4) -> AutoencoderKL:
    """A random autoencoder with the usual spatial factor of 8; runs stop at the latents, so it only tells sizes."""
    blocks = 4
    return AutoencoderKL(
        block_out_channels=(4,) * blocks,
        down_block_types=("DownEncoderBlock2D",) * blocks,
        up_block_types=("UpDecoderBlock2D",) * blocks,
        latent_channels=channels,
        norm_num_groups=1,
        layers_per_block=1,
        shift_factor=0.0,
        scaling_factor=1.0,
    )


def image_ids(columns: int = 3, kind: int = 0, height: int = HEIGHT, width: int = WIDTH) -> torch.Tensor:
    """(height * width, columns) rows of kind, y, x, and zeros."""
    ys, xs = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ids = torch.zeros(height * width, columns)
    ids[:, 0], ids[:, 1], ids[:, 2] = kind, ys.flatten(), xs.flatten()
    return ids


class ImageCase(FamilyMixin):
    grid = (1, HEIGHT, WIDTH)
    sockets = 2


class PackedCase(ImageCase):
    """Latents that come as one vector per token."""

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        inputs["hidden_states"][:, at[1] * WIDTH + at[2]] += 1.0


class TestPixArt(ImageCase):
    kinds = ("image",)
    untouched = ("attn2",)
    pipeline_class = PixArtSigmaPipeline

    def model(self) -> torch.nn.Module:
        return PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=12,
            in_channels=4,
            out_channels=4,
            num_layers=2,
            cross_attention_dim=24,
            sample_size=32,
            patch_size=2,
            caption_channels=16,
            use_additional_conditions=False,
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
            "encoder_hidden_states": torch.randn(2, 7, 16),
            "encoder_attention_mask": torch.ones(2, 7),
            "timestep": torch.tensor([500, 500]),
            "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = self.pipeline_class(
            tokenizer=None,
            text_encoder=None,
            vae=tiny_vae(),
            scheduler=DPMSolverMultistepScheduler(),
            transformer=self.model().eval(),
        )
        embeds, mask = torch.randn(2, 1, 7, 16), torch.ones(1, 7)
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
            "negative_prompt": None,
            "guidance_scale": 3.0,
            "height": 16 * HEIGHT,
            "width": 16 * WIDTH,
            "use_resolution_binning": False,
        }

    def test_unguided_batch_is_all_conditional(self) -> None:
        pipe, kwargs = self.pipeline()
        pipe.set_progress_bar_config(disable=True)
        dit_attn.enable(pipe, SPARSE)
        run = self._run(pipe, {**kwargs, "guidance_scale": 1.0, "num_images_per_prompt": 2}, 2)
        assert {call.branches for call in run.calls} == {("cond", "cond")}


class TestPixArtAlpha(TestPixArt):
    pipeline_class = PixArtAlphaPipeline


class TestFlux(PackedCase):
    kinds: tuple[str, ...] = ("text", "image")
    text_args = ("encoder_hidden_states",)
    sockets = 3

    def model(self) -> torch.nn.Module:
        return FluxTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            pooled_projection_dim=32,
            axes_dims_rope=(4, 4, 8),
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, HEIGHT * WIDTH, 4),
            "encoder_hidden_states": torch.randn(2, 10, 32),
            "pooled_projections": torch.randn(2, 32),
            "timestep": torch.tensor([0.5, 0.5]),
            "img_ids": image_ids(),
            "txt_ids": torch.zeros(10, 3),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]] | None:
        pipe = FluxPipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=tiny_vae(1),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            transformer=self.model().eval(),
        )
        embeds, pooled = torch.randn(2, 1, 10, 32), torch.randn(2, 1, 32)
        return pipe, {
            "prompt_embeds": embeds[0],
            "pooled_prompt_embeds": pooled[0],
            "negative_prompt_embeds": embeds[1],
            "negative_pooled_prompt_embeds": pooled[1],
            "true_cfg_scale": 3.0,
            "height": 16 * HEIGHT,
            "width": 16 * WIDTH,
        }


class TestFluxKontext(TestFlux):
    """A reference image stands behind the picture, with kind 1 in the table of positions."""

    kinds = ("text", "image", "reference")

    def inputs(self) -> dict[str, Any]:
        reference = image_ids(kind=1, height=6, width=9)
        return {
            **super().inputs(),
            "hidden_states": torch.randn(2, HEIGHT * WIDTH + 54, 4),
            "img_ids": torch.cat([image_ids(), reference]),
        }

    def pipeline(self) -> None:
        return None  # the Kontext pipeline needs an image and differs from Flux in the table of positions only


class TestChroma(PackedCase):
    kinds = ("text", "image")
    text_args = ("encoder_hidden_states",)
    sockets = 3

    def model(self) -> torch.nn.Module:
        return ChromaTransformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 4, 8),
            approximator_num_channels=8,
            approximator_hidden_dim=16,
            approximator_layers=1,
        )

    def inputs(self) -> dict[str, Any]:
        mask = torch.ones(2, 10 + HEIGHT * WIDTH, dtype=torch.bool)
        mask[1, 6:10] = False
        return {
            "hidden_states": torch.randn(2, HEIGHT * WIDTH, 4),
            "encoder_hidden_states": torch.randn(2, 10, 32),
            "timestep": torch.tensor([0.5, 0.5]),
            "img_ids": image_ids(),
            "txt_ids": torch.zeros(10, 3),
            "attention_mask": mask,
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        return image_pipelines.chroma(self.model().eval(), SIZE)


class TestFlux2(PackedCase):
    kinds: tuple[str, ...] = ("text", "image")
    text_args = ("encoder_hidden_states",)
    run_order: tuple[str, ...] = ("cond",)
    sockets = 3

    def model(self) -> torch.nn.Module:
        return Flux2Transformer2DModel(
            patch_size=1,
            in_channels=4,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=32,
            timestep_guidance_channels=16,
            axes_dims_rope=(4, 4, 4, 4),
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, HEIGHT * WIDTH, 4),
            "encoder_hidden_states": torch.randn(2, 10, 32),
            "timestep": torch.tensor([0.5, 0.5]),
            "img_ids": image_ids(4),
            "txt_ids": torch.zeros(10, 4),
            "guidance": torch.tensor([4.0, 4.0]),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]] | None:
        return image_pipelines.flux2(self.model().eval(), SIZE)


class TestFlux2WithReference(TestFlux2):
    kinds = ("text", "image", "reference")

    def inputs(self) -> dict[str, Any]:
        reference = image_ids(4, kind=10, height=6, width=9)
        return {
            **super().inputs(),
            "hidden_states": torch.randn(2, HEIGHT * WIDTH + 54, 4),
            "img_ids": torch.cat([image_ids(4), reference]),
        }

    def pipeline(self) -> None:
        return None  # a reference needs a trained encoder; the loop is that of Flux.2 without one


class TestFlux2Klein(TestFlux2):
    """Klein has true guidance, dev has it as an input of the model."""

    run_order = ()

    def pipeline(self) -> tuple[Any, dict[str, Any]] | None:
        return image_pipelines.flux2_klein(self.model().eval(), SIZE)


class TestSD3(ImageCase):
    kinds = ("image", "text")
    text_args = ("encoder_hidden_states",)

    def model(self) -> torch.nn.Module:
        return SD3Transformer2DModel(**self.settings())

    def settings(self) -> dict[str, Any]:
        return {
            "sample_size": 36,
            "patch_size": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 16,
            "caption_projection_dim": 16,
            "pooled_projection_dim": 16,
            "pos_embed_max_size": 24,
        }

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 2 * HEIGHT, 2 * WIDTH),
            "encoder_hidden_states": torch.randn(2, 9, 16),
            "pooled_projections": torch.randn(2, 16),
            "timestep": torch.tensor([500, 500]),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = StableDiffusion3Pipeline(
            transformer=self.model().eval(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=tiny_vae(),
            text_encoder=None,
            tokenizer=None,
            text_encoder_2=None,
            tokenizer_2=None,
            text_encoder_3=None,
            tokenizer_3=None,
        )
        embeds, pooled = torch.randn(2, 1, 9, 16), torch.randn(2, 1, 16)
        return pipe, {
            "prompt_embeds": embeds[0],
            "pooled_prompt_embeds": pooled[0],
            "negative_prompt_embeds": embeds[1],
            "negative_pooled_prompt_embeds": pooled[1],
            "guidance_scale": 3.0,
            "height": 16 * HEIGHT,
            "width": 16 * WIDTH,
        }


class TestSD35Medium(TestSD3):
    """3.5 medium: normalised queries and keys, and a second attention over the image alone."""

    sockets = 3

    def settings(self) -> dict[str, Any]:
        return {**super().settings(), "dual_attention_layers": (0,), "qk_norm": "rms_norm"}


def test_linear_attention_is_refused_with_the_reason() -> None:
    model = SanaTransformer2DModel(
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
    with pytest.raises(dit_attn.DitAttnError, match=r"SanaTransformer2DModel.*linear"):
        dit_attn.enable(model)
