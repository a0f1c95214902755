"""Our guidance on a stock pipeline against diffusers' own PAG pipeline: same weights, seeds and scale, whole runs."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import diffusers
import pytest
import torch

import dit_attn
from tests.families.test_hunyuan_dit import TestHunyuanDiT as HunyuanDiTCase
from tests.families.test_pixart import TestPixArt as PixArtCase
from tests.families.test_sd3 import TestSD3 as SD3Case

# (family, PAG pipeline, its layer, the same layer for us, what diffusers' processors of this family make of the map)
PIPELINES = {
    "sd3": (SD3Case, diffusers.StableDiffusion3PAGPipeline, "blocks.1", "transformer_blocks.1", "ii-logit-mask"),
    "pixart": (PixArtCase, diffusers.PixArtSigmaPAGPipeline, "blocks.1", "transformer_blocks.1", "joint"),
    "hunyuan-dit": (HunyuanDiTCase, diffusers.HunyuanDiTPAGPipeline, "blocks.1", "blocks.1", "joint"),
}
SCALE = 1.7
# HunyuanDiTPAGPipeline raises without CFG in diffusers 0.42: it always repeats the size conditions for three branches.
RUNS = [("sd3", 1.0), ("sd3", 3.0), ("pixart", 1.0), ("pixart", 3.0), ("hunyuan-dit", 3.0)]


def latents(pipe: Any, kwargs: dict[str, Any], **more: Any) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "output_type": "latent", "return_dict": False, **more}
    with torch.no_grad():
        return pipe(**copy.deepcopy(kwargs), generator=torch.Generator().manual_seed(0), **settings)[0]


def both(case: Any, kind: Any, layer: str, cfg: float) -> tuple[Any, Any, dict[str, Any]]:
    """A stock pipeline, diffusers' PAG pipeline over the same modules, and the arguments of a call."""
    torch.manual_seed(0)
    pipe, kwargs = case().pipeline()
    for parameter in pipe.transformer.parameters():  # zero-initialised gates would hide the attention
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    taken = inspect.signature(kind.__init__).parameters
    parts = {name: copy.deepcopy(part) for name, part in pipe.components.items() if name in taken}
    extra = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    return pipe, kind(**parts, pag_applied_layers=[layer], **extra), {**kwargs, "guidance_scale": cfg}


@pytest.mark.parametrize(("name", "cfg"), RUNS)
def test_all_heads_of_a_layer_make_what_the_pag_pipeline_makes(name: str, cfg: float) -> None:
    case, kind, theirs, ours, joint = PIPELINES[name]
    pipe, pag, kwargs = both(case, kind, theirs, cfg)
    stock = latents(pipe, kwargs)
    assert torch.equal(stock, latents(pag, kwargs, pag_scale=0.0))
    expected = latents(pag, kwargs, pag_scale=SCALE)
    dit_attn.enable(pipe, dit_attn.SoftPAG(heads=ours, scale=SCALE, joint=joint))
    found = latents(pipe, kwargs)
    away = (expected - stock).abs().max()
    assert away > 1e-3  # the guidance does something
    assert (found - expected).abs().max() < 1e-3 * away + 1e-5
    dit_attn.disable(pipe)
    assert torch.equal(latents(pipe, kwargs), stock)


@pytest.mark.parametrize("joint", ["joint", "image-rows", "ii-mass-to-diagonal"])
def test_other_conventions_are_not_that_of_the_sd3_pag_pipeline(joint: str) -> None:
    case, kind, theirs, ours, _ = PIPELINES["sd3"]
    pipe, pag, kwargs = both(case, kind, theirs, 3.0)
    expected = latents(pag, kwargs, pag_scale=SCALE)
    away = (expected - latents(pipe, kwargs)).abs().max()
    dit_attn.enable(pipe, dit_attn.SoftPAG(heads=ours, scale=SCALE, joint=joint))
    assert (latents(pipe, kwargs) - expected).abs().max() > 1e-2 * away


def test_skipped_layers_make_what_the_sd3_pipeline_makes() -> None:
    pipe, _, kwargs = both(SD3Case, PIPELINES["sd3"][1], "blocks.1", 3.0)
    window = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 0.6}  # step 1 of 3
    expected = latents(pipe, kwargs, skip_guidance_layers=[1], skip_layer_guidance_scale=SCALE, **window)
    stock = latents(pipe, kwargs)
    dit_attn.enable(pipe, dit_attn.SLG(layers="1", scale=SCALE, start=0.3, stop=0.6))
    found = latents(pipe, kwargs)
    away = (expected - stock).abs().max()
    assert away > 1e-3 and (found - expected).abs().max() < 1e-3 * away + 1e-5


def test_the_layers_differ() -> None:
    """The comparison above could tell a wrong layer."""
    pipe, pag, kwargs = both(SD3Case, PIPELINES["sd3"][1], "blocks.1", 3.0)
    expected = latents(pag, kwargs, pag_scale=SCALE)
    dit_attn.enable(pipe, dit_attn.SoftPAG(heads="transformer_blocks.0", scale=SCALE, joint="ii-logit-mask"))
    assert (latents(pipe, kwargs) - expected).abs().max() > 1e-2 * expected.abs().max()
