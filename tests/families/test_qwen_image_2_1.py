"""Qwen-Image 2.1: text and given images know nothing of the image, and their keys are cached after the first step."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, QwenImage21Pipeline, QwenImage21Transformer2DModel

import dit_attn
from tests._support.family_cases import HEIGHT, SIZE, WIDTH, PackedCase, inner_class
from tests._support.family_mixin import SPARSE
from tests._support.outputs import same


def cache_of() -> Any:
    """The class of its caches of keys."""
    return inner_class("transformer_qwenimage21.QwenImage21KVCache")


class Processor:
    """What the pipeline asks of a processor when it is made."""

    tokenizer = SimpleNamespace(encode=lambda text: [0])

    def apply_chat_template(self, messages: Any, **_: Any) -> list[list[int]]:
        return [[0]]


class TestQwenImage21(PackedCase):
    """Every step computes the text again."""

    kinds: tuple[str, ...] = ("text", "image")
    text_args = ("encoder_hidden_states",)
    use_kv_cache = False

    def model(self) -> torch.nn.Module:
        return QwenImage21Transformer2DModel(
            patch_size=1,
            in_channels=16,
            out_channels=16,
            num_layers=2,
            attention_head_dim=16,
            num_attention_heads=2,
            context_in_dim=16,
            axes_dims_rope=(4, 4, 8),
        )

    def inputs(self) -> dict[str, Any]:
        mask = torch.ones(2, 10, dtype=torch.bool)
        mask[1, 6:] = False
        return {
            "hidden_states": torch.randn(2, HEIGHT * WIDTH, 16),
            "encoder_hidden_states": torch.randn(2, 10, 16),
            "encoder_hidden_states_mask": mask,
            "timestep": torch.tensor([0.5, 0.5]),
            "img_shapes": [[(1, HEIGHT, WIDTH)]] * 2,
            "img_mask": torch.tensor([[False] * 10 + [True] * (HEIGHT * WIDTH // 4)] * 2),
        }

    def pipeline(self) -> tuple[Any, dict[str, Any]]:
        pipe = QwenImage21Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler(),
            vae=None,
            text_encoder=None,
            processor=Processor(),
            transformer=self.model().eval(),
        )
        embeds = torch.randn(2, 1, 10, 16)
        return pipe, {
            "prompt_embeds": embeds[0],
            "negative_prompt_embeds": embeds[1],
            "true_cfg_scale": 3.0,
            "use_kv_cache": self.use_kv_cache,
            **SIZE,
        }


class TestQwenImage21FirstStep(TestQwenImage21):
    """The first step stores the keys of the text, and later ones attend to them."""

    use_kv_cache = True

    def inputs(self) -> dict[str, Any]:
        return {**super().inputs(), "kv_cache": cache_of()(2), "kv_cache_mode": "extract"}

    @pytest.mark.parametrize("settings", [{}, {"batched": True}, {"share_prefix": False}], ids=str)
    def test_a_perturbed_pass_writes_no_keys_of_the_pipeline(self, settings: dict[str, Any]) -> None:
        pipe, request = self.made()
        stock = self.stored_keys(pipe, request)
        dit_attn.enable(pipe, dit_attn.SoftPAG(heads="0:0", u=1.0, scale=1.5, **settings))
        guided = self.stored_keys(pipe, request)
        assert len(stock) == len(guided) == 8
        assert all(map(torch.equal, stock, guided))

    def stored_keys(self, pipe: Any, request: dict[str, Any]) -> list[torch.Tensor]:
        """Keys and values of the caches that a run made."""
        caches: list[Any] = []
        init = cache_of().__init__

        def keep(cache: Any, layers: int) -> None:
            init(cache, layers)
            caches.append(cache)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache_of(), "__init__", keep)
            self._run(pipe, request, 2)
        return [x for cache in caches for layer in cache.layer_caches for x in layer.get()]


class TestQwenImage21LaterSteps(TestQwenImage21):
    """The keys of the text come from the cache."""

    no_pipeline = "TestQwenImage21FirstStep runs the pipeline"
    text_args = ()

    def inputs(self) -> dict[str, Any]:
        cache = cache_of()(2)
        for layer in cache.layer_caches:
            layer.store(*torch.randn(2, 2, 10, 2, 16))
        return {**super().inputs(), "kv_cache": cache, "kv_cache_mode": "cached"}


class TestQwenImage21Edit(TestQwenImage21):
    """An image is given between two pieces of text."""

    no_pipeline = "the pipeline shows given images to a vision-language model; its loop is the same"
    kinds = ("text", "condition", "text", "image")

    def inputs(self) -> dict[str, Any]:
        mask = torch.ones(2, 23, dtype=torch.bool)
        mask[1, 20:] = False
        places = [False] * 5 + [True] * 12 + [False] * 6 + [True] * (HEIGHT * WIDTH // 4)
        return {
            **super().inputs(),
            "hidden_states": torch.randn(2, 48 + HEIGHT * WIDTH, 16),
            "encoder_hidden_states": torch.randn(2, 23, 16),
            "encoder_hidden_states_mask": mask,
            "img_shapes": [[(1, 6, 8), (1, HEIGHT, WIDTH)]] * 2,
            "img_mask": torch.tensor([places] * 2),
        }

    def poke_token(self, inputs: dict[str, Any], at: tuple[int, int, int]) -> None:
        inputs["hidden_states"][:, 48 + at[1] * WIDTH + at[2]] += 1.0


def test_the_processor_of_flex_attention_is_seen_in_later_steps_and_counted_in_the_first() -> None:
    torch.manual_seed(0)
    case = TestQwenImage21FirstStep()
    pipe, request = case.made()
    for block in pipe.transformer.transformer_blocks:
        block.attn.set_processor(inner_class("transformer_qwenimage21.QwenImage21FlexAttnProcessor")())
    stock = case._run(pipe, request, 2)
    dit_attn.enable(pipe)
    assert same(stock.output, case._run(pipe, request, 2).output)
    dit_attn.enable(pipe, SPARSE)
    case._run(pipe, request, 2)
    summary = dit_attn.summary(pipe)
    assert (summary.calls, summary.sparse_calls) == (8, 4)
    assert summary.fallbacks == {"BlockMask attention mask": 4}
