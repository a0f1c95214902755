"""MiniMax-H3: text, given frames, sound and video in one packed sequence; a modular pipeline without guidance."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from diffusers import MiniMaxH3Scheduler, MiniMaxH3Transformer3DModel

import dit_attn
from tests._support.family_cases import VideoCase
from tests._support.family_mixin import SPARSE
from tests._support.modular_runs import modular
from tests._support.recorded_calls import watching

TEXT, VIDEO, AUDIO = 1, 0, 2  # tags of rows
SIZES = {"min_duration": 0.0, "vae_latent_channels": 4, "audio_latent_channels": 8}


class Schedule(MiniMaxH3Scheduler):
    """Makes as many steps as it is asked for; the stock one counts the end of the schedule as one."""

    def set_timesteps(self, num_inference_steps: Any = None, device: Any = None, sigmas: Any = None) -> None:
        super().set_timesteps(num_inference_steps + 1, device, sigmas)


class TestMiniMaxH3(VideoCase):
    """Text to video with sound."""

    kinds: tuple[str, ...] = ("text", "audio", "video")
    text_args: tuple[str, ...] = ("encoder_hidden_states",)
    untouched = ("token_refiner",)
    step_gets_all = False  # that of the sound is another one
    even_axes = (1, 2)  # latents of the video are of one or of four frames
    frames = 0  # given ones
    given_time = ()
    text_rows = 7

    def model(self) -> torch.nn.Module:
        return MiniMaxH3Transformer3DModel(
            num_attention_heads=2,
            attention_head_dim=32,
            hidden_size=48,
            num_layers=2,
            num_refiner_layers=1,
            ffn_dim=64,
            in_channels=4,
            audio_in_channels=8,
            text_dim=16,
            freq_dim=16,
            time_embed_hidden_dim=32,
            time_embed_dim=32,
            rope_freq_dim=4,
        )

    def packed(self) -> dict[str, torch.Tensor]:
        """The sequence as its pipeline lays it out."""
        from diffusers.modular_pipelines.minimax_h3.before_denoise import MiniMaxH3PrepareLayoutStep

        names = ("position_ids", "token_tags", "video_indices", "audio_indices", "text_indices")
        anchors = ("first", "last")[: self.frames]
        tags = torch.full((self.text_rows,), TEXT)
        tags[1:3] = VIDEO if anchors else TEXT  # rows of a given frame in the text
        laid_out = MiniMaxH3PrepareLayoutStep.build_packed_sequence(
            tags, 4, 16, 20, 5, (1, 2, 2), 2, AUDIO, VIDEO, anchors
        )
        return dict(zip(names, laid_out))

    def inputs(self) -> dict[str, Any]:
        rows = self.packed()
        return {
            "hidden_states": torch.randn(1, len(rows["video_indices"]), 16),
            "audio_hidden_states": torch.randn(1, len(rows["audio_indices"]), 8),
            "encoder_hidden_states": torch.randn(1, self.text_rows, 16),
            "timestep": torch.tensor([0.5, *self.given_time]),
            "timestep_indices": torch.zeros(len(rows["token_tags"]), dtype=torch.long),
            **rows,
        }

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        t, y, x = at
        inputs["hidden_states"][:, (self.frames + t) * 80 + 10 * y + x] += 1.0

    def components(self) -> dict[str, Any]:
        return {"scheduler": Schedule(), "audio_scheduler": Schedule(shift=3.0)}

    def request(self) -> dict[str, Any]:
        return {
            "prompt_embeds": torch.randn(1, self.text_rows, 16),
            "text_token_tags": torch.full((self.text_rows,), TEXT),
            "height": 384,
            "width": 448,
            "num_frames": 5,
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import MiniMaxH3CoreDenoiseStep

        components = {"transformer": self.model().eval(), **self.components()}
        return modular(MiniMaxH3CoreDenoiseStep(), components, **SIZES), self.request()


class TestMiniMaxH3Frames(TestMiniMaxH3):
    """A first and a last frame are held at a time of 0.999 and stand before the sound."""

    kinds = ("text", "condition", "audio", "video")
    text_args = ()
    frames = 2
    given_time = (0.999,)

    def inputs(self) -> dict[str, Any]:
        made = super().inputs()
        made["timestep_indices"][made["video_indices"][:160]] = 1
        return made

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import MiniMaxH3FL2VACoreDenoiseStep

        components = {"transformer": self.model().eval(), **self.components()}
        pipe = modular(MiniMaxH3FL2VACoreDenoiseStep(), components, **SIZES)
        frames = {name: torch.randn(1, 4, 1, 24, 28) for name in ("first", "last")}
        anchors = {"keyframe_anchors": tuple(frames), "condition_latents": list(frames.values())}
        return pipe, {**self.request(), **anchors}

    def test_a_run_of_another_size_leaves_no_trace(self) -> None:
        """The given frames are of one size; the case without any tests it."""

    def test_the_clock_is_that_of_the_video(self) -> None:
        pipe, request = self.made()
        session = dit_attn.enable(pipe)
        times = []
        with dit_attn.observing(pipe, lambda call, *_: times.append(session.clock.timestep)):
            self._run(pipe, request, 2)
        assert times == [0.0, 0.0] + [float(pipe.scheduler.timesteps[1])] * 2 and times[-1] < 0.9


def test_a_run_with_references_is_of_another_transformer() -> None:
    from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import MiniMaxH3Ref2VACoreDenoiseStep

    torch.manual_seed(0)
    case = TestMiniMaxH3()
    components = {"transformer_ref": case.model().eval(), **case.components()}
    pipe = modular(MiniMaxH3Ref2VACoreDenoiseStep(), components, **SIZES)
    references = [
        SimpleNamespace(kind="image"),
        SimpleNamespace(kind="audio"),
        SimpleNamespace(kind="video", has_audio=True),
    ]
    request = {
        **case.request(),
        "normalized_references": references,
        "condition_latents": [torch.randn(1, 4, 1, 8, 8), torch.randn(1, 4, 2, 8, 8)],
        "audio_condition_latents": [torch.randn(6, 8), torch.randn(4, 8)],
    }
    session = dit_attn.enable(pipe, SPARSE)
    assert session.model is pipe.transformer_ref
    with watching() as seen:
        pipe(**request, num_inference_steps=2, generator=torch.Generator().manual_seed(0))
    kinds = ("text", "condition", "audio", "condition", "audio", "video")
    assert [tuple(span.kind for span in call.tokens.spans) for call in seen] == [kinds] * 4
    assert [call.step for call in seen] == [0, 0, 1, 1]
    summary = dit_attn.summary(pipe)
    assert summary.sparse_calls == summary.calls == 4, summary.fallbacks
