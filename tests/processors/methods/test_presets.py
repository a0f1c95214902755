"""Presets: each finds the checkpoint it was made for, and says where its numbers come from."""

from __future__ import annotations

import dataclasses
import inspect
import json
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch

import dit_attn
from dit_attn import DitAttnError, RectifiedSpaAttn, ReTtention
from dit_attn.cli.model_source import describe
from dit_attn.processors.methods.presets import PROVENANCES, PresetUse, method_for, preset_for, preset_use, presets
from tests._support.compose import tiny_pipeline

WAN_5B = {"num_attention_heads": 24, "num_layers": 30, "in_channels": 48}
I2V = {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120}
READERS = ("block-sparse", "rectified-spaattn", "re-ttention")

# What the published transformer/config.json of each checkpoint sets apart from its class's defaults.
CHECKPOINTS = [
    ("wan2.1-1.3b", "WanTransformer3DModel", {"num_attention_heads": 12, "num_layers": 30}, False),
    ("wan2.1-14b", "WanTransformer3DModel", {}, False),
    ("wan2.1-14b-i2v", "WanTransformer3DModel", I2V, False),
    ("wan2.2-ti2v-5b", "WanTransformer3DModel", WAN_5B, False),
    ("wan2.2-a14b", "WanTransformer3DModel", {}, True),
    ("wan2.2-a14b-i2v", "WanTransformer3DModel", {"in_channels": 36}, True),
    ("hunyuan-video", "HunyuanVideoTransformer3DModel", {}, False),
    ("hunyuan-video-1.5", "HunyuanVideo15Transformer3DModel", {}, False),
    ("cogvideox-2b", "CogVideoXTransformer3DModel", {}, False),
    ("cogvideox-5b", "CogVideoXTransformer3DModel", {"num_attention_heads": 48, "num_layers": 42}, False),
    ("ltx-video", "LTXVideoTransformer3DModel", {}, False),
    ("mochi", "MochiTransformer3DModel", {}, False),
    ("helios", "HeliosTransformer3DModel", {}, False),
    ("flux-3", "Flux3Transformer2DModel", {}, False),
    ("ideogram-4", "Ideogram4Transformer2DModel", {}, True),
    ("minimax-h3", "MiniMaxH3Transformer3DModel", {}, False),
    ("krea-2", "Krea2Transformer2DModel", {}, False),
    ("motif-video", "MotifVideoTransformer3DModel", {}, False),
    ("qwen-image-2.1", "QwenImage21Transformer2DModel", {}, False),
    ("cosmos-3", "Cosmos3OmniTransformer", {}, False),
    ("flux.1", "FluxTransformer2DModel", {}, False),
    ("pixart-sigma", "PixArtTransformer2DModel", {}, False),
    ("hunyuan-dit", "HunyuanDiT2DModel", {"num_layers": 40}, False),
]


def checkpoint(transformer: str, published: dict[str, Any]) -> Any:
    """What presets look at: the class's name with its defaults and what was published."""
    given = inspect.signature(getattr(diffusers, transformer).__init__).parameters
    config = {name: value.default for name, value in given.items() if name != "self"}
    return type(transformer, (SimpleNamespace,), {})(config={**config, **published})


@pytest.mark.parametrize("name, transformer, published, pair", CHECKPOINTS, ids=[row[0] for row in CHECKPOINTS])
def test_a_checkpoint_finds_its_own_preset_with_every_reader(
    name: str, transformer: str, published: dict[str, Any], pair: bool
) -> None:
    model = checkpoint(transformer, published)
    preset = preset_for(model, pair=pair)
    assert preset is not None and preset.name == name
    for slug in READERS:
        assert preset.methods[slug]["provenance"] in ("paper", "measured", "guess")
        assert method_for(slug, model, pair=pair).slug == slug


def test_no_preset_of_a_checkpoint_is_left_out_of_the_table() -> None:
    found = {preset.name for preset in presets() if not preset.name.startswith("tiny-")}
    assert found - {row[0] for row in CHECKPOINTS} == {"qwen-image", "sd3.5-large"}  # no reader's paper has them


@pytest.mark.parametrize(
    "name, density, dense_steps, dense_layers",
    [  # density and dense exceptions of the paper's own runs
        ("wan2.1-14b", 0.25, 0.1, (0, 1)),
        ("wan2.1-14b-i2v", 0.25, 0, (0, 1)),
        ("wan2.2-ti2v-5b", 0.25, 0.1, (0, 1)),
        ("wan2.2-a14b", 0.15, 0.075, (0, 1)),
        ("wan2.2-a14b-i2v", 0.15, 0, (0, 1)),
        ("hunyuan-video", 0.2, 0, ()),
        ("cogvideox-5b", 0.25, 0.1, ()),
        ("flux.1", 0.1, 0, tuple(range(37, 57))),
    ],
)
def test_rectified_presets_have_the_papers_schedule(
    name: str, density: float, dense_steps: float, dense_layers: tuple[int, ...]
) -> None:
    _, transformer, published, pair = next(row for row in CHECKPOINTS if row[0] == name)
    method = method_for("rectified-spaattn", checkpoint(transformer, published), pair=pair)
    assert isinstance(method, RectifiedSpaAttn)
    assert (method.density, method.dense_steps, method.dense_layers) == (density, dense_steps, dense_layers)
    assert method.keep == ("neighbors",) and method.budget == "extra" and method.q_block == method.kv_block == 128


@pytest.mark.parametrize("name, dense_steps", [("pixart-sigma", 5), ("hunyuan-dit", 10), ("cogvideox-2b", 15)])
def test_reshaped_presets_have_the_papers_absolute_schedule(name: str, dense_steps: int) -> None:
    _, transformer, published, _ = next(row for row in CHECKPOINTS if row[0] == name)
    method = method_for("re-ttention", checkpoint(transformer, published))
    assert isinstance(method, ReTtention)
    assert (method.dense_steps, method.period, method.density) == (dense_steps, 5, 1 / 32)
    assert (method.mask, method.ramp, method.ramp_rate, method.clamp) == ("band", "paper", 0.04, False)
    assert not method.stagger


def test_a_second_transformer_is_seen_in_a_pipeline_and_in_a_folder(tmp_path: Any, monkeypatch: Any) -> None:
    pipe, _ = tiny_pipeline("wan")
    chosen: list[bool] = []

    def note(slug: str, model: Any, pair: bool = False) -> Any:
        chosen.append(pair)
        return method_for(slug, model, pair)

    monkeypatch.setattr("dit_attn.api.method_for", note)
    dit_attn.explain(pipe, "re-ttention")
    pipe.register_modules(transformer_2=pipe.transformer)
    dit_attn.explain(pipe, "re-ttention")
    assert chosen == [False, True]

    config = {"_class_name": "WanTransformer3DModel", "num_attention_heads": 40, "num_layers": 40}
    (tmp_path / "transformer").mkdir()
    (tmp_path / "transformer" / "config.json").write_text(json.dumps(config))
    for second, name in (([None, None], "wan2.1-14b"), (["diffusers", "WanTransformer3DModel"], "wan2.2-a14b")):
        index = {"_class_name": "WanPipeline", "transformer": ["diffusers", "WanTransformer3DModel"]}
        (tmp_path / "model_index.json").write_text(json.dumps({**index, "transformer_2": second}))
        model = describe(str(tmp_path)).transformer
        preset = preset_for(model, pair=model.pair)
        assert preset is not None and preset.name == name


def test_an_unknown_preset_is_named_and_an_unknown_model_gets_the_defaults() -> None:
    with pytest.raises(DitAttnError, match="unknown preset 'wan'"):
        preset_for(None, "wan")
    assert preset_for(torch.nn.Linear(1, 1)) is None
    assert method_for("re-ttention", torch.nn.Linear(1, 1)) == ReTtention()


def test_settings_are_compared_with_the_preset_where_they_are_closer_to_it_than_to_the_defaults() -> None:
    model = type("PixArtTransformer2DModel", (), {"config": {"num_attention_heads": 2, "num_layers": 6}})()
    use = preset_use(method_for("block-sparse", model), model)
    assert use == PresetUse("block-sparse", "tiny-image", "guess")
    changed = dataclasses.replace(method_for("block-sparse", model), density=0.7)
    assert preset_use(changed, model) == PresetUse("block-sparse", "tiny-image", "guess", ("density",))
    assert preset_use(dit_attn.BlockSparse(density=0.7), model) is None
    assert preset_use(dit_attn.SLG(), model) is None  # the preset has no such method


def test_every_provenance_has_words() -> None:
    found = {settings["provenance"] for preset in presets() for settings in preset.methods.values()}
    assert found <= set(PROVENANCES)
