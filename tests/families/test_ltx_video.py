"""LTX-Video: a grid that is named, or told by coordinates."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, LTXConditionPipeline, LTXPipeline, LTXVideoTransformer3DModel

import dit_attn
from tests._support.family_cases import VideoCase
from tests._support.family_mixin import SPARSE


class TestLtxVideo(VideoCase):
    kinds = ("video",)
    untouched = ("attn2",)
    cross_sockets = 2
    rotary_error = 2e-2  # a forward that names no scale turns by up to 2e5 radians

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
        assert summary.sparse_calls == summary.calls == 3 * 2

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
