"""LTX-2: a video beside its sound."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLLTX2Audio,
    AutoencoderKLLTX2Video,
    FlowMatchEulerDiscreteScheduler,
    LTX2Pipeline,
    LTX2VideoTransformer3DModel,
)

import dit_attn
from tests._support.family_cases import VideoCase
from tests._support.family_mixin import SPARSE


class TestLtx2(VideoCase):
    kinds = ("video",)
    untouched = ("audio", "attn2")
    cross_sockets = 2
    even_axes = (1, 2)  # the first latent frame is one frame of the video
    rotary_error = 2e-3

    def model(self) -> torch.nn.Module:
        return LTX2VideoTransformer3DModel(**self.settings())

    def settings(self) -> dict[str, Any]:
        return {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "audio_in_channels": 4,
            "audio_out_channels": 4,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "num_layers": 2,
            "caption_channels": 16,
            "rope_double_precision": False,
        }

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(1, 320, 4),
            "audio_hidden_states": torch.randn(1, 6, 4),
            "encoder_hidden_states": torch.randn(1, 7, 16),
            "audio_encoder_hidden_states": torch.randn(1, 7, 16),
            "timestep": torch.tensor([500.0]),
            "num_frames": 4,
            "height": 8,
            "width": 10,
            "audio_num_frames": 6,
            "fps": 25.0,
        }

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        inputs["hidden_states"][:, (at[0] * 8 + at[1]) * 10 + at[2]] += 1.0

    def test_key_frames_are_appended_to_the_video(self, net: Any, args: Any) -> None:
        # The condition pipeline joins key frame tokens and their coordinates to the end of the sequence.
        session = dit_attn.enable(net)
        coords = net.rope.prepare_video_coords(1, 4, 8, 10, torch.device("cpu"), fps=25.0)
        longer = {
            **args,
            "hidden_states": torch.cat([args["hidden_states"], torch.randn(1, 80, 4)], dim=1),
            "video_coords": torch.cat([coords, coords[:, :, 160:240]], dim=2),
        }
        before = self._first_keys(net, longer)
        assert [(span.kind, span.start, span.stop) for span in before.tokens.spans] == [
            ("video", 0, 320),
            ("reference", 320, 400),
        ]
        moved = copy.deepcopy(longer)
        self.poke_token(moved, self.probe)
        assert self._changed(before, self._first_keys(net, moved)) == {(2 * 8 + 3) * 10 + 5}
        named = dict.fromkeys(("num_frames", "height", "width"))
        self.call(net, {**args, **named, "video_coords": coords})
        assert session.tokens(320).grid == (4, 8, 10)

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        ltx2 = pytest.importorskip("diffusers.pipelines.ltx2", reason="this diffusers has no LTX-2")
        stream = {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None}
        connectors = ltx2.LTX2TextConnectors(
            caption_channels=16,
            text_proj_in_factor=1,
            **{f"{kind}_connector_{name}": value for kind in ("video", "audio") for name, value in stream.items()},
            connector_rope_base_seq_len=4096,
            rope_theta=10000.0,
            rope_double_precision=False,
            causal_temporal_positioning=False,
        )
        vae = AutoencoderKLLTX2Video(
            latent_channels=4,
            block_out_channels=(4, 4, 4, 4),
            decoder_block_out_channels=(4, 4, 4),
            layers_per_block=(1, 1, 1, 1, 1),
            decoder_layers_per_block=(1, 1, 1, 1),
        )
        audio_vae = AutoencoderKLLTX2Audio(
            base_channels=4, ch_mult=(1,), num_res_blocks=1, resolution=32, latent_channels=2, mel_bins=8
        )
        pipe = LTX2Pipeline(
            text_encoder=None,
            tokenizer=None,
            vocoder=None,
            vae=vae,
            audio_vae=audio_vae,
            connectors=connectors,
            scheduler=FlowMatchEulerDiscreteScheduler(),
            transformer=self.model().eval(),
        )
        embeds, mask = torch.randn(2, 1, 8, 16), torch.ones(1, 8)
        scales = {"guidance_scale": 3.0, "stg_scale": 0.0, "modality_scale": 1.0}
        known = inspect.signature(pipe.__call__).parameters  # the first releases have guidance alone
        arguments = {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "prompt_attention_mask": mask,
            "negative_prompt_attention_mask": mask,
            **scales,
            **{f"audio_{name}": value for name, value in scales.items()},
            "spatio_temporal_guidance_blocks": None,
            "height": 512,
            "width": 640,
            "num_frames": 49,
        }
        return pipe, {name: value for name, value in arguments.items() if name in known}

    def test_perturbed_passes_have_their_own_branch(self) -> None:
        torch.manual_seed(0)
        pipe, arguments = self.pipeline()
        if "stg_scale" not in arguments:
            pytest.skip("this diffusers perturbs no pass of LTX-2")
        pipe.register_modules(transformer=LTX2VideoTransformer3DModel(**self.settings(), perturbed_attn=True).eval())
        pipe.set_progress_bar_config(disable=True)
        dit_attn.enable(pipe, SPARSE)
        scales = {f"{kind}{name}": 2.0 for kind in ("", "audio_") for name in ("stg_scale", "modality_scale")}
        run = self._run(pipe, {**arguments, **scales, "spatio_temporal_guidance_blocks": [1]}, 2)
        seen = [(call.step, call.branches) for call in self._first_layer(run.calls)]
        passes = [("uncond", "cond"), ("perturbed",), ("perturbed",)]
        assert seen == [(step, branches) for step in range(2) for branches in passes]
