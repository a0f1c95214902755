"""Addresses of attention heads: what a user may write, and which layer and head it means."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import dit_attn
from dit_attn.processors.guidance import heads

LAYERS: dict[str, int | None] = {f"blocks.{i}.attn1": 8 for i in range(12)} | {"single.0.attn": 4}
NAMES = list(LAYERS)


def meant(text: Any, strength: float = 1.0) -> heads.Strengths:
    return heads.resolve(heads.canonical(text), LAYERS, strength)


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("blocks.3.attn1:0,4,7", {"blocks.3.attn1": {0: 1.0, 4: 1.0, 7: 1.0}}),
        ("3:0-2,7", {"blocks.3.attn1": {0: 1.0, 1: 1.0, 2: 1.0, 7: 1.0}}),
        ("3 : 0 , 4 @ 1", {"blocks.3.attn1": {0: 1.0, 4: 1.0}}),
        ("3: 0, 4", {"blocks.3.attn1": {0: 1.0, 4: 1.0}}),
        ("L3H4@0.5", {"blocks.3.attn1": {4: 0.5}}),
        ("L3H4@0.5, L11H0", {"blocks.3.attn1": {4: 0.5}, "blocks.11.attn1": {0: 1.0}}),
        ("blocks.2.attn1:1,blocks.4.attn1:2", {"blocks.2.attn1": {1: 1.0}, "blocks.4.attn1": {2: 1.0}}),
        ("1:0;2:1\n3:2 4:3", {f"blocks.{i}.attn1": {i - 1: 1.0} for i in (1, 2, 3, 4)}),
        ("single.0", {"single.0.attn": dict.fromkeys(range(4), 1.0)}),
        (12, {"single.0.attn": dict.fromkeys(range(4), 1.0)}),
        ("blocks.2-3:0", {"blocks.2.attn1": {0: 1.0}, "blocks.3.attn1": {0: 1.0}}),
        ("2-3:0", {"blocks.2.attn1": {0: 1.0}, "blocks.3.attn1": {0: 1.0}}),
        ("*:0", {name: {0: 1.0} for name in NAMES}),
        ({(3, 0): 0.5, ("blocks.1.attn1", 2): 0.25}, {"blocks.1.attn1": {2: 0.25}, "blocks.3.attn1": {0: 0.5}}),
        ({"single.0.attn": 0.5}, {"single.0.attn": dict.fromkeys(range(4), 0.5)}),
        ([(3, 0), (3, 1, 0.5), "4:2"], {"blocks.3.attn1": {0: 1.0, 1: 0.5}, "blocks.4.attn1": {2: 1.0}}),
        ([("single.0.attn", None, 0.5)], {"single.0.attn": dict.fromkeys(range(4), 0.5)}),
    ],
)  # fmt: skip
def test_every_way_of_naming_heads(written: Any, expected: heads.Strengths) -> None:
    assert meant(written) == expected


def test_a_layer_is_not_a_prefix_of_another_ones_number() -> None:
    assert list(meant("blocks.1:0")) == list(meant("L1H0")) == ["blocks.1.attn1"]


def test_the_last_entry_for_a_head_wins_and_strength_zero_leaves_it_out() -> None:
    assert meant("3:0,1@0.2;3:1@0.9") == {"blocks.3.attn1": {0: 0.2, 1: 0.9}}
    assert meant("single.0;single.0:1-3@0") == {"single.0.attn": {0: 1.0}}
    assert meant("3:0@0") == {}


def test_entries_without_a_strength_take_the_methods() -> None:
    assert meant("3:0;3:1@0.75", 0.3) == {"blocks.3.attn1": {0: 0.3, 1: 0.75}}


def test_a_saved_list_means_the_same_whichever_way_it_was_written(tmp_path: Path) -> None:
    pairs = [[3, 0, 0.5], [4, 1]]
    for index, content in enumerate((pairs, {"heads": pairs}, {"heads": "3:0@0.5;4:1"})):
        file = tmp_path / f"{index}.json"
        file.write_text(json.dumps(content))
        assert meant(file) == meant(str(file)) == meant("3:0@0.5;4:1")
        assert dit_attn.SoftPAG(heads=str(file)) == dit_attn.SoftPAG(heads="3:0@0.5;4:1")  # not tied to the file


chosen = st.lists(
    st.tuples(
        st.sampled_from(NAMES), st.integers(0, 3), st.floats(0.0, 1.0, exclude_min=True)
    ),
    unique_by=lambda item: item[:2],
    max_size=12,
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(items=chosen, order=st.randoms(use_true_random=False))
def test_text_lists_and_dictionaries_agree_in_any_order(items: list[tuple[str, int, float]], order: Any) -> None:
    shuffled = list(items)
    order.shuffle(shuffled)
    found = meant(items)
    assert found == meant(shuffled) == meant({(layer, head): u for layer, head, u in items})
    assert found == meant(heads.address(found)) == meant([*items, *items])
    assert {(layer, head, u) for layer, values in found.items() for head, u in values.items()} == set(items)
    text = heads.canonical(items)
    assert heads.canonical(text) == text


@pytest.mark.parametrize(
    "written",
    [
        "3:x", "3@", "@0.5", ":0", "3:", "3:-1", {(3, -1): 0.5}, "3:5-2", "5-3:0", "blocks.5-3.attn1", "3:0.5",
        "3:0,4:1", None, True, 3.5, [3, 4], [(3, "x")], {(3, 0): "a"}, {(3, 0, 1): 0.5}, {(3, (0, 1)): 0.5},
        [(1, 2, 3, 4)], "3:\u00b2", "3:0-999999999", "0-999999999:0", "blocks.0-999999999",
    ],
    ids=repr,
)  # fmt: skip
def test_what_cannot_be_read_is_refused_with_the_grammar(written: Any) -> None:
    with pytest.raises(dit_attn.DitAttnError, match="cannot be parsed"):
        heads.canonical(written)


def test_a_digit_that_is_no_number_is_no_layer() -> None:
    with pytest.raises(dit_attn.DitAttnError, match="no self or joint attention layer is called"):
        meant("\u00b2")


@pytest.mark.parametrize("strength", ["-0.1", "1.5", "nan", "inf"])
def test_a_strength_outside_the_unit_interval_is_refused(strength: str) -> None:
    with pytest.raises(dit_attn.DitAttnError, match=r"\[0, 1\]"):
        heads.canonical(f"3:0@{strength}")
    with pytest.raises(dit_attn.DitAttnError, match="between 0"):
        dit_attn.SoftPAG(u=float(strength))


@pytest.mark.parametrize(
    ("written", "told"),
    [
        ("3:8", "has no head 8: its heads are 0 to 7"),
        ("single.0:4", "has no head 4"),
        ("13:0", "no layer 13: this model has layers 0 to 12"),
        ("10-13", "no layer 13"),
        ("blocks.12:0", "no self or joint attention layer is called 'blocks.12'"),
        ("blocks.3.attn2:0", "cross attention"),
        ("Lx", "no self or joint attention layer"),
    ],
)
def test_what_a_model_does_not_have_is_refused_by_name(written: str, told: str) -> None:
    with pytest.raises(dit_attn.DitAttnError, match=told):
        meant(written)


def test_a_layer_that_hides_its_number_of_heads_needs_them_named() -> None:
    assert heads.resolve("0:5", {"a": None}, 1.0) == {"a": {5: 1.0}}
    with pytest.raises(dit_attn.DitAttnError, match="number of heads of a is unknown"):
        heads.resolve("0", {"a": None}, 1.0)


@pytest.mark.parametrize(
    ("content", "told"),
    [(None, "No such file"), ("{", "not JSON"), ('{"found": 3}', "holds no heads"), ("[]", "holds no heads")],
)
def test_a_file_without_heads_is_refused_by_name(tmp_path: Path, content: str | None, told: str) -> None:
    file = tmp_path / "found.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(dit_attn.DitAttnError, match=told) as caught:
        dit_attn.SoftPAG(heads=str(file))
    assert "found.json" in str(caught.value)
