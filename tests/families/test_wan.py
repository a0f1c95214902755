"""Wan 2.1 and 2.2, image-to-video, a time per token, VACE, ChronoEdit, and two transformers in one run."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest
import torch
from diffusers import (
    ChronoEditTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACEPipeline,
    WanVACETransformer3DModel,
)

import dit_attn
from tests._support.family_mixin import SPARSE
from tests._support.wan import WAN, WanLike, wan_vae


class TestWan(WanLike):
    def model(self) -> torch.nn.Module:
        return WanTransformer3DModel(**WAN)

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = WanPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=wan_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=self.model().eval(),
        )
        return pipe, self.run_arguments()


class TestWanImageToVideo(WanLike):
    cross_calls = ("image", "cross")
    cross_keys = MappingProxyType({"image": 5, "cross": 512})

    def model(self) -> torch.nn.Module:
        return WanTransformer3DModel(**{**WAN, "in_channels": 12, "image_dim": 4, "added_kv_proj_dim": 24})

    def inputs(self) -> dict[str, Any]:
        # The processor takes the last 512 context tokens for text and everything before for the image.
        return {
            "hidden_states": torch.randn(2, 12, 4, 16, 20),
            "encoder_hidden_states": torch.randn(2, 512, 16),
            "encoder_hidden_states_image": torch.randn(2, 5, 4),
            "timestep": torch.tensor([500, 500]),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        transformer = WanTransformer3DModel(**{**WAN, "in_channels": 12}).eval()
        pipe = WanImageToVideoPipeline(
            tokenizer=None,
            text_encoder=None,
            image_encoder=None,
            image_processor=None,
            vae=wan_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=transformer,
        )
        return pipe, {**self.run_arguments(), "image": torch.rand(1, 3, 64, 80)}


class TestWanPerTokenTime(WanLike):
    """Wan 2.2 TI2V 5B gives every token its own timestep: the first frame's is 0."""

    def model(self) -> torch.nn.Module:
        return WanTransformer3DModel(**WAN)

    def inputs(self) -> dict[str, Any]:
        times = torch.full((2, 320), 500)
        times[:, :80] = 0
        return {**super().inputs(), "timestep": times}

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = WanImageToVideoPipeline(
            tokenizer=None,
            text_encoder=None,
            image_encoder=None,
            image_processor=None,
            vae=wan_vae(),
            scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0),
            transformer=self.model().eval(),
            expand_timesteps=True,
        )
        return pipe, {**self.run_arguments(), "image": torch.rand(1, 3, 64, 80)}


class TestChronoEdit(WanLike):
    no_pipeline = "ChronoEdit's pipeline differs from Wan's image-to-video in the temporal positions only"

    def model(self) -> torch.nn.Module:
        return ChronoEditTransformer3DModel(**WAN)


class TestWanVace(WanLike):
    """Two blocks, and one of the control branch next to them."""

    sockets = cross_sockets = 3

    def model(self) -> torch.nn.Module:
        return WanVACETransformer3DModel(**WAN, vace_layers=[0], vace_in_channels=8)

    def inputs(self) -> dict[str, Any]:
        control = torch.randn(2, 8, 4, 16, 20)
        return {**super().inputs(), "control_hidden_states": control, "control_hidden_states_scale": torch.ones(1)}

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        # The control holds the latents of what is kept and of what is made new, and a mask of 4 x 4 pixels a latent.
        transformer = WanVACETransformer3DModel(**WAN, vace_layers=[0], vace_in_channels=4 + 4 + 16)
        pipe = WanVACEPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=wan_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=transformer.eval(),
        )
        return pipe, self.run_arguments()


def test_guidance_perturbs_blocks_and_leaves_the_control_branch() -> None:
    model = TestWanVace().model().eval()
    session = dit_attn.enable(model, dit_attn.SoftPAG(), SPARSE)
    assert [layer.name for layer in session.layers] == ["blocks.0.attn1", "blocks.1.attn1", "vace_blocks.0.attn1"]
    assert session.guider is not None and session.guider.blocks == ["blocks.0", "blocks.1"]
    with torch.no_grad():
        model(**TestWanVace().inputs())
    found = dit_attn.summary(model)
    assert found.guidance is not None and found.guidance.perturbed == (
        "softpag on layer 1 (blocks.1.attn1), all 2 heads (the default, none were named)",
    )
    assert [layer.sparse_calls for layer in found.layers] == [2, 2, 2]  # in the perturbed pass too


def two_transformer_pipeline() -> WanPipeline:
    """The layout of Wan 2.2 A14B: one transformer for high noise, one for low."""
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=wan_vae(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=WanTransformer3DModel(**WAN).eval(),
        transformer_2=WanTransformer3DModel(**WAN).eval(),
        boundary_ratio=0.8,
    )


def test_two_transformers_share_one_clock() -> None:
    torch.manual_seed(0)
    pipe = two_transformer_pipeline()
    pipe.set_progress_bar_config(disable=True)
    session = dit_attn.enable(pipe, dit_attn.BlockSparse(density=0.5, q_block=32, kv_block=32, dense_steps=2))
    arguments = TestWan().run_arguments()
    for run in (1, 2):
        with torch.no_grad():
            pipe(**arguments, num_inference_steps=6, output_type="latent", generator=torch.Generator().manual_seed(0))
        assert (session.clock.run, session.clock.step, session.clock.total) == (run, 5, 6)
        summary = dit_attn.summary(pipe)
        assert summary.steps == 6 and len(summary.layers) == 4
        assert summary.calls == 6 * 2 * 2
        # The two dense steps are the first of the run, not the first of each transformer.
        assert summary.fallbacks == {"dense step": 2 * 2 * 2}
        used = {layer.name.split(".")[0] for layer in summary.layers if layer.calls}
        assert used == {"transformer", "transformer_2"}
    dit_attn.disable(pipe)
    with pytest.raises(dit_attn.DitAttnError, match="no method is enabled"):
        dit_attn.summary(pipe)


def test_a_second_transformer_that_a_run_does_not_reach_reports_nothing_of_the_run_before() -> None:
    torch.manual_seed(0)
    pipe = two_transformer_pipeline()
    pipe.set_progress_bar_config(disable=True)
    dit_attn.enable(pipe, SPARSE, "softpag")
    arguments = TestWan().run_arguments()
    for steps, used in ((6, {"transformer", "transformer_2"}), (1, {"transformer"})):
        with torch.no_grad():
            pipe(**arguments, num_inference_steps=steps, output_type="latent")
        summary = dit_attn.summary(pipe)
        assert {layer.name.split(".")[0] for layer in summary.layers if layer.calls} == used
        assert summary.calls == steps * 5  # two layers in either branch, one in the perturbed pass
        assert summary.guidance is not None and summary.guidance.evaluations == steps
