"""Constants read from source files are those that an import gives."""

from __future__ import annotations

import importlib

import pytest

from dit_attn.cli.source_index import constant


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("dit_attn.eval.metrics", "METRICS"),
        ("dit_attn.cli.commands.eval.items", "ITEM_METRICS"),
        ("dit_attn.pipelines.compare.metrics", "METRICS"),
        ("dit_attn.pipelines.compare.metrics", "WORLD"),
        ("dit_attn.kernels.benchmark.measure", "SHAPES"),
        ("dit_attn.kernels.benchmark.inputs", "KINDS"),
        ("dit_attn.models.recipe", "RECIPES"),
        ("dit_attn.models.world_clip", "NAME"),
        ("dit_attn.models.world_clip", "CHECKPOINT"),
        ("dit_attn.models.loop", "CHECKPOINT"),
        ("dit_attn.processors.methods.softpag", "TARGETS"),  # which it imports
    ],
)
def test_a_constant_is_the_one_of_the_module(module, name):
    expected = getattr(importlib.import_module(module), name)
    found = constant(module, name)
    assert list(found) == list(expected) if isinstance(expected, dict) else found == expected


def test_what_is_no_constant_is_imported():
    from dit_attn.settings import setting

    assert constant("dit_attn.processors.methods.base", "setting") is setting
