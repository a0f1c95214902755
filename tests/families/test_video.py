"""Video families whose sequence is the video alone, text in cross attention: the mixin on tiny models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLWan,
    ChronoEditTransformer3DModel,
    FlowMatchEulerDiscreteScheduler,
    LTXConditionPipeline,
    LTXPipeline,
    LTXVideoTransformer3DModel,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
    WanImageToVideoPipeline,
    WanPipeline,
    WanTransformer3DModel,
    WanVACETransformer3DModel,
)

import dit_attn
from tests.families.mixin import SPARSE, FamilyMixin

WAN = {
    "patch_size": (1, 2, 2),
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 16,
    "freq_dim": 32,
    "ffn_dim": 32,
    "num_layers": 2,
    "cross_attn_norm": True,
    "qk_norm": "rms_norm_across_heads",
    "rope_max_seq_len": 32,
}


def wan_vae() -> AutoencoderKLWan:
    """A random Wan autoencoder of a quarter of each side: one level fewer than Wan's, for images of a quarter the area.

    Most runs take only sizes from it; image-to-video encodes every frame, and that is what its test costs.
    """
    return AutoencoderKLWan(
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[True, True],
        scale_factor_spatial=4,
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )


class WanLike(FamilyMixin):
    kinds = ("video",)
    grid = (4, 8, 10)
    probe = (2, 3, 5)
    sockets = 2
    untouched = ("attn2",)

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 4, 4, 16, 20),
            "encoder_hidden_states": torch.randn(2, 7, 16),
            "timestep": torch.tensor([500, 500]),
        }

    def run_arguments(self) -> dict[str, Any]:
        embeds = torch.randn(2, 1, 7, 16)
        size = {"height": 64, "width": 80, "num_frames": 13}
        return {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], "guidance_scale": 3.0, **size}


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


class TestChronoEdit(TestWan):
    def model(self) -> torch.nn.Module:
        return ChronoEditTransformer3DModel(**WAN)

    def pipeline(self) -> None:
        return None  # the pipeline needs an image and differs from Wan's image-to-video in the temporal positions only


class TestWanVace(WanLike):
    def model(self) -> torch.nn.Module:
        return WanVACETransformer3DModel(**WAN, vace_layers=[0], vace_in_channels=8)

    def inputs(self) -> dict[str, Any]:
        control = torch.randn(2, 8, 4, 16, 20)
        return {**super().inputs(), "control_hidden_states": control, "control_hidden_states_scale": torch.ones(1)}


class TestSkyReelsV2(WanLike):
    def model(self) -> torch.nn.Module:
        return SkyReelsV2Transformer3DModel(**WAN)

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = SkyReelsV2Pipeline(
            tokenizer=None,
            text_encoder=None,
            vae=wan_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
            transformer=self.model().eval(),
        )
        return pipe, self.run_arguments()

    def test_diffusion_forcing_steps_although_only_copies_of_the_scheduler_do(self) -> None:
        torch.manual_seed(0)
        stock, arguments = self.pipeline()
        scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=8.0)
        parts = {name: getattr(stock, name) for name in ("tokenizer", "text_encoder", "vae", "transformer")}
        pipe = SkyReelsV2DiffusionForcingPipeline(**parts, scheduler=scheduler)
        pipe.set_progress_bar_config(disable=True)
        session = dit_attn.enable(pipe, SPARSE)
        arguments = {**arguments, "prompt": None, "base_num_frames": 13}
        for run, steps in ((1, 4), (2, 3)):
            calls = self._first_layer(self._run(pipe, arguments, steps).calls)
            assert [call.step for call in calls] == self._steps(session, steps)
            assert [call.branches for call in calls] == [("cond",), ("uncond",)] * steps
            assert (session.clock.run, session.clock.total) == (run, steps)

    def test_block_causal_mask_is_declined(self) -> None:
        model = SkyReelsV2Transformer3DModel(**WAN, num_frame_per_block=2).eval()
        dit_attn.enable(model, SPARSE)
        self.call(model, self.inputs())
        assert dit_attn.summary(model).declined == {"square attention mask": 2}


class TestLtxVideo(FamilyMixin):
    kinds = ("video",)
    grid = (4, 8, 10)
    probe = (2, 3, 5)
    sockets = 2
    untouched = ("attn2",)

    def model(self) -> torch.nn.Module:
        return LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=2,
            attention_head_dim=16,
            cross_attention_dim=32,
            num_layers=2,
            caption_channels=16,
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, 320, 4),
            "encoder_hidden_states": torch.randn(2, 7, 16),
            "encoder_attention_mask": torch.ones(2, 7),
            "timestep": torch.tensor([500, 500]),
            "num_frames": 4,
            "height": 8,
            "width": 10,
        }

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        inputs["hidden_states"][:, (at[0] * 8 + at[1]) * 10 + at[2]] += 1.0

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        from diffusers import AutoencoderKLLTXVideo

        vae = AutoencoderKLLTXVideo(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(4, 4, 4, 4),
            decoder_block_out_channels=(4, 4, 4, 4),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1, 1),
            encoder_causal=True,
            decoder_causal=False,
        )
        pipe = LTXPipeline(
            tokenizer=None,
            text_encoder=None,
            vae=vae,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            transformer=self.model().eval(),
        )
        embeds, mask = torch.randn(2, 1, 7, 16), torch.ones(1, 7)
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
            "guidance_scale": 3.0,
            "height": 256,
            "width": 320,
            "num_frames": 25,
        }

    def condition_pipeline(self) -> tuple[LTXConditionPipeline, dict[str, Any]]:
        """It tells the grid by coordinates only, and puts conditioning frames before the video."""
        stock, arguments = self.pipeline()
        names = ("vae", "scheduler", "transformer", "text_encoder", "tokenizer")
        parts = {name: getattr(stock, name) for name in names}
        pipe = LTXConditionPipeline(**parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe, arguments

    @pytest.mark.parametrize(
        ("frame", "spans"),
        [
            (None, [("video", (4, 8, 10))]),
            (0, [("video", (4, 8, 10))]),  # the first frame is held inside the video
            (8, [("reference", (1, 8, 10)), ("video", (4, 8, 10))]),
        ],
    )
    def test_condition_pipeline_tells_its_grid_by_coordinates(self, frame: int | None, spans: list[Any]) -> None:
        torch.manual_seed(0)
        pipe, arguments = self.condition_pipeline()
        if frame is not None:
            arguments = {**arguments, "image": torch.rand(1, 3, 256, 320), "frame_index": frame}
        dit_attn.enable(pipe, SPARSE)
        run = self._run(pipe, arguments, 3)
        assert all([(span.kind, span.grid) for span in call.tokens.spans] == spans for call in run.calls)
        assert [call.step for call in self._first_layer(run.calls)] == [0, 1, 2]
        summary = dit_attn.summary(pipe)
        assert summary.engaged == summary.calls == 3 * 2

    def test_coordinates_win_over_the_named_grid(self, net: Any, args: Any) -> None:
        session = dit_attn.enable(net)
        t, y, x = torch.meshgrid(torch.arange(4.0), torch.arange(8.0), torch.arange(10.0), indexing="ij")
        coords = torch.stack([t, y, x]).reshape(1, 3, -1).repeat(2, 1, 1)
        self.call(net, {**args, "num_frames": 1, "height": 1, "width": 1, "video_coords": coords})
        assert session.tokens(320).grid == (4, 8, 10)
        back_in_time = torch.cat([coords[..., 80:], coords[..., :80]], dim=-1)
        self.call(net, {**args, "num_frames": 1, "height": 1, "width": 1, "video_coords": back_in_time})
        assert "unknown place" in session.layout_error
        shuffled = coords[..., torch.randperm(320)]
        self.call(net, {**args, "num_frames": None, "video_coords": shuffled})
        assert "order of frames" in session.layout_error


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
        assert summary.declined == {"dense step": 2 * 2 * 2}
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
