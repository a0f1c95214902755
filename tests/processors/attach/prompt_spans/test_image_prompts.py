"""Prompts that a vision-language model encodes together with an image."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    HunyuanVideoImageToVideoPipeline,
    QwenImageEditPipeline,
)
from PIL import Image

import dit_attn
from dit_attn.errors import DitAttnError
from dit_attn.processors.core.call import AttentionCall
from tests._support import tiny_tokenizers as kinds
from tests._support.word_encoder import WordEncoder
from tests.families import test_qwen_image

PIECE, SWAPPED = "red cube", "cube red"


class ImageProcessor:
    """Writes an image token for every 8 x 8 pixels, as processors of vision-language models do."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], images: Any = None, **options: Any) -> Any:
        width, height = (images[0] if isinstance(images, list) else images).size
        count = (width // 8) * (height // 8)
        return self.tokenizer([one.replace("<|image_pad|>", "<|image_pad|>" * count) for one in text], **options)


@pytest.fixture
def pipe(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Qwen-Image-Edit that scales its image to a size for a test in the place of a million pixels."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as stock

    monkeypatch.setattr(stock, "calculate_dimensions", lambda area, ratio: (48, 32, None))
    tokenizer = kinds.qwen()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|image_pad|>"]})
    vae = AutoencoderKLQwenImage(
        base_dim=24,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    made = QwenImageEditPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=WordEncoder(16),
        tokenizer=tokenizer,
        processor=ImageProcessor(tokenizer),
        transformer=test_qwen_image.TestQwenImage().model().eval(),
    )
    made.set_progress_bar_config(disable=True)
    return made


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
