"""What the composition tests share: tiny models, their inputs, and whole pipeline runs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import dit_attn
from tests._support.family_mixin import SPARSE, FamilyMixin
from tests._support.outputs import same

__all__ = ["SPARSE", "WARM", "case", "forward", "pipeline_run", "requires", "same", "tiny", "tiny_pipeline"]

# Another density, and a dense first step: a different method, a different decision at another step.
WARM = dit_attn.BlockSparse(density=0.25, q_block=32, kv_block=32, dense_steps=1)

_CASES = {
    "wan": ("test_wan", "TestWan"),
    "vace": ("test_wan", "TestWanVace"),
    "ltx": ("test_ltx_video", "TestLtxVideo"),
    "flux": ("test_flux", "TestFlux"),
    "pixart": ("test_pixart", "TestPixArt"),
    "cogview4": ("test_cogview_4", "TestCogView4"),
    "easyanimate": ("test_easyanimate", "TestEasyAnimate"),
    "sd3": ("test_sd3", "TestSD3"),
    "cosmos25": ("test_cosmos", "TestCosmosPredict25"),
    "cogvideox": ("test_cogvideox", "TestCogVideoX5b"),
}


def case(name: str) -> FamilyMixin:
    """The family test case that knows how to make a tiny model and its inputs."""
    module, cls = _CASES[name]
    return getattr(pytest.importorskip(f"tests.families.{module}"), cls)()


def tiny(name: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    """A tiny random transformer without zero gates, and the arguments of one forward call."""
    torch.manual_seed(0)
    model = case(name).model().eval()
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    torch.manual_seed(1)
    return model, case(name).inputs()


def forward(model: Any, args: dict[str, Any], **changes: Any) -> torch.Tensor:
    """One forward call without gradients."""
    with torch.no_grad():
        return model(**copy.deepcopy({**args, **changes}), return_dict=False)[0]


def tiny_pipeline(name: str) -> tuple[Any, dict[str, Any]]:
    """A stock pipeline around a tiny transformer, and its call arguments."""
    torch.manual_seed(0)
    made = case(name).pipeline()
    assert made is not None
    pipe, kwargs = made
    pipe.set_progress_bar_config(disable=True)
    return pipe, kwargs


def pipeline_run(pipe: Any, kwargs: dict[str, Any], steps: int = 3, seed: int = 0) -> torch.Tensor:
    """Latents of one whole run."""
    return pipe(
        **copy.deepcopy(kwargs),
        num_inference_steps=steps,
        generator=torch.Generator().manual_seed(seed),
        output_type="latent",
        return_dict=False,
    )[0]


def requires(name: str) -> Any:
    """A class of ``diffusers``; the test is skipped where this version has none."""
    diffusers = pytest.importorskip("diffusers")
    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return getattr(diffusers, name)
