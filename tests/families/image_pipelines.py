"""Stock image pipelines around a tiny random transformer; prompt embeddings are random and runs stop at the latents."""

from __future__ import annotations

from typing import Any

import diffusers
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from packaging.version import Version

Made = tuple[Any, dict[str, Any]]


def cogview4(model: torch.nn.Module, size: dict[str, int]) -> Made:
    """CogView4, one transformer call per branch."""
    pipe = diffusers.CogView4Pipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    embeds = torch.randn(2, 1, 9, 16)
    return pipe, {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], "guidance_scale": 3.0, **size}


def chroma(model: torch.nn.Module, size: dict[str, int]) -> Made:
    """Chroma, one transformer call per branch; the negative prompt is the shorter one."""
    pipe = diffusers.ChromaPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=model,
    )
    embeds, masks = torch.randn(2, 1, 10, 32), torch.ones(2, 1, 10, dtype=torch.bool)
    masks[1, :, 6:] = False
    return pipe, {
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": embeds[1],
        "prompt_attention_mask": masks[0],
        "negative_prompt_attention_mask": masks[1],
        "guidance_scale": 3.0,
        **size,
    }


def auraflow(model: torch.nn.Module, size: dict[str, int]) -> Made:
    """AuraFlow, both branches in one batch."""
    pipe = diffusers.AuraFlowPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    embeds, mask = torch.randn(2, 1, 9, 16), torch.ones(1, 9)
    return pipe, {
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": embeds[1],
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
        "guidance_scale": 3.0,
        **size,
    }


def qwen_image(model: torch.nn.Module, size: dict[str, int]) -> Made:
    """Qwen-Image, one transformer call per branch; the negative prompt is the shorter one."""
    pipe = diffusers.QwenImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=model,
    )
    embeds, masks = torch.randn(2, 1, 10, 16), torch.ones(2, 1, 10, dtype=torch.long)
    masks[1, :, 6:] = 0
    negative, negative_mask = embeds[1], masks[1]
    if Version(diffusers.__version__) < Version("0.37"):  # takes its rotary table from the mask's sum
        negative, negative_mask = negative[:, :6], negative_mask[:, :6]
    return pipe, {
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": negative,
        "prompt_embeds_mask": masks[0],
        "negative_prompt_embeds_mask": negative_mask,
        "true_cfg_scale": 3.0,
        **size,
    }


def hunyuan_dit(model: torch.nn.Module, size: dict[str, int]) -> Made:
    """HunyuanDiT with its two text encoders, both branches in one batch."""
    pipe = diffusers.HunyuanDiTPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=model,
        scheduler=diffusers.DDPMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
        text_encoder_2=None,
        tokenizer_2=None,
    )
    embeds, mask = torch.randn(4, 1, 4, 16), torch.ones(1, 4)
    return pipe, {
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": embeds[1],
        "prompt_embeds_2": embeds[2],
        "negative_prompt_embeds_2": embeds[3],
        "prompt_attention_mask": mask,
        "negative_prompt_attention_mask": mask,
        "prompt_attention_mask_2": mask,
        "negative_prompt_attention_mask_2": mask,
        "guidance_scale": 3.0,
        "use_resolution_binning": False,
        **size,
    }


def flux2(model: torch.nn.Module, size: dict[str, int]) -> Made:
    """Flux.2 dev: guidance is an input of the model, so there is one branch."""
    pipe = diffusers.Flux2Pipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=model,
    )
    return pipe, {"prompt_embeds": torch.randn(1, 10, 32), "guidance_scale": 3.0, **size}


def _vae(kind: str, channels: int = 1) -> Any:
    """A random autoencoder for pipelines that read its statistics or dtype even when a run stops at the latents."""
    return getattr(diffusers, kind)(
        block_out_channels=(4,) * 4,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        latent_channels=channels,
        norm_num_groups=1,
        layers_per_block=1,
    )


def flux2_klein(model: torch.nn.Module, size: dict[str, int]) -> Made | None:
    """Flux.2 klein, one transformer call per branch; ``None`` in a diffusers without it."""
    if not hasattr(diffusers, "Flux2KleinPipeline"):
        return None
    pipe = diffusers.Flux2KleinPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae("AutoencoderKLFlux2"),
        text_encoder=None,
        tokenizer=None,
        transformer=model,
    )
    embeds = torch.randn(2, 1, 10, 32)
    return pipe, {"prompt_embeds": embeds[0], "negative_prompt_embeds": embeds[1], "guidance_scale": 3.0, **size}


def z_image(model: torch.nn.Module, size: dict[str, int]) -> Made:
    """Z-Image, both branches in one list, the prompt first."""
    pipe = diffusers.ZImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=model,
    )
    embeds = torch.randn(2, 9, 16)
    return pipe, {"prompt_embeds": [embeds[0]], "negative_prompt_embeds": [embeds[1]], "guidance_scale": 3.0, **size}


def hunyuan_image(model: torch.nn.Module, size: dict[str, int]) -> Made:
    """HunyuanImage 2.1 under its guider, one transformer call per branch."""
    from diffusers.guiders import ClassifierFreeGuidance

    pipe = diffusers.HunyuanImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=model,
        guider=ClassifierFreeGuidance(guidance_scale=3.0),
    )
    embeds, mask = torch.randn(4, 1, 9, 16), torch.ones(1, 9, dtype=torch.long)
    return pipe, {
        "prompt_embeds": embeds[0],
        "negative_prompt_embeds": embeds[1],
        "prompt_embeds_2": embeds[2],
        "negative_prompt_embeds_2": embeds[3],
        "prompt_embeds_mask": mask,
        "negative_prompt_embeds_mask": mask,
        "prompt_embeds_mask_2": mask,
        "negative_prompt_embeds_mask_2": mask,
        **size,
    }


def hidream(model: torch.nn.Module, size: dict[str, int]) -> Made:
    """HiDream-I1 with its two text streams and pooled vector, both branches in one batch."""
    parts = dict.fromkeys([f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3", "_4")])
    pipe = diffusers.HiDreamImagePipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(), vae=None, transformer=model, **parts
    )
    pipe.default_sample_size = 36  # it scales every picture to this area
    t5, llama, pooled = torch.randn(2, 1, 5, 8), torch.randn(2, 1, 1, 5, 8), torch.randn(2, 1, 16)
    return pipe, {
        "prompt_embeds_t5": t5[0],
        "negative_prompt_embeds_t5": t5[1],
        "prompt_embeds_llama3": llama[0],
        "negative_prompt_embeds_llama3": llama[1],
        "pooled_prompt_embeds": pooled[0],
        "negative_pooled_prompt_embeds": pooled[1],
        "guidance_scale": 3.0,
        **size,
    }


def omnigen(model: torch.nn.Module, size: dict[str, int]) -> Made:
    """OmniGen with a word tokenizer, both branches in one batch, the prompt first."""
    from diffusers.utils import is_torchvision_available
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if not is_torchvision_available():
        pytest.skip("the pipeline of OmniGen reads images with torchvision, which is not installed")
    words = Tokenizer(models.WordLevel({"[pad]": 0, "[unk]": 1, "a": 2, "red": 3, "square": 4}, unk_token="[unk]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    pipe = diffusers.OmniGenPipeline(
        transformer=model,
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1),
        vae=_vae("AutoencoderKL", 4),
        tokenizer=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="[pad]", unk_token="[unk]"),
    )
    return pipe, {"prompt": "a red square", "guidance_scale": 3.0, **size}
