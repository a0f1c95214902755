"""The names of methods and settings in the source files are those of the classes."""

from __future__ import annotations

import dataclasses

from dit_attn.cli.method_index import check_names, declared_settings
from dit_attn.processors.methods import methods


def test_the_sources_tell_the_same_methods_and_settings_as_the_classes():
    known = {slug: cls for slug, cls in methods().items() if cls.__module__.startswith("dit_attn.")}
    assert declared_settings() == {
        slug: tuple(field.name for field in dataclasses.fields(cls)) for slug, cls in sorted(known.items())
    }


def test_methods_defined_elsewhere_are_accepted_where_the_methods_are_imported():
    check_names("a-method-of-somebody", ["amount"])
