"""The stand-ins made of the source files are the methods, as far as settings go."""

from __future__ import annotations

import dataclasses
import typing

import pytest

from dit_attn.cli import method_index
from dit_attn.cli.commands.methods import describe
from dit_attn.cli.method_index import check_method, known_methods, stand_ins
from dit_attn.errors import DitAttnError
from dit_attn.processors.methods import methods

CLASSES = {slug: cls for slug, cls in methods().items() if cls.__module__.startswith("dit_attn.")}


@pytest.fixture
def not_imported(monkeypatch):
    """As if the methods were not imported yet."""
    monkeypatch.setattr(method_index, "_BASE", "dit_attn.nowhere")


def test_every_method_has_a_stand_in_with_the_same_fields_and_the_same_description():
    assert set(stand_ins()) == set(CLASSES)
    for slug, cls in CLASSES.items():
        stand_in = stand_ins()[slug]
        assert typing.get_type_hints(stand_in).items() <= typing.get_type_hints(cls).items()
        fields = [
            [(one.name, one.default, one.metadata, one.kw_only) for one in dataclasses.fields(kind)]
            for kind in (stand_in, cls)
        ]
        assert fields[0] == fields[1]
        assert describe(stand_in) == describe(cls)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("blok-sparse", {}, "Did you mean 'block-sparse'"),
        ("block-sparse", {"densty": "0.5"}, "Did you mean 'density'"),
        ("block-sparse", {"density": "2"}, "density must be between"),
        ("block-sparse", {"density": "much"}, "density must be a number"),
        ("block-sparse", {"keep": "text,diagonl"}, "Did you mean 'diagonal'"),
        ("softpag", {"heads": 3}, "put it in quotes"),
        ("absent.json", {}, "no such file or folder"),
        ("./absent", {}, "no such file or folder"),
    ],
)
def test_what_the_class_refuses_is_refused_without_the_class(not_imported, name, settings, message):
    with pytest.raises(DitAttnError, match=message):
        check_method(name, settings)


def test_what_fits_passes(not_imported):
    check_method("block-sparse", {"density": "0.5", "keep": "text,diagonal", "dense_layers": [0, 1]})
    check_method("org/on-the-hub", {})
    assert known_methods() == stand_ins()


def test_methods_defined_elsewhere_are_accepted_where_the_methods_are_imported():
    check_method("a-method-of-somebody", {"amount": "1"})
    assert set(CLASSES) <= set(known_methods())
