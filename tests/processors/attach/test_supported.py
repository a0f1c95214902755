"""Which methods run on which families: a dictionary that prints as a table."""

from __future__ import annotations

import json

import dit_attn
from dit_attn.processors.attach.families import families
from dit_attn.processors.attach.supported import SupportedFamilies
from dit_attn.processors.methods import methods


def test_every_family_is_there_with_its_models_and_methods_and_as_json() -> None:
    found = dit_attn.supported()
    assert list(found) == [row.name for row in families()]
    assert found["wan"]["methods"] == sorted(methods()) and found["wan"]["refused"] is None
    assert found["sana"]["methods"] == [] and "linear" in found["sana"]["refused"]
    assert json.loads(json.dumps(found)) == found == dict(found)


def test_it_prints_as_a_line_for_every_family_and_the_methods_once() -> None:
    text = repr(dit_attn.supported())
    assert text == str(dit_attn.supported()) and text.count("re-ttention") == 1
    lines = text.splitlines()
    assert lines[0].startswith("methods ") and all(len(line) <= 100 for line in lines)
    names = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert names[1:] == [row.name for row in families()]
    assert "none, its self attention is linear" in text
    assert dit_attn.supported()._repr_html_().count("<tr>") == len(families()) + 1


def test_a_family_with_fewer_methods_names_those_it_lacks() -> None:
    rows = {
        "a": {"models": "A", "transformers": [], "methods": ["slg", "stg"], "refused": None},
        "b": {"models": "B", "transformers": [], "methods": ["slg"], "refused": None},
    }
    assert repr(SupportedFamilies(rows)).splitlines() == ["methods slg, stg", "a       A", "b       B: without stg"]
    assert repr(SupportedFamilies()) == ""
