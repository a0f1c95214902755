"""Captions of the shapes world for the embedded models that draw it."""

from __future__ import annotations

import pytest

from dit_attn import models
from dit_attn.cli import captions
from dit_attn.eval.shapes_world import multi, world


@pytest.mark.parametrize("name", ["tiny-image", "tiny-video", "tiny-joint", "tiny-multi"])
def test_captions_are_those_that_a_model_knows_held_out_or_in_training(name: str) -> None:
    defaults = models.call_defaults(name)
    parse = multi.parse if name == "tiny-multi" else world.parse
    assert captions.has_captions("embedded", name)
    assert captions.knows_shapes("embedded", name) == (name != "tiny-multi")  # the judge has no words for several
    held = captions.held_out_captions(defaults, 3)
    for texts in (held, captions.shuffled_captions(defaults, True, 3), captions.shuffled_captions(defaults, False, 3)):
        assert len({parse(text) for text in texts}) == 3


def test_models_of_other_worlds_have_none() -> None:
    assert not captions.has_captions("embedded", "tiny-inspect")
    assert not captions.has_captions("hub", "org/model")
