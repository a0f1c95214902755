"""The estimate of a run: token grids, operations, densities, memory and guidance, and what is printed of them."""

from __future__ import annotations

import importlib
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn.errors import DitAttnError
from dit_attn.processors.attach.attention_processor import is_wrapped
from dit_attn.processors.attach.explain import Explanation, visual_grid
from dit_attn.processors.methods.presets import PresetUse
from tests._support.compose import tiny, tiny_pipeline

SIZE = {"height": 256, "width": 320, "num_frames": 13}
BLOCKS: dict[str, Any] = {"q_block": 32, "kv_block": 32}


class ImageTransformer(torch.nn.Module):
    """A transformer of an image family by its name, with a configuration of its own."""

    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config


Flux = type("FluxTransformer2DModel", (ImageTransformer,), {})
SD3 = type("SD3Transformer2DModel", (ImageTransformer,), {})
Wan = type("WanTransformer3DModel", (ImageTransformer,), {})
CogVideoX = type("CogVideoXTransformer3DModel", (ImageTransformer,), {})


class Pipe:
    """A pipeline's factors, and the defaults of its call."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def __call__(self, height: int = 480, width: int = 832, num_frames: int = 81) -> None:
        """Nothing."""


# -- the grid ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "pipe", "size", "grid"),
    [
        (Wan(patch_size=(1, 2, 2)), None, (480, 832, 81), (21, 30, 52)),
        (Wan(patch_size=(1, 2, 2)), Pipe(), (None, None, None), (21, 30, 52)),  # the defaults of the call
        (Wan(patch_size=(1, 2, 2)), Pipe(), (None, None, 13), (4, 30, 52)),
        (Wan(patch_size=(1, 2, 2)), Pipe(vae_scale_factor_spatial=16), (480, 832, 81), (21, 15, 26)),
        (Wan(patch_size=[2, 2, 2]), Pipe(vae_scale_factor_temporal=8), (480, 832, 81), (5, 30, 52)),
        (CogVideoX(patch_size=2, patch_size_t=2), None, (480, 720, 49), (6, 30, 45)),
        (SD3(patch_size=2, sample_size=128), None, (None, None, None), (1, 64, 64)),
        (SD3(patch_size=2, sample_size=(64, 128)), None, (None, None, None), (1, 64, 64)),
        (SD3(patch_size=2, sample_size=128), None, (512, None, None), (1, 32, 32)),
        (SD3(patch_size=2, sample_size=128), None, (None, 512, None), (1, 32, 32)),
        (Flux(patch_size=1), Pipe(vae_scale_factor=8), (1024, 512, 99), (1, 64, 32)),  # packed by the pipeline
    ],
)
def test_tokens_of_an_image_or_video(model: Any, pipe: Any, size: Any, grid: tuple[int, int, int]) -> None:
    assert visual_grid(model, pipe, *size) == grid


@pytest.mark.parametrize(
    "case",
    ["krea_2.TestKrea2", "longcat_image.TestLongCatImage", "bria.TestBria", "fibo.TestFibo",
     "ernie_image.TestErnieImage", "kandinsky_6.TestKandinsky6", "joyimage_edit.TestJoyImage"],
)  # fmt: skip
def test_tokens_are_those_of_the_run_with_a_pipeline_and_without(case: str) -> None:
    file, name = case.split(".")
    made = getattr(importlib.import_module(f"tests.families.test_{file}"), name)()
    pipe, given = made.pipeline()
    size = [given.get(key) for key in ("height", "width", "num_frames")]
    for around in (pipe, None):
        assert visual_grid(pipe.transformer, around, *size) == made.grid
    assert dit_attn.explain(pipe, dit_attn.BlockSparse(), height=size[0], width=size[1]).tokens > 0


def test_a_size_under_one_token_is_refused() -> None:
    with pytest.raises(DitAttnError, match=r"15 x 64 is smaller than one token \(16 pixels\)"):
        visual_grid(Wan(patch_size=(1, 2, 2)), None, 15, 64, 1)


# -- the estimate -----------------------------------------------------------------------------------------------------


def wan(*methods: Any, **size: Any) -> Explanation:
    """The estimate for a tiny Wan transformer."""
    return dit_attn.explain(tiny("wan")[0], *methods, **{**SIZE, **size})


def test_operations_of_a_step_are_counted_by_hand() -> None:
    model, _ = tiny("wan")
    found = wan()
    assert (found.family, found.preset, found.grid, found.tokens, found.layers) == ("wan", None, (4, 16, 20), 1280, 2)
    attention = 2 * 4 * 1280**2 * 24
    linear = sum(
        2 * 1280 * module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith("blocks.")
    )
    assert found.attention_share == pytest.approx(attention / (attention + linear))
    assert (found.density, found.attention_speedup, found.speedup) == (1.0, 1.0, 1.0)
    assert found.fallbacks == ("cross attention and text refiners: never wrapped",) and found.methods == ()


@pytest.mark.parametrize(
    ("settings", "density"),
    [
        ({"density": 0.25, "dense_steps": 0}, 0.25),
        ({"density": 0.25, "dense_steps": 0.2}, 0.8 * 0.25 + 0.2),
        ({"density": 0.25, "dense_steps": 5, "dense_last_steps": 0.1}, 0.8 * 0.25 + 0.2),  # counts out of 50
        ({"density": 0.25, "dense_steps": 0, "dense_layers": (0,)}, 0.5 * 0.25 + 0.5),
        ({"density": 0.25, "dense_steps": 0.2, "dense_layers": (0,)}, 0.4 * 0.25 + 0.6),
        ({"densities": (1.0, 0.5), "dense_steps": 0}, 0.75),
        ({"density": 1.0, "dense_steps": 0}, 1.0),
        ({"density": 0.5, "dense_steps": 90}, 1.0),
    ],
)
def test_dense_steps_and_layers_count_as_dense(settings: dict[str, Any], density: float) -> None:
    found = wan(dit_attn.BlockSparse(**settings, **BLOCKS))
    assert found.density == pytest.approx(density) and found.attention_speedup == pytest.approx(1 / density)
    share = found.attention_share
    assert found.speedup == pytest.approx(1 / (1 - share + share * density))
    text = " ".join(found.fallbacks)
    assert ("dense by setting" in text) == bool(settings.get("dense_steps") or settings.get("dense_layers"))
    assert ("density 1 by setting" in text) == ("densities" in settings)


def test_counts_of_steps_are_out_of_those_of_the_run() -> None:
    method = dit_attn.BlockSparse(density=0.25, dense_steps=5, **BLOCKS)
    assert wan(method).steps == 50 and "5 of 50 steps: dense by setting" in wan(method).fallbacks
    found = wan(method, num_inference_steps=20)
    assert found.steps == 20 and found.density == pytest.approx(0.75 * 0.25 + 0.25) and "over 20 steps" in str(found)
    pipe, kwargs = tiny_pipeline("pixart")  # whose call makes 20
    size = {name: kwargs[name] for name in ("height", "width")}
    assert dit_attn.explain(pipe, **size).steps == 20
    with pytest.raises(DitAttnError, match="num_inference_steps must be a whole number"):
        wan(method, num_inference_steps=0)


def test_without_a_sparse_method_no_density_is_printed() -> None:
    for methods in ((), (dit_attn.SoftPAG(heads="1:0"),)):
        found = wan(*methods)
        assert found.density == 1.0 and "density" not in str(found) + repr(found) and "bound" not in str(found)
    assert "100.0 % of dense" in str(wan(dit_attn.BlockSparse(density=1.0, dense_steps=0)))


def test_a_density_that_the_data_decides_is_unknown() -> None:
    found = wan(dit_attn.BlockSparse(top_p=0.9, **BLOCKS))
    assert found.density is found.attention_speedup is found.speedup is None
    assert found.fallbacks[-1] == "density: decided by the data (top_p)" and "upper bound" not in str(found)


def test_a_sequence_that_is_too_short_stays_dense() -> None:
    found = wan(dit_attn.BlockSparse(density=0.25), height=64, width=64)
    assert found.tokens == 64 and found.density == 1.0
    assert found.fallbacks[-1] == "all calls: sequence under 256 tokens"


def test_memory_is_that_of_the_layers_that_are_not_dense() -> None:
    method = dit_attn.ReTtention(density=0.2, **BLOCKS)
    found = wan(method)
    assert found.memory == 2 * 2 * method.cache_bytes(1280, 2, 12, 4) > 0
    assert wan(replace(method, dense_layers=(0,))).memory == found.memory // 2
    assert "stored from step to step" in str(found) and "memory" not in str(wan())


def test_text_of_a_joint_sequence_is_part_of_it() -> None:
    model, _ = tiny("flux")
    found = dit_attn.explain(model, height=256, width=256)
    inner = 4.0 * (found.tokens + 512) ** 2 * sum(
        module.inner_dim for name, module in model.named_modules() if name.endswith(".attn")
    )  # fmt: skip
    blocks = ("transformer_blocks.", "single_transformer_blocks.")
    linear = sum(
        2.0 * (found.tokens + 512) * module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.startswith(blocks)
    )
    assert found.attention_share == pytest.approx(inner / (inner + linear))


# -- guidance ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "guidance"),
    [
        (dit_attn.SoftPAG(heads="1:0"), {"heads": 1, "blocks": 1, "passes": 1.0, "work": 0.5}),
        (dit_attn.SoftPAG(heads="0:0;1"), {"heads": 3, "blocks": 2, "passes": 1.0, "work": 1.0}),
        (dit_attn.SoftPAG(heads="1:0", share_prefix=False), {"heads": 1, "blocks": 1, "passes": 1.0, "work": 1.0}),
        (dit_attn.SoftPAG(heads="1:0", batched=True), {"heads": 1, "blocks": 1, "passes": 1.0, "work": 1.0}),
        (
            dit_attn.SoftPAG(heads="1:0", start=0.25, stop=0.75, interval=2),
            {"heads": 1, "blocks": 1, "passes": 0.25, "work": 0.125},
        ),
        (dit_attn.SoftPAG(heads="1:0", scale=0.0), {"heads": 1, "blocks": 1, "passes": 0.0, "work": 0.0}),
        (dit_attn.SLG(layers="1", start=0.0, stop=1.0), {"heads": 0, "blocks": 1, "passes": 1.0, "work": 0.0}),
        (dit_attn.SLG(layers="0", start=0.0, stop=1.0), {"heads": 0, "blocks": 1, "passes": 1.0, "work": 0.5}),
    ],
    ids=["one head", "two layers", "no reuse", "batched", "window", "no scale", "last block", "first block"],
)  # fmt: skip
def test_work_of_the_perturbed_pass_leaves_out_what_is_reused_or_skipped(
    method: Any, guidance: dict[str, float]
) -> None:
    found = wan(method)
    assert found.guidance == pytest.approx(guidance) and found.density == 1.0


def test_guidance_that_names_what_is_not_there_is_refused() -> None:
    with pytest.raises(DitAttnError, match="no layer 99"):
        wan(dit_attn.SoftPAG(heads="99"))


# -- text and values --------------------------------------------------------------------------------------------------

FOUND = Explanation(
    family="wan", preset="wan-1.3b", grid=(21, 30, 52), tokens=32760, layers=30, attention_share=0.625, density=0.25,
    attention_speedup=4.0, speedup=1.88, fallbacks=("one", "two"), methods=({"method": "block-sparse"},),
    memory=3 * 2**30, guidance={"heads": 3, "blocks": 2, "passes": 0.5, "work": 0.25},
)  # fmt: skip


def test_the_text_says_every_figure_once() -> None:
    text = str(FOUND).replace("\n" + 15 * " ", " ")  # where a long line goes on
    rows = [(line[:14].strip(), line[15:]) for line in text.splitlines()]
    assert rows == [
        ("family", "wan (preset wan-1.3b)"),
        ("visual tokens", "32,760 = 21 x 30 x 52"),
        ("layers", "30 attention layers can be wrapped"),
        ("attention", "62.5 % of the operations of a step"),
        ("density", "25.0 % of dense attention over 50 steps"),
        ("upper bound", "4.00x for attention, 1.88x for a step, by the number of operations"),
        ("memory", "3.0 GiB stored from step to step (one sample, both branches)"),
        (
            "guidance",
            "3 heads in 2 layers; evaluations per step: 1.50 alone, 2.50 with CFG; "
            "blocks run: x1.25 alone, x1.12 with CFG",
        ),
        ("fallback", "one"),
        ("fallback", "two"),
    ]
    other = replace(FOUND, preset=None, memory=5 * 2**20, guidance={**(FOUND.guidance or {}), "heads": 0})
    assert "wan (no preset for this checkpoint)" in str(other) and "5 MiB" in str(other)
    assert "2 blocks skipped" in str(other)


def test_json_values_hold_every_figure() -> None:
    data = json.loads(json.dumps(FOUND.to_dict()))
    assert data["grid"] == [21, 30, 52] and data["guidance"]["work"] == 0.25 and data["memory"] == 3 * 2**30
    assert set(data) == set(vars(FOUND))


def test_an_estimate_of_a_pipeline_changes_nothing_on_it() -> None:
    pipe, kwargs = tiny_pipeline("wan")
    size = {name: kwargs[name] for name in SIZE}
    found = dit_attn.explain(pipe, dit_attn.SoftPAG(heads="1:0"), **size)
    assert found.family == "wan"
    assert not any(is_wrapped(getattr(module, "processor", None)) for module in pipe.transformer.modules())
    assert not pipe.transformer._forward_hooks and not pipe.transformer._forward_pre_hooks


def test_repr_is_one_line_and_a_notebook_gets_a_table() -> None:
    assert repr(FOUND) == "<Explanation: block-sparse, 32,760 tokens, density 25.0 %, up to 1.88x for a step>"
    assert "density decided by the data>" in repr(replace(FOUND, density=None, speedup=None))
    assert FOUND._repr_html_().count("<tr>") == len(FOUND._rows())


def test_the_preset_of_a_method_and_its_provenance_are_said() -> None:
    found = replace(FOUND, presets=(PresetUse("block-sparse", "wan-1.3b", "paper"),))
    assert "preset         wan-1.3b for block-sparse (from the paper)" in str(found).splitlines()
