"""Edits: instructions invert, pieces apply in any order, the split holds, the verifier tells edited from unedited."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import permutations

import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.eval.shapes_world import edit_samples, edits, multi
from dit_attn.eval.shapes_world.edit_verify import judge_edit
from dit_attn.eval.shapes_world.edits import Edit, Piece

PAIR = multi.parse(multi.EXAMPLE)


def _drawn(count: int, **options) -> list[Edit]:
    return edit_samples.sample_edits(count, torch.Generator().manual_seed(0), **options)


def test_every_instruction_parses_back_to_its_pieces():
    drawn = [*_drawn(150), *edit_samples.held_out_sample(50)]
    for edit in drawn:
        assert edits.parse(edits.instruction(edit.pieces)) == edit.pieces
    words = {word for edit in drawn for word in edits.instruction(edit.pieces).replace(",", "").split()}
    assert words <= set(edits.vocabulary())


def test_an_instruction_is_what_a_person_would_write():
    pieces = (Piece("recolor", "circle", "green"), Piece("remove", "cross"))
    assert edits.instruction(pieces) == edits.EXAMPLE
    for text in ("Make the circle green and remove the cross", "make the circle green, and remove the cross."):
        assert edits.parse(text) == pieces
    assert multi.caption(edits.apply(PAIR, pieces)) == "a large green circle at the left on white"


def test_every_kind_changes_its_own_word():
    texts = {
        "make the circle yellow": "a large yellow circle at the left and a small blue cross at the right on white",
        "make the circle small": "a small red circle at the left and a small blue cross at the right on white",
        "turn the circle into a square": "a large red square at the left and a small blue cross at the right on white",
        "move the circle to the top left": "a large red circle at the top left and a small blue cross at the right "
        "on white",
        "remove the circle": "a small blue cross at the right on white",
        "make the background black": "a large red circle at the left and a small blue cross at the right on black",
    }
    for text, after in texts.items():
        assert multi.caption(edits.apply(PAIR, edits.parse(text))) == after
    alone = multi.parse("a large red circle at the left on white")
    added = edits.apply(alone, edits.parse("add a small blue cross at the right"))
    assert added == PAIR


def test_the_order_of_the_pieces_does_not_matter():
    for edit in _drawn(20, objects=(3, 4), pieces=(3, 3)):
        after = [edits.apply(edit.source, order) for order in permutations(edit.pieces)]
        assert len({(frozenset(scene.objects), scene.background) for scene in after}) == 1
        flags = {edit_samples.held_out(replace(edit, pieces=order)) for order in permutations(edit.pieces)}
        assert len(flags) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("make the triangle red", "has no triangle to recolor; it has circle, cross"),
        ("make the circle red", "changes nothing: it is red already"),
        ("make the circle green, remove the circle", "two pieces change the circle"),
        ("make the circle blue", "have the color blue"),
        ("move the circle to the right", "overlap"),
        ("remove the circle, remove the cross", "has 1 to 4 objects, got 0"),
        ("paint the circle green", "'paint the circle green' is no edit of this world"),
        ("", "is no edit of this world"),
    ],
)
def test_edits_that_cannot_be_are_refused_in_one_line(text, message):
    with pytest.raises(DitAttnError, match=message) as error:
        Edit(PAIR, edits.parse(text))
    assert "\n" not in str(error.value)


def test_training_and_held_out_edits_are_apart_and_kinds_are_about_as_frequent():
    singles = _drawn(280, pieces=(1, 1))
    kinds = Counter(edit.pieces[0].kind for edit in singles)
    assert set(kinds) == set(edits.KINDS) and min(kinds.values()) > 20
    assert not any(edit_samples.held_out(edit) or edit_samples.never_seen(edit) for edit in singles)
    held = edit_samples.held_out_sample(40)
    assert all(map(edit_samples.held_out, held)) and len({(e.source, e.pieces) for e in held}) == 40
    assert Counter(len(edit.pieces) for edit in held) == {1: 10, 2: 10, 3: 10, 4: 10}
    assert edit_samples.held_out_sample(40) == held


@pytest.mark.parametrize("size", [64, 128])
def test_drawn_edits_are_right_and_images_that_were_not_edited_follow_nothing(size):
    drawn = [*_drawn(60), *edit_samples.held_out_sample(40)]
    before, after = edit_samples.render_pairs(drawn, size, generator=torch.Generator().manual_seed(1))
    edited = [judge_edit(image, edit) for image, edit in zip(after, drawn, strict=True)]
    unedited = [judge_edit(image, edit) for image, edit in zip(before, drawn, strict=True)]
    flags = [flag for one in edited for flag in (*one.followed, *one.kept, one.background, one.count)]
    assert sum(flags) >= 0.99 * len(flags)
    assert not any(flag for one in unedited for flag in one.followed)
    kept = [flag for one in unedited for flag in one.kept]
    assert sum(kept) >= 0.99 * len(kept)


def test_the_verifier_tells_one_wrong_piece_and_one_changed_object():
    source = multi.parse("a large red circle at the left and a small blue cross at the right on white")
    edit = Edit(source, edits.parse("make the circle green, make the background black"))
    half = multi.parse("a large green circle at the left and a large blue cross at the right on white")
    verdict = judge_edit(multi.render_scenes([half], 64)[0], edit)
    assert verdict.followed == (True, False) and verdict.kept == (False,)
    assert verdict.attributes() == {"followed": False, "kept": False, "background": False, "count": True}


def test_what_is_moved_must_leave_and_what_takes_its_place_is_not_it():
    source = multi.parse("a large red circle at the left and a small blue cross at the right on white")
    copied = multi.parse("a large red circle at the top left and a small blue cross at the right on white")
    move = Edit(copied, edits.parse("move the circle to the bottom left"))
    both = multi.render_scenes(
        [
            multi.parse(
                "a large red circle at the bottom left and a small blue cross at the right "
                "and a large yellow square at the top left on white"
            )
        ],
        64,
    )[0]
    assert judge_edit(both, move).followed == (False,)
    swap = Edit(source, edits.parse("remove the circle, move the cross to the left"))
    assert judge_edit(multi.render_scenes([source], 64)[0], swap).followed == (False, False)
    assert judge_edit(multi.render_scenes([swap.target], 64)[0], swap).followed == (True, True)


def test_what_no_piece_names_stays_where_it_is_to_the_pixel():
    scene = multi.parse("a large red circle at the left and a small blue cross at the right on white")
    edit = Edit(scene, edits.parse("make the circle green"))
    before, after = edit_samples.render_pairs([edit], 64, generator=torch.Generator().manual_seed(3))
    assert torch.equal(before[..., 32:], after[..., 32:])
    assert not torch.equal(before[..., :32], after[..., :32])
    exact = edit_samples.render_pairs([edit], 64)[0]
    assert torch.equal(exact, multi.render_scenes([scene], 64)) and not torch.equal(exact, before)
