"""HighResolution: its two stages, on the embedded models at small sizes, and what it refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dit_attn
from dit_attn import DitAttnError, models
from dit_attn.pipelines import HighResolution
from dit_attn.pipelines.high_resolution import NativePass
from dit_attn.pipelines.high_resolution.latents import encode, enlarged, form_of

SIZES = {"tiny-image": (32, 64), "tiny-joint": (32, 64), "tiny-video": (16, 32)}
PROMPT = "a large red circle at the left on white"


def made(name: str, steps: int = 6) -> tuple[Any, dict[str, Any]]:
    pipe = models.load(name)
    pipe.set_progress_bar_config(disable=True)
    native, size = SIZES[name]
    call = {**models.call_defaults(name), "num_inference_steps": steps, "height": size, "width": size}
    call |= {"native": (native, native), "output_type": "np", "generator": torch.Generator().manual_seed(1)}
    return pipe, {**call, **({"num_frames": 4} if form_of(pipe).video else {})}


def pixels(output: Any) -> np.ndarray:
    return np.asarray(output.frames if hasattr(output, "frames") else output.images)


class Inputs:
    """What the transformer of a pipeline gets, call by call."""

    def __init__(self, pipe: Any) -> None:
        self.latents: list[torch.Tensor] = []
        pipe.transformer.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, module: Any, args: Any, kwargs: Any) -> None:
        self.latents.append((args[0] if args else kwargs["hidden_states"]).detach().clone())


@pytest.mark.parametrize("name", SIZES)
def test_the_second_stage_begins_with_the_enlarged_native_picture_noised_to_sigma(name: str) -> None:
    pipe, call = made(name)
    seen = Inputs(pipe)
    result = HighResolution(pipe, None, sigma=0.6)(PROMPT, **call)
    native, size = SIZES[name]
    large = [x for x in seen.latents if x.shape[-1] != seen.latents[0].shape[-1]]
    assert len(seen.latents) - len(large) >= 6 and len(large) in (result.steps, 2 * result.steps)
    assert 0.0 < result.sigma <= 0.6 and result.native.shape[-2:] == (native, native)
    clean = encode(pipe, enlarged(result.native, size, size, "bicubic"))
    noise = (large[0][-1:] - (1 - result.sigma) * clean) / result.sigma
    assert abs(float(noise.mean())) < 0.1 and abs(float(noise.std()) - 1) < 0.1
    assert pixels(result.output).shape[-3:] == (size, size, 3)


@pytest.mark.parametrize("name", SIZES)
def test_noise_alone_is_the_stock_run_at_the_large_size(name: str) -> None:
    pipe, call = made(name)
    seen = Inputs(pipe)
    result = HighResolution(pipe, None, sigma=1.0)(PROMPT, **call)
    start = next(x for x in seen.latents if x.shape[-1] != seen.latents[0].shape[-1])
    call.pop("native")
    stock = pipe(PROMPT, **{**call, "latents": start[-1:]})
    assert result.steps == 6 and np.array_equal(pixels(stock), pixels(result.output))


def test_the_same_generator_gives_the_same_picture_and_the_pipeline_is_given_back() -> None:
    pipe, call = made("tiny-image")
    processors, scheduler = dict(pipe.transformer.attn_processors), pipe.scheduler
    outputs = []
    for _ in range(2):
        call["generator"] = torch.Generator().manual_seed(3)
        outputs.append(pixels(HighResolution(pipe)(PROMPT, **call).output))
    assert np.array_equal(*outputs)
    assert pipe.transformer.attn_processors == processors and pipe.scheduler is scheduler
    assert "set_timesteps" not in vars(scheduler)


def test_windows_of_the_native_size_are_used_in_the_second_stage_alone() -> None:
    pipe, call = made("tiny-image")
    windowed = HighResolution(pipe)(PROMPT, **call)
    call["generator"] = torch.Generator().manual_seed(1)
    with dit_attn.enabled(pipe, dit_attn.InwardWindow(native=(8, 8))):
        both = HighResolution(pipe, None)(PROMPT, **call)
        assert dit_attn.summary(pipe).sparse_calls > 0
    call["generator"] = torch.Generator().manual_seed(1)
    dense = HighResolution(pipe, None)(PROMPT, **call)
    assert torch.equal(windowed.native, dense.native)
    assert np.array_equal(pixels(windowed.output), pixels(both.output))
    assert not np.array_equal(pixels(windowed.output), pixels(dense.output))


@pytest.mark.parametrize("name", SIZES)
def test_clips_have_less_noise_and_with_more_of_it_positions_interpolated(name: str) -> None:
    pipe, video = models.load(name), name == "tiny-video"
    assert HighResolution(pipe).sigma == (0.4 if video else 0.5)
    assert [one.to_dict()["rotary"] for one in HighResolution(pipe).methods((32, 32))] == ["plain"]
    make = HighResolution(pipe, sigma=0.5)
    (window,) = make.methods((32, 32))
    assert isinstance(window, dit_attn.InwardWindow) and window.native == make.tokens((32, 32))
    assert window.rotary == ("interpolated" if video else "plain")
    make.pipe.transformer.register_to_config(use_rotary_positional_embeddings=False)  # as CogVideoX 2B
    assert [one.to_dict()["rotary"] for one in make.methods((32, 32))] == ["plain"]


@pytest.mark.parametrize("space", ["pixel", "latent"])
def test_it_goes_on_from_a_saved_native_pass_bit_for_bit(space: str, tmp_path: Path) -> None:
    pipe, call = made("tiny-joint")
    make, stages = HighResolution(pipe, space=space), []
    full = make(PROMPT, **call, on_stage=stages.append)
    encoded = ["encode"] if space == "pixel" else []
    assert stages == list(full.seconds) == ["native pass", "upscale", *encoded, "denoise", "decode"]
    first = NativePass.load(full.first.save(tmp_path / "native.safetensors"))
    assert first.schedule.to_dict() == full.first.schedule.to_dict() and torch.equal(first.values, full.first.values)
    seen = Inputs(pipe)
    call["generator"] = torch.Generator().manual_seed(8)  # its state is that after the native pass
    again = make(PROMPT, **call, first=first)
    assert np.array_equal(pixels(again.output), pixels(full.output)) and "native pass" not in again.seconds
    assert {x.shape[-1] for x in seen.latents} == {full.native.shape[-1] * 2 if space == "latent" else 64}
    (tmp_path / "native.safetensors").write_bytes(b"cut short")
    with pytest.raises(DitAttnError, match="cannot be read"):
        NativePass.load(tmp_path / "native.safetensors")


def test_tiles_are_for_the_second_stage_alone() -> None:
    pipe, call = made("tiny-image", steps=2)
    asked = []
    pipe.vae.enable_tiling = lambda: asked.append(setattr(pipe.vae, "use_tiling", True))
    HighResolution(pipe, None, sigma=1.0, tiling=True)(PROMPT, **call)
    assert asked == [None] and not pipe.vae.use_tiling


def test_several_prompts_are_as_single_ones() -> None:
    pipe, call = made("tiny-image", steps=3)
    prompts = [PROMPT, "a small blue square at the top on black"]
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    both = HighResolution(pipe, sigma=0.7)(prompts, **{**call, "generator": generators})
    for row, (prompt, seed) in enumerate(zip(prompts, (5, 6))):
        alone = HighResolution(pipe, sigma=0.7)(prompt, **{**call, "generator": [torch.Generator().manual_seed(seed)]})
        np.testing.assert_allclose(both.images[row], alone.images[0], atol=2e-4)


def test_the_native_size_is_the_default_of_the_pipeline() -> None:
    assert HighResolution(models.load("tiny-image")).default_size() == (128, 128)
    assert HighResolution(models.load("tiny-joint")).default_size() == (128, 128)
    assert HighResolution(models.load("tiny-video")).default_size() == (480, 832)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"height": 16}, "height must be at least the native 32 pixels, got 16"),
        ({"width": 66}, "width must be a multiple of 4 pixels, the side of a token, got 66; the nearest is 64"),
        ({"num_inference_steps": 0}, "num_inference_steps must be a whole number of at least 1, got 0"),
        ({"native": (30, 32)}, "the native height must be a multiple of 4 pixels, the side of a token, got 30"),
    ],
)
def test_sizes_that_do_not_fit_are_refused_before_anything_runs(changes: Any, message: str) -> None:
    pipe, call = made("tiny-image")
    seen = Inputs(pipe)
    with pytest.raises(DitAttnError, match=message):
        HighResolution(pipe)(PROMPT, **{**call, **changes})
    assert not seen.latents


@pytest.mark.parametrize(
    "given, message",
    [
        ({"sigma": 0.0}, "sigma must be above 0 and at most 1, got 0.0"),
        ({"upscale": "bicubics"}, "unknown filter 'bicubics'"),
    ],
)
def test_settings_out_of_range_are_refused(given: Any, message: str) -> None:
    with pytest.raises(DitAttnError, match=message):
        HighResolution(models.load("tiny-image"), **given)
