"""The table of known transformers: their published sizes, smaller ones of the same form, memory said beforehand."""

from __future__ import annotations

import math

import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.models.architectures import ARCHITECTURES, architecture
from dit_attn.processors.attach.explain import visual_grid
from dit_attn.processors.attach.families import family_of
from dit_attn.processors.methods.presets import preset_for

CPU = torch.device("cpu")
NAMES = [row.name for row in ARCHITECTURES]

# Billions of weights, visual tokens, layers and heads as the models' authors give them.
PUBLISHED = {
    "wan2.1-1.3b": (1.42, 32760, 30, 12),
    "wan2.1-14b": (14.29, 75600, 40, 40),
    "hunyuan-video": (12.82, 118800, 60, 24),
    "cogvideox-5b": (5.57, 17550, 42, 48),
    "flux": (11.90, 4096, 57, 24),
    "pixart-sigma": (0.61, 4096, 28, 16),
    "ltx-video": (1.92, 7392, 28, 32),
    "qwen-image-2.1": (7.12, 4096, 32, 32),
    "krea-2": (12.82, 4096, 28, 48),
    "minimax-h3": (33.12, 37296, 50, 56),
    "cosmos-3": (15.17, 44160, 36, 32),
}


@pytest.mark.parametrize("name", NAMES)
def test_the_real_size_is_that_of_the_published_model(name) -> None:
    row = architecture(name)
    weights, tokens, layers, heads = PUBLISHED[name]
    assert row.parameters() / 1e9 == pytest.approx(weights, rel=0.01)
    assert (math.prod(row.grid), row.layers, row.heads) == (tokens, layers, heads)


@pytest.mark.parametrize("name", NAMES)
def test_the_model_of_the_table_has_a_preset(name) -> None:
    preset = preset_for(architecture(name).stand_in)
    assert preset is not None and preset.name.startswith(name)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_scaled_model_takes_a_call_in_its_type(name, dtype) -> None:
    row = architecture(name).sized(2, 1).with_tokens(64)
    model = row.build(CPU, dtype)
    assert {weight.dtype for weight in model.parameters()} == {dtype}
    batch = 1 if row.single else 2
    with torch.no_grad():
        out = model(**row.call(CPU, dtype, batch), return_dict=False)[0]
    out = torch.cat(out) if isinstance(out, list) else out
    assert out.shape[0] == batch and out.dtype == dtype and bool(torch.isfinite(out).all())


@pytest.mark.parametrize("name", NAMES)
def test_scaling_keeps_head_size_kinds_of_layers_and_what_is_wide(name) -> None:
    real = architecture(name)
    small = real.sized(6, real.heads // 2)
    assert (small.layers, small.heads, small.head_dim) == (6, real.heads // 2, real.head_dim)
    assert small.scaled == {"heads": real.heads // 2, "layers": 6}
    for entry in real.wide:
        assert small.config[entry] == pytest.approx(real.config[entry] / 2, abs=1)
    if "num_single_layers" in real.config:
        assert (small.config["num_layers"], small.config["num_single_layers"]) == (2, 4)
    assert real.sized(real.layers, real.heads) == real


def test_the_layout_of_a_scaled_model_is_found_by_its_family_row() -> None:
    row = architecture("hunyuan-video").sized(2, 1).with_tokens(64)
    model = row.build(CPU, torch.float32)
    call = row.call(CPU, torch.float32)
    layout = family_of(model).layout(model.config, call)
    tokens = layout.resolve(math.prod(row.grid) + row.text)
    assert tokens is not None and tokens.visual_range == (0, math.prod(row.grid))


@pytest.mark.parametrize("count", [1, 300, 16384, 40000])
@pytest.mark.parametrize("name", ["wan2.1-1.3b", "flux"])
def test_a_number_of_tokens_is_reached_with_the_frames_kept(name, count) -> None:
    real = architecture(name)
    row = real.with_tokens(count)
    assert row.grid[0] == real.grid[0]
    assert count <= math.prod(row.grid) <= max(1.15 * count, 4 * row.grid[0])


@pytest.mark.parametrize("name", NAMES)
def test_explain_counts_the_tokens_of_the_table_without_a_pipeline(name) -> None:
    row = architecture(name)
    with torch.device("meta"):
        model = row.sized(2, 1).build_class()(**row.sized(2, 1).config)
    frames, height, width = row.pixels
    assert visual_grid(model, None, height, width, frames) == row.grid
    if row.chunk_frames:  # its pipeline rounds frames up
        shorter, longer = (visual_grid(model, None, height, width, frames + more)[0] for more in (-16, 1))
        assert shorter == row.grid[0] and longer == row.grid[0] + 5


def test_a_token_has_the_size_that_it_has_in_its_model() -> None:
    assert architecture("ltx-video").grid == (21, 16, 22)
    assert architecture("ltx-video").at(9, 64, 96).grid == (2, 2, 3)
    with pytest.raises(DitAttnError, match="one token of 32 x 32 pixels"):
        architecture("ltx-video").at(None, 16, None)


def test_frames_are_counted_by_chunks_and_sizes_are_padded_up_where_the_model_does_so() -> None:
    assert architecture("minimax-h3").grid == (37, 24, 42)
    assert architecture("minimax-h3").at(22, 64, 96).grid == (7, 2, 3)
    assert architecture("cosmos-3").grid == (48, 23, 40)
    with pytest.raises(DitAttnError, match="--batch 2"):
        architecture("cosmos-3").check_batch(2)


def test_keys_are_shared_by_the_same_number_of_heads() -> None:
    real = architecture("krea-2")
    assert [real.sized(2, heads).config["num_key_value_heads"] for heads in (1, 7, 24, 48)] == [1, 1, 6, 12]
    assert real.sized(2, 3).config["text_hidden_dim"] == 128


def test_the_published_table_is_never_changed() -> None:
    before = repr(ARCHITECTURES)
    architecture("flux").sized(4, 2).at(None, 512, 512).with_tokens(100)
    assert repr(ARCHITECTURES) == before


def test_a_build_leaves_the_default_type_alone() -> None:
    architecture("pixart-sigma").sized(1, 1).build(CPU, torch.bfloat16)
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        (lambda row: row.sized(1, None), ("--layers", "2", "flux")),
        (lambda row: row.sized(None, 0), ("--heads", "0")),
        (lambda row: row.at(9, None, None), ("--frames 9", "images")),
        (lambda row: row.at(None, 8, None), ("8 x 1024", "token")),
    ],
)
def test_impossible_sizes_are_refused(change, parts) -> None:
    with pytest.raises(DitAttnError) as caught:
        change(architecture("flux"))
    assert all(part in str(caught.value) for part in parts)


def test_too_little_memory_is_said_before_anything_is_built(monkeypatch) -> None:
    row = architecture("wan2.1-14b")
    monkeypatch.setattr("dit_attn.models.architecture.free_memory", lambda device: 8 * 2**30)
    with pytest.raises(DitAttnError, match=r"about \d+\.\d GiB, and cpu has 8.0 GiB free"):
        row.check_memory(CPU, torch.bfloat16, 1)
    row.sized(2, 2).with_tokens(512).check_memory(CPU, torch.bfloat16, 1)
    with pytest.raises(DitAttnError, match=r"20\.0 GiB of it cached by the method"):
        row.sized(2, 2).with_tokens(512).check_memory(CPU, torch.bfloat16, 1, cached=20 * 2**30)
    monkeypatch.setattr("dit_attn.models.architecture.free_memory", lambda device: None)
    row.check_memory(CPU, torch.bfloat16, 1)  # nothing tells: try


def test_an_unknown_model_is_refused_with_the_known_ones() -> None:
    with pytest.raises(DitAttnError, match=r"wan3.*wan2\.1-1\.3b"):
        architecture("wan3")
