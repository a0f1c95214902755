"""HighResolution on tiny random models of every kind of pipeline: the whole flow, and the form of its latents."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLQwenImage, UniPCMultistepScheduler, WanPipeline

from dit_attn.pipelines import HighResolution
from dit_attn.pipelines.high_resolution.latents import encode, form_of, pixels_per_token
from tests._support.family_cases import tiny_vae
from tests._support.pipeline_runs import fill
from tests.families.test_cogvideox import TestCogVideoX5b as CogVideoX
from tests.families.test_flux import TestFlux as Flux
from tests.families.test_hunyuan_video import TestHunyuanVideo as HunyuanVideo
from tests.families.test_ltx_video import TestLtxVideo as LtxVideo
from tests.families.test_qwen_image import TestQwenImage as QwenImage
from tests.families.test_wan import TestWan as Wan

CASES: dict[str, Any] = {
    "wan": Wan, "wan-2.2": Wan, "hunyuan-video": HunyuanVideo, "cogvideox": CogVideoX, "ltx": LtxVideo, "flux": Flux,
    "qwen-image": QwenImage,
}  # fmt: skip
FRAMES = {"ltx": 9, "cogvideox": 9}  # of the others 5


def pipeline(name: str) -> tuple[Any, dict[str, Any]]:
    """A pipeline with random weights, and the arguments of a call at 4 x 4 tokens."""
    torch.manual_seed(0)
    pipe, kwargs = CASES[name]().pipeline()
    if name.startswith("wan"):
        pipe.scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    if name == "wan-2.2":
        second = copy.deepcopy(fill(pipe.transformer))
        pipe = WanPipeline(**{**pipe.components, "transformer_2": second}, boundary_ratio=0.5)
    if name == "qwen-image":
        vae = AutoencoderKLQwenImage(
            base_dim=3, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True, True],
            latents_mean=[0.1, 0.2, 0.3, 0.4], latents_std=[1.0, 2.0, 3.0, 4.0],
        )  # fmt: skip
        pipe = type(pipe)(**{**pipe.components, "vae": vae})
    if name == "flux":
        pipe.vae = tiny_vae(1)
        pipe.vae.register_to_config(shift_factor=0.1, scaling_factor=0.4)
    pipe.vae.eval()
    fill(pipe.transformer)
    pipe.set_progress_bar_config(disable=True)
    side = 4 * pixels_per_token(pipe)
    kwargs |= {"native": (side, side), "num_inference_steps": 3, "output_type": "np", "height": 2 * side}
    kwargs |= {"width": 2 * side, "generator": torch.Generator().manual_seed(1)}
    return pipe, {**kwargs, **({"num_frames": FRAMES.get(name, 5)} if form_of(pipe).video else {})}


def pixels(output: Any) -> np.ndarray:
    return np.asarray(output.frames if hasattr(output, "frames") else output.images)


@pytest.mark.parametrize("name", CASES)
def test_the_whole_flow_runs_in_windows(name: str) -> None:
    pipe, call = pipeline(name)
    side = call["height"]
    result = HighResolution(pipe, sigma=0.9)(**call)
    assert pixels(result.output).shape[-3:] == (side, side, 3) and np.isfinite(pixels(result.output)).all()
    assert result.native.shape[-2:] == call["native"]
    assert result.summary is not None and result.summary.sparse_calls > 0 and 0 < result.steps < 4
    if name not in ("flux", "ltx", "wan"):
        return
    latent = HighResolution(pipe, None, sigma=0.9, space="latent")
    enlarged = latent(**{**call, "generator": torch.Generator().manual_seed(1)})
    assert pixels(enlarged.output).shape[-3:] == (side, side, 3) and enlarged.native.shape[1] != 3


@pytest.mark.parametrize("name", CASES)
def test_latents_are_those_that_the_pipeline_decodes(name: str) -> None:
    pipe, call = pipeline(name)
    side = call.pop("native")[0]
    shape = (1, 3, FRAMES.get(name, 5), side, side) if form_of(pipe).video else (1, 3, side, side)
    picture = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    latents = encode(pipe, picture)
    packed = form_of(pipe).pack(pipe, latents)
    assert torch.equal(form_of(pipe).unpack(pipe, packed, 4, 4), latents)
    seen: list[torch.Tensor] = []

    def stop() -> None:
        raise RuntimeError

    pipe.scheduler.step = lambda out, t, sample, *args, **kwargs: (sample,)  # nothing is denoised
    pipe.vae.decode = lambda raw, *args, **kwargs: seen.append(raw) or stop()
    with pytest.raises(RuntimeError):
        pipe(**{**call, "height": side, "width": side, "latents": packed, "num_inference_steps": 1})
    values = 2 * picture - 1
    mode = pipe.vae.encode(values[:, :, None] if form_of(pipe).single_frame else values).latent_dist.mode()
    torch.testing.assert_close(seen[0], mode, atol=1e-5, rtol=1e-4)
