"""Imports that the workers of the tests make before their first job; see :mod:`tests._support.forked_workers`."""

from __future__ import annotations

from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    WanPipeline,
    WanTransformer3DModel,
)
from transformers import PreTrainedTokenizerFast, T5EncoderModel

from dit_attn import models
from dit_attn.cli import main

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLWan",
    "DPMSolverMultistepScheduler",
    "FlowMatchEulerDiscreteScheduler",
    "PixArtSigmaPipeline",
    "PixArtTransformer2DModel",
    "PreTrainedTokenizerFast",
    "T5EncoderModel",
    "WanPipeline",
    "WanTransformer3DModel",
    "main",
    "models",
]
