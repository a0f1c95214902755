"""Prompts that a vision-language model encodes together with an image."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import HunyuanVideoImageToVideoPipeline
from PIL import Image

import dit_attn
from dit_attn.errors import DitAttnError
from dit_attn.processors.core.call import AttentionCall
from tests._support import tiny_tokenizers as kinds
from tests._support.edit_pipelines import qwen_edit
from tests._support.word_encoder import WordEncoder

PIECE, SWAPPED = "red cube", "cube red"


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    return qwen_edit(monkeypatch)


def run(pipe: Any, prompt: str, piece: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys of the first attention call, and which are of the piece."""
    seen: list[tuple[torch.Tensor, torch.Tensor]] = []

    def observe(call: AttentionCall, request: Any, out: torch.Tensor) -> None:
        if not seen:
            seen.append((call.k, call.prompt_tokens(piece)))

    with dit_attn.observing(pipe, observe):
        pipe(
            image=Image.new("RGB", (96, 64), "blue"),
            prompt=prompt,
            num_inference_steps=1,
            output_type="latent",
            height=64,
            width=64,
            true_cfg_scale=1.0,
            generator=torch.Generator().manual_seed(0),
        )
    return seen[0]


def test_image_tokens_before_a_prompt_move_its_pieces(pipe: Any) -> None:
    keys, found = run(pipe, f"a house and a {PIECE}", PIECE)
    other, _ = run(pipe, f"a house and a {SWAPPED}", SWAPPED)
    assert torch.equal(found, (keys != other).flatten(2).any(-1)) and found.sum() == 2


def test_spans_before_a_run_are_refused_in_one_line(pipe: Any) -> None:
    with pytest.raises(DitAttnError, match="known in a run only") as error:
        dit_attn.spans(pipe, "a red cube", "red", image=Image.new("RGB", (96, 64)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("condition", "interleave"), [("latent_concat", 2), ("token_replace", 4)])
def test_image_tokens_inside_of_a_template_move_its_pieces(condition: str, interleave: int) -> None:
    """HunyuanVideo puts hundreds of image tokens into its template, crops around them and keeps the prompt."""
    from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video_image2video import DEFAULT_PROMPT_TEMPLATE

    tokenizer = kinds.llama3(length=2000)
    special = ["<image>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    encoder = WordEncoder(16, 4)
    encoder.config.image_token_index = tokenizer.convert_tokens_to_ids("<image>")
    encoder.config.pad_token_id = tokenizer.pad_token_id
    pipe = object.__new__(HunyuanVideoImageToVideoPipeline)
    pixels = SimpleNamespace(pixel_values=torch.zeros(1, 3, 4, 4))
    parts = {"tokenizer": tokenizer, "text_encoder": encoder, "image_processor": lambda *_, **__: pixels}
    parts |= {"tokenizer_2": kinds.clip(), "text_encoder_2": WordEncoder(16)}
    parts |= {"transformer": SimpleNamespace(config=SimpleNamespace(image_condition_type=condition))}
    pipe.__dict__.update(parts, _internal_dict=SimpleNamespace(**parts))
    start = tokenizer(DEFAULT_PROMPT_TEMPLATE["template"]).input_ids.index(encoder.config.image_token_index)
    places = {"image_emb_start": start, "image_emb_end": start + 576}
    options = {"max_sequence_length": 256, "prompt_template": {**DEFAULT_PROMPT_TEMPLATE, **places}}

    rows = [
        pipe.encode_prompt(image=None, prompt=text, device="cpu", image_embed_interleave=interleave, **options)[0]
        for text in (f"a house and a {PIECE}", f"a house and a {SWAPPED}")
    ]
    changed = (rows[0] != rows[1]).any(-1)[0].nonzero().flatten().tolist()
    (span,) = dit_attn.spans(pipe, f"a house and a {PIECE}", PIECE, **options)
    assert list(span.positions) == changed and len(changed) == 2
