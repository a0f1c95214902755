"""Methods are settings: checked at the edge, printed so that they paste back, saved and read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import dit_attn
from dit_attn import BlockSparse, DitAttnError, Method
from dit_attn.processors.block_sparse import forced_blocks
from dit_attn.processors.method import methods, share
from dit_attn.processors.presets import presets
from dit_attn.processors.tokens import Span, TokenLayout, visual_span


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
        ({"dense_steps": -1}, ["dense_steps", "-1"]),
    ],
)
def test_values_out_of_range_are_named_in_one_line(settings: dict[str, object], words: list[str]) -> None:
    with pytest.raises(DitAttnError) as caught:
        BlockSparse(**settings)  # type: ignore[arg-type]
    message = str(caught.value)
    assert "\n" not in message and all(word in message for word in words)


def test_unknown_method_and_setting_name_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(DitAttnError, match=r"block-sparce.*Did you mean 'block-sparse'"):
        Method.from_dict({"method": "block-sparce"})
    with pytest.raises(DitAttnError, match=r"densty.*density"):
        Method.from_dict({"method": "block-sparse", "densty": 0.1})
    (tmp_path / "dit_attn_method.json").write_text("{not json")
    with pytest.raises(DitAttnError, match="not JSON"):
        Method.from_pretrained(tmp_path)


def test_shares_are_fractions_or_counts() -> None:
    assert [share(0.1, 20), share(3, 20), share(1.0, 20), share(30, 20)] == [2, 3, 20, 20]


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
