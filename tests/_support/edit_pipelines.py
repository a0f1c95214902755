"""Stock editing pipelines around tiny random transformers: Flux Kontext, Qwen-Image-Edit and OmniGen."""

from __future__ import annotations

from typing import Any

import pytest
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImageEditPipeline,
    QwenImageEditPlusPipeline,
)
from PIL import Image

from tests._support import tiny_tokenizers as kinds
from tests._support.prompted_pipelines import pipeline_of
from tests._support.word_encoder import WordEncoder
from tests.families import test_qwen_image
from tests.processors.attach.prompt_spans.prompted_cases import CASES

IMAGE = Image.linear_gradient("L").resize((96, 64)).convert("RGB")


class ImageProcessor:
    """Writes an image token for every 8 x 8 pixels, as processors of vision-language models do."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def __call__(self, text: list[str], images: Any = None, **options: Any) -> Any:
        width, height = (images[0] if isinstance(images, list) else images).size
        count = (width // 8) * (height // 8)
        return self.tokenizer([one.replace("<|image_pad|>", "<|image_pad|>" * count) for one in text], **options)


def qwen_edit(monkeypatch: pytest.MonkeyPatch, plus: bool = False) -> Any:
    """Qwen-Image-Edit that scales its images to a size for a test in the place of a million pixels.

    Args:
        plus: the pipeline that takes several images.
    """
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit, pipeline_qwenimage_edit_plus

    stock = pipeline_qwenimage_edit_plus if plus else pipeline_qwenimage_edit
    monkeypatch.setattr(stock, "calculate_dimensions", lambda area, ratio: (48, 32) if plus else (48, 32, None))
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
    made = (QwenImageEditPlusPipeline if plus else QwenImageEditPipeline)(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=vae.eval(),
        text_encoder=WordEncoder(16),
        tokenizer=tokenizer,
        processor=ImageProcessor(tokenizer),
        transformer=test_qwen_image.TestQwenImage().model().eval(),
    )
    made.set_progress_bar_config(disable=True)
    return made


def editing(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[Any, dict[str, Any]]:
    """A pipeline and the arguments of a call without a prompt.

    Args:
        name: ``kontext``, ``qwen-image-edit``, ``qwen-image-edit-plus`` or ``omnigen``.
    """
    if name.startswith("qwen-image-edit"):
        plus = name.endswith("plus")
        return qwen_edit(monkeypatch, plus), {"image": IMAGE, "height": 64, "width": 64, "true_cfg_scale": 1.0}
    pipe, kwargs = pipeline_of(CASES[name])
    return pipe, kwargs if name == "kontext" else {**kwargs, "input_images": [IMAGE], "img_guidance_scale": 1.6}
