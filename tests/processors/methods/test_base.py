"""Methods are settings: checked at the edge, printed so that they paste back, saved and read."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import json
import pickle
import socket
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import dit_attn
from dit_attn import BlockSparse, DitAttnError, Method
from dit_attn.processors.attach.attention_processor import is_wrapped
from dit_attn.processors.core.token_permute import forced_blocks
from dit_attn.processors.core.tokens import Span, TokenLayout, visual_span
from dit_attn.processors.methods import methods
from dit_attn.processors.methods.base import resolve_count
from dit_attn.processors.methods.presets import presets
from tests._support.compose import tiny


def test_json_round_trip(tmp_path: Path) -> None:
    method = BlockSparse(density=0.125, keep=("text", "first-frame"), dense_layers=(0, -1), dense_steps=3)
    assert Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method
    method.save_pretrained(tmp_path / "m")
    assert Method.from_pretrained(tmp_path / "m") == method


def test_repr_pastes_back() -> None:
    method = BlockSparse(top_p=0.9, kv_block=64)
    assert eval(repr(method)) == method


def test_default_budget_is_a_density() -> None:
    assert BlockSparse().density == 0.25
    assert BlockSparse(top_p=0.9).density is None


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"density": 0.0}, ["density", "0.0"]),
        ({"density": 1.5}, ["density", "1.5"]),
        ({"density": "half"}, ["density", "half"]),
        ({"density": 0.2, "top_p": 0.9}, ["density", "top_p"]),
        ({"q_block": 4}, ["q_block", "4"]),
        ({"keep": ("txt",)}, ["keep", "txt", "text", "first-frame"]),
        ({"keep": 3}, ["keep", "3", "list"]),
        ({"dense_steps": -1}, ["dense_steps", "-1"]),
        ({"dense_steps": 1.5}, ["dense_steps", "1.5", "fraction", "whole number"]),
        ({"dense_steps": True}, ["dense_steps", "True"]),
        ({"dense_layers": 3}, ["dense_layers", "3", "list"]),
        ({"dense_layers": ("a",)}, ["dense_layers", "'a'", "whole number"]),
        ({"dense_layers": (0.5,)}, ["dense_layers", "0.5", "whole number"]),
        ({"q_block": 64.5}, ["q_block", "64.5", "whole number"]),
        ({"max_error": "x"}, ["max_error", "'x'", "at least 0"]),
    ],
)
def test_values_out_of_range_are_named_in_one_line(settings: dict[str, object], words: list[str]) -> None:
    with pytest.raises(DitAttnError) as caught:
        BlockSparse(**settings)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words)


def test_settings_of_an_equal_type_are_taken() -> None:
    method = BlockSparse(density=1, keep="text", dense_layers=[0, -1], q_block=np.int64(64))  # type: ignore[arg-type]
    assert (method.keep, method.dense_layers) == (("text",), (0, -1))
    assert json.loads(json.dumps(method.to_dict()))["q_block"] == 64
    assert hash(method) == hash(BlockSparse(density=1, keep=("text",), dense_layers=(0, -1), q_block=64))


@pytest.mark.parametrize("slug", sorted(methods()))
def test_every_method_round_trips_and_pastes_back(slug: str, tmp_path: Path) -> None:
    method = methods()[slug]()
    assert Method.from_dict(json.loads(json.dumps(method.to_dict()))) == method
    method.save_pretrained(tmp_path)
    assert type(method).from_pretrained(tmp_path) == method
    assert [path.name for path in tmp_path.iterdir()] == ["dit_attn_method.json"]
    names = {name: getattr(dit_attn, name) for name in dit_attn.__all__}
    assert eval(repr(method), names) == method


def test_settings_that_cannot_be_saved_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DitAttnError, match=r"cannot save block-sparse to .*file \(File exists\)"):
        BlockSparse().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "x"


def test_saved_settings_that_are_not_there_cost_one_line_at_once(tmp_path: Path, monkeypatch: Any) -> None:
    from huggingface_hub import constants

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise OSError("no route")

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    with pytest.raises(DitAttnError, match=r"has no dit_attn_method\.json in it"):
        Method.from_pretrained(tmp_path)
    with pytest.raises(DitAttnError, match="no such folder, and no reachable Hub repository"):
        Method.from_pretrained("someone/something")
    with pytest.raises(DitAttnError, match=r"there is no file nowhere\.json"):
        Method.from_pretrained("nowhere.json")
    assert not constants.HF_HUB_OFFLINE  # the process is left as it was


@pytest.mark.parametrize("layer", [2, -3])
def test_a_dense_layer_that_does_not_exist_is_refused_before_anything_is_changed(layer: int) -> None:
    model, _ = tiny("wan")
    method = BlockSparse(dense_layers=(layer,))
    for ask in (dit_attn.enable, dit_attn.explain, dit_attn.attn_processors):
        with pytest.raises(DitAttnError, match=rf"names layer {layer}, but WanTransformer3DModel has 2.*0 to 1"):
            ask(model, method)
    assert not any(is_wrapped(getattr(module, "processor", None)) for module in model.modules())
    dit_attn.enable(model, BlockSparse(dense_layers=(-2, 1)))


@pytest.mark.parametrize("size", [{"height": "tall"}, {"width": 0}, {"num_frames": -1}, {"height": 64.5}])
def test_explain_refuses_a_size_that_is_none(size: dict[str, Any]) -> None:
    model, _ = tiny("wan")
    ((name, value),) = size.items()
    with pytest.raises(DitAttnError, match=rf"{name} must be a whole number of at least 1, got {value!r}"):
        dit_attn.explain(model, BlockSparse(), **size)


def test_unknown_method_and_setting_name_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DitAttnError, match=r"block-sparce.*Did you mean 'block-sparse'"):
        Method.from_dict({"method": "block-sparce"})
    with pytest.raises(DitAttnError, match=r"unknown method \['a'\]"):
        Method.from_dict({"method": ["a"]})
    with pytest.raises(DitAttnError, match=r"densty.*density"):
        Method.from_dict({"method": "block-sparse", "densty": 0.1})
    (tmp_path / "dit_attn_method.json").write_text("{not json")
    with pytest.raises(DitAttnError, match="not JSON"):
        Method.from_pretrained(tmp_path)


def test_shares_are_fractions_or_counts() -> None:
    assert [resolve_count(amount, 20) for amount in (0.1, 3, 1.0, 30)] == [2, 3, 20, 20]


def test_every_preset_holds_valid_settings_and_their_provenance() -> None:
    assert len({preset.name for preset in presets()}) >= 10
    for preset in presets():
        for slug, settings in preset.methods.items():
            values = dict(settings)
            assert values.pop("provenance") in ("paper", "measured", "guess")
            assert slug in methods()
            Method.from_dict({"method": slug, **values})


def test_forced_blocks_cover_text_first_frame_and_diagonal() -> None:
    layout = TokenLayout((Span("text", None), visual_span("video", (4, 4, 4))))
    tokens = layout.resolve(10 + 64)
    assert tokens is not None
    cpu = torch.device("cpu")
    text = forced_blocks(tokens, ("text",), 16, 16, cpu)
    frame = forced_blocks(tokens, ("first-frame",), 16, 16, cpu)
    diagonal = forced_blocks(tokens, ("diagonal",), 16, 16, cpu)
    assert text is not None and frame is not None and diagonal is not None
    assert text[0, 0, 0].tolist() == [True, False, False, False, False]
    assert frame[0, 0, 3].tolist() == [True, True, False, False, False]  # tokens 10..26
    assert diagonal[0, 0, 1].tolist() == [False, True, True, False, False]  # tokens 26..42
    assert forced_blocks(tokens, (), 16, 16, cpu) is None


def test_enable_refuses_what_it_does_not_know() -> None:
    with pytest.raises(DitAttnError, match="not a supported transformer"):
        dit_attn.enable(torch.nn.Linear(2, 2))
    with pytest.raises(DitAttnError, match="no diffusion transformer"):
        dit_attn.enable(object())


# -- keywords ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cls", "value", "example"),
    [
        (dit_attn.BlockSparse, 0.5, "BlockSparse(density=0.5)"),
        (dit_attn.SoftPAG, "3:0", "SoftPAG(heads='3:0')"),
        (dit_attn.SoftPAG, 3.0, "SoftPAG(scale=3.0)"),  # out of the range of u
        (dit_attn.BlockSparse, object(), "BlockSparse(density=...)"),  # what no setting takes
    ],
)
def test_a_positional_setting_is_answered_with_its_keyword(cls: Any, value: object, example: str) -> None:
    with pytest.raises(DitAttnError) as error:
        cls(value)
    assert str(error.value) == f"settings are keywords: {example}"


@pytest.mark.parametrize("cls", methods().values(), ids=methods())
def test_every_constructor_takes_keywords_alone_and_shows_them(cls: Any) -> None:
    parameters = inspect.signature(cls).parameters
    assert list(parameters) == [spec.name for spec in dataclasses.fields(cls)]
    assert {parameter.kind for parameter in parameters.values()} == {inspect.Parameter.KEYWORD_ONLY}


def test_a_misspelt_setting_of_a_constructor_names_the_closest_one() -> None:
    wrong: dict[str, Any] = {"densty": 0.5}
    with pytest.raises(DitAttnError, match=r"unknown setting of block-sparse 'densty'\. Did you mean 'density'\?"):
        dit_attn.BlockSparse(**wrong)
    with pytest.raises(DitAttnError, match=r"Did you mean 'density'\?"):
        dataclasses.replace(dit_attn.BlockSparse(), **wrong)


def test_methods_are_copied_and_pickled_without_their_constructor() -> None:
    method = dit_attn.BlockSparse(density=0.5)
    assert copy.deepcopy(method) == pickle.loads(pickle.dumps(method)) == method
