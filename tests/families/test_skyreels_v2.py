"""SkyReels V2, with diffusion forcing and block-causal masks."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import (
    FlowMatchEulerDiscreteScheduler,
    SkyReelsV2DiffusionForcingPipeline,
    SkyReelsV2Pipeline,
    SkyReelsV2Transformer3DModel,
    UniPCMultistepScheduler,
)

import dit_attn
from tests._support.family_mixin import SPARSE
from tests._support.wan import WAN, WanLike, wan_vae


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
        assert dit_attn.summary(model).fallbacks == {"square attention mask": 2}
