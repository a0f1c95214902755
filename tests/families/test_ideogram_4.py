"""Ideogram 4: padding, text and image in one sequence; the unconditional branch is another transformer."""

from __future__ import annotations

from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Ideogram4Pipeline, Ideogram4Transformer2DModel

import dit_attn
from dit_attn.processors.attach import attach
from tests._support.family_cases import HEIGHT, SIZE, WIDTH, PackedCase

ROOM, LENGTH = 12, 9  # for text, and what the caption takes of it


def packed(height: int, width: int) -> dict[str, torch.Tensor]:
    """The rows of one sample, as its pipeline makes them."""
    positions, segments, indicator = Ideogram4Pipeline._prepare_ids([LENGTH], height, width, ROOM, torch.device("cpu"))
    return {"position_ids": positions, "segment_ids": segments, "indicator": indicator}


class Pipeline(Ideogram4Pipeline):
    """Its text features are given."""

    def encode_prompt(self, prompt: str, grid_h: int, grid_w: int, max_sequence_length: int, device: Any) -> Any:
        rows = packed(grid_h, grid_w)
        features = torch.randn(1, ROOM + grid_h * grid_w, 24, generator=torch.Generator().manual_seed(5))
        return features, rows["position_ids"], rows["segment_ids"], rows["indicator"]


class TestIdeogram4(PackedCase):
    kinds = ("padding", "text", "image")
    text_args = ("encoder_hidden_states",)
    rotary_error = 2e-2  # its positions begin at 65536

    def model(self) -> torch.nn.Module:
        return Ideogram4Transformer2DModel(
            in_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            intermediate_size=64,
            adaln_dim=16,
            llm_features_dim=24,
            mrope_section=(4, 2, 2),
        )

    def inputs(self) -> dict[str, Any]:
        rows = {name: value.expand(2, *value.shape[1:]) for name, value in packed(HEIGHT, WIDTH).items()}
        return {
            "hidden_states": torch.randn(2, ROOM + HEIGHT * WIDTH, 16),
            "timestep": torch.tensor([0.5, 0.5]),
            "encoder_hidden_states": torch.randn(2, ROOM + HEIGHT * WIDTH, 24),
            **rows,
        }

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        inputs["hidden_states"][:, ROOM + at[1] * WIDTH + at[2]] += 1.0

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=None,
            tokenizer=None,
            transformer=self.model().eval(),
            unconditional_transformer=self.model().eval(),
        )
        scale = {"guidance_scale": 3.0, "guidance_schedule": None}
        return pipe, {"prompt": "a boat", "max_sequence_length": ROOM, **scale, **SIZE}

    def test_the_unconditional_branch_is_that_of_the_other_transformer(self) -> None:
        pipe, kwargs = self.made()
        dit_attn.enable(pipe)
        sessions = [attach.session_of(pipe.transformer), attach.session_of(pipe.unconditional_transformer)]
        made = self._run(pipe, kwargs, 2)
        assert [session.seen_branches for session in sessions] == [{"cond"}, {"uncond"}]
        lengths = [ROOM + HEIGHT * WIDTH, HEIGHT * WIDTH]
        assert [call.q.shape[1] for call in self._first_layer(made.calls)] == lengths * 2
        dit_attn.disable(pipe)
        assert not any(attach.session_of(model) for model in (pipe.transformer, pipe.unconditional_transformer))
