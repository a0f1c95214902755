"""Blocks and guiders of modular pipelines: a block that is saved and loaded offline, guidance by heads as a guider."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ClassifierFreeGuidance, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.modular_pipelines import ModularPipelineBlocks
from diffusers.modular_pipelines.wan.modular_blocks_wan import WanCoreDenoiseStep

import dit_attn
from dit_attn.errors import DitAttnError
from dit_attn.integrations.modular import EnableDitAttn, SoftPAGGuidance, save_block
from dit_attn.processors.attach.attach import session_of
from tests._support.wan import WAN, wan_vae

BLOCKS = dit_attn.BlockSparse(density=0.25, q_block=32, kv_block=32, dense_steps=0)


def pipeline(block: Any = None, guider: Any = None) -> Any:
    """Wan's denoising as a modular pipeline, with a block before it."""
    blocks = WanCoreDenoiseStep()
    if block is not None:
        blocks.sub_blocks.insert("dit_attn", block, len(blocks.sub_blocks) - 1)
    pipe = blocks.init_pipeline()
    torch.manual_seed(0)
    pipe.update_components(
        transformer=WanTransformer3DModel(**WAN).eval(),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        guider=guider or ClassifierFreeGuidance(guidance_scale=3.0),
        vae=wan_vae(),
    )
    return pipe


def conditions() -> dict[str, torch.Tensor]:
    """Noise of 256 tokens, and texts."""
    generator = torch.Generator().manual_seed(1)
    texts = torch.randn(2, 1, 8, WAN["text_dim"], generator=generator)
    noise = torch.randn(1, 4, 4, 16, 16, generator=generator)
    return {"prompt_embeds": texts[0], "negative_prompt_embeds": texts[1], "latents": noise}


def latents(pipe: Any, **inputs: Any) -> torch.Tensor:
    """Latents of a run of three steps."""
    size = {"height": 128, "width": 128, "num_frames": 13, "num_inference_steps": 3}
    return pipe(**conditions(), **size, output="latents", **inputs)


@pytest.fixture
def loaded(tmp_path: Path) -> Any:
    """The block, saved and loaded again."""
    return ModularPipelineBlocks.from_pretrained(str(save_block(tmp_path / "block")), trust_remote_code=True)


def test_the_block_is_saved_and_loaded_offline_and_enables_what_a_run_says(loaded: Any) -> None:
    stock = latents(pipeline())
    pipe = pipeline(loaded)
    assert torch.equal(latents(pipe, attention=dit_attn.BlockSparse(density=1.0)), stock)
    assert not torch.equal(latents(pipe, attention=BLOCKS), stock)
    summary = dit_attn.summary(pipe)
    assert summary.sparse_calls == 12 and summary.steps == 3  # 2 layers, 3 steps, 2 branches
    assert torch.equal(latents(pipe, attention="none"), stock)
    assert session_of(pipe.transformer) is None


def test_the_block_takes_several_methods_and_refuses_unknown_ones_in_one_line() -> None:
    pipe = pipeline(EnableDitAttn())
    latents(pipe, attention=[BLOCKS])
    assert dit_attn.summary(pipe).sparse_calls == 12
    with pytest.raises(DitAttnError, match="sparse-block") as caught:
        latents(pipe, attention="sparse-block")
    assert "\n" not in str(caught.value)
    pipe.update_components(transformer=None)
    with pytest.raises(DitAttnError, match="no transformer yet"):
        latents(pipe, attention="block-sparse")


def test_the_guider_without_perturbed_heads_is_classifier_free_guidance() -> None:
    stock = latents(pipeline())
    assert torch.allclose(latents(pipeline(guider=SoftPAGGuidance(3.0, scale=0.0))), stock, atol=1e-6)
    assert torch.allclose(latents(pipeline(guider=SoftPAGGuidance(3.0, u=0.0))), stock, atol=1e-5)


def test_the_guider_is_the_method_in_a_stock_pipeline() -> None:
    settings: dict[str, Any] = {"scale": 2.0, "heads": "1:0", "stop": 0.4}  # two of three steps
    pipe = pipeline(guider=SoftPAGGuidance(3.0, **settings))
    out = latents(pipe)
    assert session_of(pipe.transformer) is None  # nothing is left on the transformer
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    parts = {"tokenizer": None, "text_encoder": None, "vae": wan_vae(), "scheduler": scheduler}
    stock = WanPipeline(transformer=pipe.transformer, **parts)
    call = {"height": 64, "width": 64, "num_frames": 13, "num_inference_steps": 3, "guidance_scale": 3.0}
    with dit_attn.enabled(stock, dit_attn.SoftPAG(**settings)):
        expected = stock(**conditions(), **call, output_type="latent").frames
    assert torch.allclose(out, expected, atol=1e-5) and not torch.allclose(out, latents(pipeline()), atol=1e-3)


def test_the_guider_goes_with_a_sparse_method_and_keeps_its_settings(tmp_path: Path) -> None:
    guider = SoftPAGGuidance(3.0, scale=2.0, heads="1:0", target="uniform")
    guider.save_pretrained(str(tmp_path))
    again = SoftPAGGuidance.from_pretrained(str(tmp_path))
    assert again.method == guider.method and again.guidance_scale == 3.0
    pipe = pipeline(EnableDitAttn(), again)
    out = latents(pipe, attention=BLOCKS)
    summary = dit_attn.summary(pipe)
    assert torch.isfinite(out).all() and summary.sparse_calls == 18 and summary.source == "run_context"
    ended = pipeline(EnableDitAttn(), again.new(stop=0.4))
    latents(ended, attention=BLOCKS)
    assert (dit_attn.summary(ended).runs, dit_attn.summary(ended).sparse_calls) == (1, 16)  # still one run


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_in_the_transformer_does_not_spoil_the_next_run(error: type[BaseException]) -> None:
    pipe = pipeline(EnableDitAttn(), SoftPAGGuidance(3.0, scale=2.0, heads="1:0"))
    plain = latents(pipe, attention=BLOCKS)
    calls = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:  # the perturbed call of the first step
            raise error

    handle = pipe.transformer.blocks[0].register_forward_pre_hook(fail)
    with pytest.raises(error):
        latents(pipe, attention=BLOCKS)
    handle.remove()
    if error is RuntimeError:
        session = session_of(pipe.transformer)
        assert session is not None and session.perturbed is None and session.pass_name == "plain"
    assert torch.equal(latents(pipe, attention=BLOCKS), plain)


@pytest.mark.parametrize(("settings", "message"), [({"u": 2.0}, "softpag.u"), ({"heads": "1:"}, "cannot be parsed")])
def test_the_guider_refuses_bad_settings_in_one_line(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(DitAttnError, match=message):
        SoftPAGGuidance(**settings)
