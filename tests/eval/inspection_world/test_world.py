"""Pieces of the inspection world: exact masks, one seed one piece, defects on the product."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.eval.inspection_world import measures, real_textures, world
from dit_attn.eval.inspection_world.defects import DEFECTS
from dit_attn.eval.inspection_world.products import PRODUCTS
from dit_attn.eval.inspection_world.world import Piece, draw

PAIRS = [(product, defect) for product in PRODUCTS for defect in DEFECTS]


@pytest.mark.parametrize(("product", "defect"), PAIRS)
def test_the_mask_is_where_the_defect_changed_the_product(product, defect):
    for seed in range(3):
        drawn = draw(Piece(product, defect, seed), 64)
        assert drawn.image.dtype == np.float32 and drawn.image.shape == (64, 64, 3)
        assert 0.004 < drawn.mask.mean() < 0.3
        assert not (drawn.mask & ~drawn.foreground).any()
        np.testing.assert_array_equal(drawn.image[~drawn.mask], drawn.normal[~drawn.mask])
        assert np.abs(drawn.image - drawn.normal).max(-1)[drawn.mask].min() > 1 / 255


def test_a_piece_follows_from_its_words_and_seed_and_a_normal_one_is_its_twin():
    one, again, other = (draw(Piece("metal", "scratch", seed), 32) for seed in (1, 1, 2))
    np.testing.assert_array_equal(one.image, again.image)
    assert (one.image != other.image).any()
    normal = draw(Piece("metal", "", 1), 32)
    assert not normal.mask.any()
    assert np.abs(normal.image - one.normal).mean() < 0.02  # the same surface under other sensor noise


def test_a_larger_canvas_shows_the_same_piece():
    small, large = (draw(Piece("nut", "stain", 4), size) for size in (64, 128))
    shrunk = large.normal.reshape(64, 2, 64, 2, 3).mean((1, 3))
    assert np.abs(shrunk - small.normal).mean() < 0.03


def test_training_draws_no_held_out_pair_and_no_held_out_seed():
    pieces = world.sample_pieces(400, torch.Generator().manual_seed(0), 0.8)
    assert not {(piece.product, piece.defect) for piece in pieces} & set(world.HELD_OUT_PAIRS)
    assert all(piece.seed < world.FIRST_HELD_OUT_SEED for piece in pieces)
    assert 0.7 < np.mean([bool(piece.defect) for piece in pieces]) < 0.9
    assert {word for piece in pieces for word in world.caption(piece).split()} <= set(world.vocabulary())


def test_real_textures_are_cut_into_crops_that_share_no_pixel(monkeypatch):
    photograph = np.arange(512 * 512).reshape(512, 512)
    skimage = ModuleType("skimage")
    skimage.data = SimpleNamespace(brick=lambda: photograph)
    monkeypatch.setitem(sys.modules, "skimage", skimage)
    real_textures._photograph.cache_clear()
    crops = [real_textures.texture("brick", seed, 128)[..., 0] for seed in range(16)]
    assert len(np.unique(np.concatenate([crop.ravel() for crop in crops]))) == 512 * 512
    drawn = draw(Piece("brick", "hole", 3), 64)
    assert drawn.mask.any() and drawn.image.shape == (64, 64, 3)


def test_without_scikit_image_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "skimage", None)
    real_textures._photograph.cache_clear()
    with pytest.raises(DitAttnError, match="'grass' comes with scikit-image; pip install scikit-image"):
        draw(Piece("grass", "", 0), 64)


def test_the_ratio_is_one_for_a_true_defect_and_zero_for_none():
    shots = [draw(Piece("granite", "hole", seed), 64) for seed in range(5)]
    reference = measures.mean_change(shots)
    new = draw(Piece("granite", "hole", 9), 64)
    true = measures.measure(new.image, new.normal, new.mask, reference)
    none = measures.measure(new.normal, new.normal, new.mask, reference)
    half = measures.measure((new.image + new.normal) / 2, new.normal, new.mask, reference)
    assert true.ratio == pytest.approx(1, abs=0.2) and true.fill > 0.85 and true.leak == 0 and true.passed
    assert (none.ratio, none.fill, none.leak, none.passed) == (0, 0, 0, False)
    assert half.ratio == pytest.approx(true.ratio / 2, rel=0.01)


def test_what_changes_off_the_mask_leaks():
    drawn = draw(Piece("metal", "hole", 2), 64)
    moved = np.roll(drawn.image - drawn.normal, 24, axis=1) + drawn.normal
    found = measures.measure(moved, drawn.normal, drawn.mask, measures.mean_change([drawn]))
    assert found.fill < 0.1 and found.leak > 0.01
