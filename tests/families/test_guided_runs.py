"""Guidance over whole runs of stock pipelines: what fails leaves nothing behind, and any number of samples, schedulers
and windows come out as they should."""

from __future__ import annotations

import copy
import dataclasses
import inspect
from typing import Any

import diffusers
import pytest
import torch

import dit_attn
from dit_attn.processors.attach import attach
from dit_attn.processors.methods import methods
from dit_attn.processors.methods.perturbed_guidance import PerturbedGuidance
from dit_attn.processors.methods.sparse import SparseMethod
from tests._support.outputs import same, tensors
from tests._support.pipeline_runs import alone, hooks, real, run, two, without_cfg
from tests.families.test_allegro import TestAllegro as AllegroCase
from tests.families.test_auraflow import TestAuraFlow as AuraFlowCase
from tests.families.test_chroma import TestChroma as ChromaCase
from tests.families.test_cogvideox import TestCogVideoX2b as CogVideoX2bCase
from tests.families.test_easyanimate import TestEasyAnimate as EasyAnimateCase
from tests.families.test_flux import TestFlux as FluxCase
from tests.families.test_hidream import TestHiDream as HiDreamCase
from tests.families.test_hunyuan_dit import TestHunyuanDiT as HunyuanDiTCase
from tests.families.test_ltx_2 import TestLtx2 as Ltx2Case
from tests.families.test_ltx_video import TestLtxVideo as LtxVideoCase
from tests.families.test_mochi import TestMochi as MochiCase
from tests.families.test_omnigen import TestOmniGen as OmniGenCase
from tests.families.test_pixart import TestPixArt as PixArtCase
from tests.families.test_sd3 import TestSD3 as SD3Case
from tests.families.test_wan import TestWan as WanCase
from tests.families.test_z_image import TestZImage as ZImageCase

BASE = dit_attn.SoftPAG(heads="1:0", scale=2.0)
# Families whose pipelines put the branches of guidance into one batch.
BATCHED = {
    "pixart": PixArtCase,
    "sd3": SD3Case,
    "hidream": HiDreamCase,
    "hunyuan-dit": HunyuanDiTCase,
    "auraflow": AuraFlowCase,
    "z-image": ZImageCase,
    "ltx-video": LtxVideoCase,
    "cogvideox": CogVideoX2bCase,
    "mochi": MochiCase,
    "easyanimate": EasyAnimateCase,
    "allegro": AllegroCase,
    "ltx-2": Ltx2Case,
}


# -- several samples ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no cfg"])
@pytest.mark.parametrize("name", BATCHED)
def test_samples_of_the_same_noise_are_guided_each_by_itself(name: str, cfg: bool) -> None:
    """Equal latents must not pass for the branches of guidance, nor anything else for rows of the batch."""
    pipe, kwargs = real(BATCHED[name])
    if not cfg:
        kwargs = {**without_cfg(kwargs), **({"guidance_scale": 0.0} if name == "z-image" else {})}
    stock = run(pipe, two(kwargs), 2, (5, 5))
    dit_attn.enable(pipe, BASE)
    single = torch.cat([run(pipe, alone(kwargs, index), 2, (5,)) for index in (0, 1)])
    move = (single - stock).abs().max()
    for way in ({}, {"batched": True}):
        dit_attn.enable(pipe, dataclasses.replace(BASE, **way))  # type: ignore[arg-type]
        assert (run(pipe, two(kwargs), 2, (5, 5)) - single).abs().max() < 2e-3 * move + 2e-6


def test_three_samples_of_the_same_noise_are_no_three_branches() -> None:
    pipe, kwargs = real(OmniGenCase)
    dit_attn.enable(pipe, BASE)
    single = run(pipe, kwargs, 1, (5,))
    found = run(pipe, {**kwargs, "prompt": [kwargs["prompt"]] * 3}, 1, (5, 5, 5))
    torch.testing.assert_close(found, single.expand(3, -1, -1, -1), atol=1e-4, rtol=1e-4)


def test_positions_are_not_taken_for_the_batch() -> None:
    """As many samples as text tokens."""
    pipe, kwargs = real(FluxCase)
    found = []
    for batched in (False, True):
        dit_attn.enable(pipe, dataclasses.replace(BASE, batched=batched))
        found.append(run(pipe, without_cfg(kwargs), 1, num_images_per_prompt=kwargs["prompt_embeds"].shape[1]))
    torch.testing.assert_close(found[1], found[0], atol=1e-5, rtol=1e-4)


def test_guidance_that_a_callback_turns_off_stays_off() -> None:
    pipe, kwargs = real(SD3Case)

    def turn_off(pipe: Any, step: int, time: Any, known: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            pipe._guidance_scale = 1.0
            known = {name: part if name == "latents" else part.chunk(2)[1] for name, part in known.items()}
        return known

    more = {
        "callback_on_step_end": turn_off,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds", "pooled_prompt_embeds"],
    }
    dit_attn.enable(pipe, BASE)
    single = torch.cat([run(pipe, alone(kwargs, index), 3, (5,), **more) for index in (0, 1)])
    torch.testing.assert_close(run(pipe, two(kwargs), 3, (5, 5), **more), single, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("case", [SD3Case, ChromaCase], ids=["batched", "separate"])
def test_another_pipeline_around_the_same_transformer_tells_for_itself(case: Any) -> None:
    pipe, kwargs = real(case)
    dit_attn.enable(pipe, BASE)
    expected = [run(pipe, two(part), 2, (5, 6)) for part in (kwargs, without_cfg(kwargs))]  # ends without guidance
    other = type(pipe)(**pipe.components)
    other.set_progress_bar_config(disable=True)
    found = [run(other, two(part), 2, (5, 6)) for part in (kwargs, without_cfg(kwargs))]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_guidance_that_is_truncated_is_over_for_all_samples() -> None:
    pipe, kwargs = real(ZImageCase)
    dit_attn.enable(pipe, BASE)
    single = torch.cat([run(pipe, alone(kwargs, index), 4, (5,), cfg_truncation=0.4) for index in (0, 1)])
    found = run(pipe, two(kwargs), 4, (5, 5), cfg_truncation=0.4)
    torch.testing.assert_close(found, single, atol=2e-5, rtol=1e-4)


# -- rules of guidance -------------------------------------------------------------------------------------------------


def ways(pipe: Any, kwargs: dict[str, Any], *wanted: str, **more: Any) -> list[torch.Tensor]:
    """The same run by several ways in."""
    found = []
    for way in wanted:
        dit_attn.enable(pipe, dataclasses.replace(BASE, inject=way))
        found.append(run(pipe, kwargs, 3, (5, 6), **more))
    return found


@pytest.mark.parametrize("name", ["HeunDiscrete", "KDPM2AncestralDiscrete", "DPMSolverSinglestep", "LCM"])
def test_schedulers_of_second_order_and_of_fresh_noise_get_the_same_push_every_way(name: str) -> None:
    pipe, kwargs = real(PixArtCase)
    pipe.scheduler = getattr(diffusers, f"{name}Scheduler")()
    first, *others = ways(pipe, two(kwargs), "shift", "step", "cond")
    for other in others:
        torch.testing.assert_close(other, first, atol=2e-3, rtol=1e-3)


def test_a_skip_pass_of_the_pipeline_itself_is_no_branch_to_perturb() -> None:
    """StableDiffusion3Pipeline's own skip-layer guidance beside ours."""
    pipe, kwargs = real(SD3Case)
    own = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    first, second = ways(pipe, two(kwargs), "shift", "step", **own)
    torch.testing.assert_close(second, first, atol=1e-4, rtol=1e-3)
    guidance = dit_attn.summary(pipe).guidance
    assert guidance is not None and guidance.evaluations == 3
    with pytest.raises(dit_attn.DitAttnError, match=r"skip_guidance_layers.*use inject='shift'"):
        ways(pipe, two(kwargs), "cond", **own)


def test_a_scale_that_is_set_behind_the_model_is_not_divided_by() -> None:
    pipe, kwargs = real(CogVideoX2bCase)
    with pytest.raises(dit_attn.DitAttnError, match=r"use_dynamic_cfg.*use inject='shift'"):
        ways(pipe, two(kwargs), "cond", use_dynamic_cfg=True)


def test_guidance_below_one_is_guidance_where_the_pipeline_adds_one() -> None:
    pipe, kwargs = real(ZImageCase)
    first, second = ways(pipe, two(kwargs), "shift", "cond", guidance_scale=0.5)
    torch.testing.assert_close(second, first, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("case", "rescaling"),
    [(LtxVideoCase, {"guidance_rescale": 0.7}), (ZImageCase, {"cfg_normalization": True})],
    ids=["ltx-video", "z-image"],
)
def test_a_rescaling_that_is_asked_for_is_pushed_behind(case: Any, rescaling: dict[str, Any]) -> None:
    pipe, kwargs = real(case)
    auto, step, shift = ways(pipe, two(kwargs), "auto", "step", "shift", **rescaling)
    assert same(auto, step) and not torch.allclose(step, shift, atol=1e-4)
    auto, shift = ways(pipe, two(kwargs), "auto", "shift")
    assert same(auto, shift)


def test_a_pipeline_with_a_perturbed_branch_of_its_own_is_refused() -> None:
    pipe, kwargs = real(SD3Case)
    kind = diffusers.StableDiffusion3PAGPipeline
    taken = inspect.signature(kind.__init__).parameters
    parts = {name: part for name, part in pipe.components.items() if name in taken}
    pag = kind(**parts, pag_applied_layers=["blocks.1"])
    pag.set_progress_bar_config(disable=True)
    dit_attn.enable(pipe, BASE)
    expected = run(pipe, kwargs)
    dit_attn.enable(pag, BASE)
    torch.testing.assert_close(run(pag, kwargs, pag_scale=0.0), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(dit_attn.DitAttnError, match="call it with pag_scale=0"):
        run(pag, kwargs)


# -- when --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("case", "name"),
    [
        (FluxCase, "FluxImg2ImgPipeline"), (SD3Case, "StableDiffusion3Img2ImgPipeline"),
        (WanCase, "WanVideoToVideoPipeline"), (CogVideoX2bCase, "CogVideoXVideoToVideoPipeline"),
    ],
)  # fmt: skip
def test_a_run_that_begins_late_in_its_schedule_is_counted_from_there(case: Any, name: str) -> None:
    from PIL import Image

    pipe, kwargs = real(case)
    kind = getattr(diffusers, name)
    taken = inspect.signature(kind.__init__).parameters
    later = kind(**{part: value for part, value in pipe.components.items() if part in taken})
    later.set_progress_bar_config(disable=True)
    picture = Image.new("RGB", (kwargs["width"], kwargs["height"]), (200, 30, 30))
    frames = kwargs.pop("num_frames", 0)
    given = {"video": [picture] * frames} if frames else {"image": picture}
    session = dit_attn.enable(later, dataclasses.replace(BASE, start=0.5))
    seen = []
    with dit_attn.observing(later, lambda call, *_: seen.append((call.clock.step, call.clock.total))):
        run(later, {**kwargs, **given}, 8, strength=0.5)
    assert list(dict.fromkeys(step for step, _ in seen)) == [0, 1, 2, 3] and seen[-1] == (3, 4)
    assert session.guider is not None and session.guider.evaluations == 2


def test_one_of_two_experts_can_be_guided_alone() -> None:
    """Steps are counted over both; a method on the second alone begins with it."""
    pipe, kwargs = real(WanCase)
    pipe.transformer_2 = copy.deepcopy(pipe.transformer)
    pipe.register_to_config(boundary_ratio=0.7)
    split = 4  # of 8 steps, whose times are 1000, 948, 883, 801, 694 ...
    for target, method, expected in (
        (pipe, BASE, [split, 8 - split]),
        (pipe, dataclasses.replace(BASE, start=0.25, stop=0.75), [2, 2]),
        (pipe.transformer_2, BASE, [8 - split]),
        (pipe.transformer_2, dataclasses.replace(BASE, start=0.75), [2]),
    ):
        dit_attn.enable(target, method)
        run(pipe, kwargs, 8)
        sessions = [attach.session_of(model) for model in (pipe.transformer, pipe.transformer_2)]
        assert [s.guider.evaluations for s in sessions if s is not None and s.guider is not None] == expected
        dit_attn.disable(pipe)
    dit_attn.enable(pipe.transformer, dit_attn.SoftPAG(heads="0:0"))
    dit_attn.enable(pipe.transformer_2, dit_attn.SLG(layers="1", start=0.0, stop=1.0))
    run(pipe, kwargs, 8)
    guides = [attach.session_of(model).guider for model in (pipe.transformer, pipe.transformer_2)]  # type: ignore
    assert [(guide.method.slug, guide.evaluations) for guide in guides] == [("softpag", split), ("slg", 8 - split)]


def test_guidance_of_an_expert_that_did_not_run_is_not_missed() -> None:
    """A run that begins late may need the second alone."""
    pipe, kwargs = real(WanCase)
    pipe.transformer_2 = copy.deepcopy(pipe.transformer)
    pipe.register_to_config(boundary_ratio=1.1)
    dit_attn.watch(pipe)
    run(pipe, kwargs, 2)
    sessions = [attach.session_of(model) for model in (pipe.transformer, pipe.transformer_2)]
    assert [s.ran for s in sessions if s is not None] == [False, True]
    assert dit_attn.summary(pipe).warnings == ()


# -- beside step caches ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PyramidAttentionBroadcastConfig", "FasterCacheConfig"])
@pytest.mark.parametrize("case", [WanCase, FluxCase], ids=["wan", "flux"])
def test_a_cache_with_one_state_for_all_branches_never_sees_the_perturbed_pass(case: Any, kind: str) -> None:
    pipe, kwargs = real(case)
    skips = {"spatial_attention_block_skip_range": 2, "spatial_attention_timestep_skip_range": (-1, 700)}
    if kind == "FasterCacheConfig":
        skips |= {"is_guidance_distilled": True, "tensor_format": "BCFHW", "attention_weight_callback": lambda _: 0.5}
    config = getattr(diffusers, kind)(**skips, current_timestep_callback=lambda: pipe.current_timestep)
    bare = run(pipe, kwargs, 6)
    pipe.transformer.enable_cache(config)
    stock = run(pipe, kwargs, 6)
    assert not same(stock, bare)
    dit_attn.enable(pipe, dit_attn.SoftPAG(heads="1:0", scale=1e-30, inject="step"))
    assert same(run(pipe, kwargs, 6), stock)  # a push of nothing leaves every decision of the cache as it is
    session = dit_attn.enable(pipe, BASE)
    assert session.guider is not None
    run(pipe, kwargs, 6)
    dit_attn.disable(pipe)
    assert same(run(pipe, kwargs, 6), stock)


# -- nothing is left behind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["shift", "step"])
def test_a_pass_that_fails_leaves_nothing_behind(way: str) -> None:
    pipe, kwargs = real(FluxCase)
    stock = run(pipe, kwargs)
    method = dit_attn.SoftPAG(heads="2", inject=way)
    dit_attn.enable(pipe, method)
    guided = run(pipe, kwargs)
    blocks = [*pipe.transformer.transformer_blocks, *pipe.transformer.single_transformer_blocks]
    forwards = [block.forward for block in blocks]
    for fails in (1, 2, 3):  # in the plain pass, in the perturbed one, in the unconditional one
        left = iter(range(1, 99))
        last = blocks[-1].attn.to_v
        handle = last.register_forward_pre_hook(lambda *_, left=left, n=fails: 1 / (next(left) != n) and None)
        with pytest.raises(ZeroDivisionError):
            run(pipe, kwargs)
        handle.remove()
        assert [block.forward for block in blocks] == forwards
        assert same(run(pipe, kwargs), guided)
    left = iter(range(1, 99))
    handle = blocks[-1].attn.to_v.register_forward_pre_hook(lambda *_: 1 / (next(left) != 3) and None)
    with pytest.raises(ZeroDivisionError):
        run(pipe, kwargs)
    handle.remove()
    dit_attn.disable(pipe)
    assert hooks(pipe.transformer) == [] and "step" not in vars(pipe.scheduler)
    assert "cache_context" not in vars(pipe.transformer)
    assert same(run(pipe, kwargs), stock)


def test_a_push_of_a_broken_run_does_not_reach_the_next_one() -> None:
    pipe, kwargs = real(FluxCase)
    dit_attn.enable(pipe, dit_attn.SoftPAG(heads="2", inject="step", start=0.5))
    later = run(pipe, kwargs)
    dit_attn.enable(pipe, dit_attn.SoftPAG(heads="2", inject="step"))
    session = attach.session_of(pipe.transformer)
    assert session is not None and session.guider is not None
    scheduler_step = type(pipe.scheduler).step
    run(pipe, kwargs, steps=1)
    inject_at = pipe.transformer.register_forward_hook(lambda *_: (_ for _ in ()).throw(InterruptedError()))
    with pytest.raises(InterruptedError):
        run(pipe, kwargs)
    inject_at.remove()
    assert "step" not in vars(pipe.scheduler)  # what waited for a step that never came has ended with the run
    session.guider.method = dit_attn.SoftPAG(heads="2", inject="step", start=0.5)
    assert same(run(pipe, kwargs), later)
    assert type(pipe.scheduler).step is scheduler_step


@pytest.mark.parametrize("reader", sorted(slug for slug, cls in methods().items() if issubclass(cls, SparseMethod)))
@pytest.mark.parametrize("case", [WanCase, SD3Case], ids=["separate", "batched"])
def test_a_reader_sees_the_plain_passes_as_without_guidance(case: Any, reader: str) -> None:
    """The perturbed pass leaves no trace in what a reader remembers: with a push of nothing, all bits agree."""
    pipe, kwargs = real(case)
    budget: dict[str, Any] = {"window": (3, 3)} if reader == "inward-window" else {"density": 0.4}
    read = methods()[reader](q_block=32, kv_block=32, dense_steps=0, **budget)  # type: ignore[call-arg]
    dit_attn.enable(pipe, read)
    alone = run(pipe, kwargs, steps=4)
    guidance = dit_attn.SoftPAG(heads="1", scale=1e-30, inject="step")
    session = dit_attn.enable(pipe, read, guidance)
    assert same(run(pipe, kwargs, steps=4), alone)
    assert session.guider is not None and session.guider.evaluations == 4
    summary = dit_attn.summary(pipe)
    assert summary.sparse_calls > 0 and summary.density is not None and summary.density < 1.0
    dit_attn.enable(pipe, read, dataclasses.replace(guidance, scale=2.0))
    assert not same(run(pipe, kwargs, steps=4), alone)


@pytest.mark.parametrize("case", [WanCase, SD3Case, PixArtCase], ids=["wan", "sd3", "pixart"])
def test_all_targets_and_kinds_run_with_and_without_cfg(case: Any) -> None:
    pipe, kwargs = real(case)
    kinds: list[PerturbedGuidance] = [
        *(dit_attn.SoftPAG(target=target) for target in ("identity", "uniform", "mean-query")),
        *(dit_attn.SoftPAG(joint=joint) for joint in ("image-rows", "ii-logit-mask", "ii-mass-to-diagonal")),
        dit_attn.SEG(), dit_attn.SEG(sigma=1.5), dit_attn.SLG(start=0.0, stop=1.0), dit_attn.STG(),
        dit_attn.STG(mode="residual"),
    ]  # fmt: skip
    for scale in (1.0, 3.0):
        stock = run(pipe, {**kwargs, "guidance_scale": scale}, steps=1)
        for method in kinds:
            session = dit_attn.enable(pipe, method)
            found = run(pipe, {**kwargs, "guidance_scale": scale}, steps=1)
            assert torch.isfinite(found).all() and not same(found, stock), method
            assert session.guider is not None and session.guider.evaluations == 1
        dit_attn.disable(pipe)


def test_both_passes_of_a_tuple_and_an_output_class_are_pushed_alike() -> None:
    torch.manual_seed(0)
    model = WanCase().model().eval()
    inputs = WanCase().inputs()
    dit_attn.enable(model, dit_attn.SoftPAG(heads="1"))
    with torch.no_grad():
        pair = model(**inputs, return_dict=False)
        output = model(**inputs, return_dict=True)
    assert type(output).__name__ == "Transformer2DModelOutput" and isinstance(pair, tuple)
    assert same(tensors(pair), tensors(output))
