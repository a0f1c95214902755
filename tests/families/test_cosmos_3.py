"""Cosmos 3: the video attends to the text and itself, in a call behind the causal one of the text."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import Cosmos3OmniPipeline, Cosmos3OmniTransformer, FlowMatchEulerDiscreteScheduler

import dit_attn
from tests._support.family_cases import VideoCase
from tests._support.family_mixin import SPARSE
from tests._support.recorded_calls import watching
from tests._support.wan import wan_vae

PROMPTS = {"a cat": list(range(9)), "": list(range(20, 26))}


class Tokenizer:
    """What the pipeline asks of a tokenizer when it is made."""

    eos_token_id = 1

    def convert_tokens_to_ids(self, token: str) -> int:
        return 0


class Pipeline(Cosmos3OmniPipeline):
    """The stock pipeline with prompts that are tokenized already."""

    def tokenize_prompt(self, prompt: str, negative_prompt: str | None = None, **_: Any) -> tuple[Any, Any]:
        return PROMPTS[prompt], PROMPTS[negative_prompt or ""]


class TestCosmos3(VideoCase):
    """Text to video."""

    kinds: tuple[str, ...] = ("text", "video")
    sound: tuple[int, ...] = ()  # latent frames of sound

    def model(self) -> torch.nn.Module:
        return Cosmos3OmniTransformer(
            head_dim=16,
            hidden_size=32,
            intermediate_size=64,
            latent_channel=4,
            patch_latent_dim=16,
            num_attention_heads=4,
            num_hidden_layers=2,
            num_key_value_heads=2,
            vocab_size=50,
            rope_axes_dim=[4, 2, 2],
            sound_gen=bool(self.sound),
            sound_dim=6 if self.sound else None,
        )

    def inputs(self) -> dict[str, Any]:
        text, video, sound = 9, 320, sum(self.sound)
        length = text + video + sound
        rows = torch.arange(text, text + video)
        places = torch.stack(torch.meshgrid(torch.arange(4), torch.arange(8), torch.arange(10), indexing="ij"))
        places = torch.cat([torch.arange(text).expand(3, -1), places.flatten(1), torch.arange(sound).expand(3, -1)], 1)
        made: dict[str, Any] = {
            "input_ids": torch.arange(text),
            "text_indexes": torch.arange(text),
            "position_ids": places.float(),
            "und_len": text,
            "sequence_length": length,
            "vision_tokens": [torch.randn(1, 4, 4, 16, 20)],
            "vision_token_shapes": [(4, 8, 10)],
            "vision_sequence_indexes": rows,
            "vision_mse_loss_indexes": rows,
            "vision_timesteps": torch.full((video,), 500.0),
            "vision_noisy_frame_indexes": [torch.arange(4)],
        }
        if sound:
            rows = torch.arange(text + video, length)
            made |= {
                "sound_tokens": [torch.randn(6, sound)],
                "sound_token_shapes": [(sound, 1, 1)],
                "sound_sequence_indexes": rows,
                "sound_mse_loss_indexes": rows,
                "sound_timesteps": torch.full((sound,), 500.0),
                "sound_noisy_frame_indexes": [torch.arange(sound)],
            }
        return made

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        t, y, x = at
        inputs["vision_tokens"][0][:, :, t, 2 * y : 2 * y + 2, 2 * x : 2 * x + 2] += 1.0

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = Pipeline(
            transformer=self.model().eval(),
            text_tokenizer=Tokenizer(),
            vae=wan_vae(),
            scheduler=FlowMatchEulerDiscreteScheduler(),
            enable_safety_checker=False,
        )
        size = {"height": 64, "width": 80, "num_frames": 13}
        return pipe, {"prompt": "a cat", "negative_prompt": "", "guidance_scale": 3.0, **size}


class TestCosmos3Sound(TestCosmos3):
    """Text to video with sound."""

    kinds = ("text", "video", "audio")
    sound = (6,)
    no_pipeline = "TestCosmos3 runs the loop; sound needs a tokenizer of its own"


def test_the_call_of_the_text_is_not_counted() -> None:
    torch.manual_seed(0)
    case = TestCosmos3()
    net, args = case.model().eval(), case.inputs()
    dit_attn.enable(net, SPARSE)
    with watching() as seen:
        case.call(net, args)
    assert {(call.q.shape[1], call.k.shape[1]) for call in seen} == {(320, 329)}
    summary = dit_attn.summary(net)
    assert summary.calls == summary.sparse_calls == 2 and not summary.fallbacks
