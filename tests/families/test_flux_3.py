"""Flux 3: the first blocks see the image alone, the others text, image and references; a modular pipeline."""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, Flux3Transformer2DModel

import dit_attn
from tests._support.family_cases import HEIGHT, SIZE, WIDTH, PackedCase
from tests._support.family_mixin import SPARSE
from tests._support.modular_runs import modular
from tests._support.recorded_calls import watching


def places(kind: int, height: int, width: int) -> torch.Tensor:
    """(height * width, 4) rows of t, y, x and kind, as the pipeline makes them."""
    ys, xs = torch.meshgrid(torch.arange(height) * 0.5, torch.arange(width) * 0.5, indexing="ij")
    return torch.stack([torch.zeros(ys.shape), ys, xs, torch.full(ys.shape, float(kind))], -1).flatten(0, 1)


class TestFlux3(PackedCase):
    kinds = ("text", "image")
    text_args = ("encoder_hidden_states",)
    sockets = 3
    untouched = ("txt_mode_blocks", "image_cond")
    joint = "single_transformer_blocks"
    refined = True

    flow_map = False

    def model(self) -> torch.nn.Module:
        return Flux3Transformer2DModel(
            in_channels=16,
            cond_in_channels=16,
            num_layers=1,
            num_single_layers=2,
            attention_head_dim=32,
            num_attention_heads=2,
            joint_attention_dim=16,
            timestep_channels=16,
            axes_dims_rope=(8, 8, 8, 8),
            flow_map=self.flow_map,
        )

    def inputs(self) -> dict[str, Any]:
        return {
            "hidden_states": torch.randn(2, HEIGHT * WIDTH, 16),
            "encoder_hidden_states": torch.randn(2, 9, 16),
            "timestep": torch.tensor([0.5, 0.5]),
            "img_ids": places(0, HEIGHT, WIDTH),
            "txt_ids": torch.zeros(9, 4),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        from diffusers.modular_pipelines.flux3.modular_blocks_flux3 import Flux3CoreDenoiseStep

        components = {"transformer": self.model().eval(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
        embeds = torch.randn(2, 1, 9, 16)
        request = {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], **SIZE}
        return modular(Flux3CoreDenoiseStep(), components), request

    def test_the_first_blocks_see_the_image_alone(self, net: Any, args: Any) -> None:
        dit_attn.enable(net)
        moved = copy.deepcopy(args)
        self.poke_token(moved, self.probe)
        calls = []
        for given in (args, moved):
            with watching() as seen:
                self.call(net, given)
            calls.append(seen[0])
        assert calls[0].layer.startswith("mode_blocks.image")
        assert [(span.kind, span.grid) for span in calls[0].tokens.spans] == [("image", self.grid)]
        assert self._changed(*calls) == {self.probe[1] * WIDTH + self.probe[2]}

    def test_references_follow_the_image(self, net: Any, args: Any) -> None:
        dit_attn.enable(net, SPARSE)
        ids = torch.cat([places(-1, 4, 6), places(-2, 6, 5)])
        with watching() as seen:
            self.call(net, {**args, "image_cond_hidden_states": torch.randn(2, 54, 16), "image_cond_ids": ids})
        spans = [[(span.kind, span.grid) for span in call.tokens.spans] for call in seen]
        references = [("reference", (1, 4, 6)), ("reference", (1, 6, 5))]
        assert spans == [[("image", self.grid)], *[[("text", None), ("image", self.grid), *references]] * 2]
        assert dit_attn.summary(net).sparse_calls == 3


def test_a_distilled_run_has_one_branch() -> None:
    from diffusers.modular_pipelines.flux3.modular_blocks_flux3_distilled import Flux3DistilledCoreDenoiseStep

    torch.manual_seed(0)
    case = TestFlux3()
    case.flow_map = True
    components = {"transformer": case.model().eval(), "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0)}
    pipe = modular(Flux3DistilledCoreDenoiseStep(), components)
    dit_attn.enable(pipe, SPARSE)
    with watching() as seen:
        pipe(prompt_embeds=torch.randn(1, 9, 16), num_inference_steps=3, **SIZE)
    found = [(call.step, call.branches) for call in seen if call.layer.startswith("mode_blocks")]
    assert found == [(step, ("cond",)) for step in range(3)]
    assert dit_attn.summary(pipe).sparse_calls == 9
