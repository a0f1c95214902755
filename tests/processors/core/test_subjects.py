"""Subjects in every format they come in, and what is wrong with them in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dit_attn.errors import DitAttnError
from dit_attn.processors.core import subjects
from dit_attn.processors.core.subjects import (
    box_at,
    check_mask_size,
    check_overlap,
    mask_of,
    parse_subjects,
    shown_boxes,
)

BOX = [0.25, 0.0, 0.5, 0.75]
ONE = ({"piece": "red cube", "box": BOX},)


@pytest.mark.parametrize(
    "data",
    [
        [{"piece": "red cube", "box": BOX}],
        [{"phrase": " red cube ", "box": tuple(BOX)}],
        {"subjects": [{"text": "red cube", "bbox": [0.25, 0.0, 0.25, 0.75]}]},
        {"size": [200, 100], "subjects": [{"label": "red cube", "box": [50, 0, 100, 75]}]},
        {"phrases": ["red cube"], "boxes": [BOX]},
        {"gligen_phrases": ["red cube"], "gligen_boxes": [BOX]},
    ],
    ids=["fractions", "phrase", "coco", "pixels", "lists", "gligen"],
)
def test_every_format_is_one_form(data: Any) -> None:
    assert parse_subjects(data) == ONE
    assert parse_subjects(json.loads(json.dumps(ONE))) == ONE


def test_pixels_are_of_the_size_that_is_given_or_that_the_data_say() -> None:
    item = {"piece": "red", "box": [32, 0, 64, 96]}
    assert parse_subjects([item], (128, 128)) == ({"piece": "red", "box": BOX},)
    assert parse_subjects({"size": [64, 192], "subjects": [item]}, (128, 128))[0]["box"] == [0.5, 0.0, 1.0, 0.5]


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"piece": "red"}, "unknown key in subjects: 'piece'"),
        ("red", "must be a list such as"),
        ([["red", BOX]], r'must be an object with a "piece"'),
        ([{"box": BOX}], r'subject 1 needs a "piece"'),
        ([{"piece": "  "}], r'needs a "piece"'),
        ([{"piece": [3, 2]}], r'needs a "piece"'),
        ([{"piece": "red", "box": [0, 0, 1]}], r"subject 1 \('red'\): a box must be \[left, top"),
        ([{"piece": "red", "box": [0.5, 0, 0.5, 1]}], "is empty"),
        ([{"piece": "red", "box": [-0.1, 0, 0.5, 1]}], "reaches outside of the picture"),
        ([{"piece": "red", "box": [0, 0, 40, 20]}], "is in pixels; give fractions"),
        ({"size": [32, 32], "subjects": [{"piece": "red", "box": [0, 0, 40, 20]}]}, "outside .* of 32 x 32 pixels"),
        ({"size": [0, 32], "subjects": []}, r"size must be \[width, height\]"),
        ([{"piece": "red", "box": BOX, "mask": "m.png"}], "has box and mask; give one"),
        ([{"piece": "red", "boxes": []}], "boxes must be a list"),
        ([{"piece": "red", "color": 1}], "unknown key in subjects, subject 1"),
        ([{"piece": "red", "mask": "missing.png"}], "cannot read the mask missing.png"),
        ([{"piece": "red", "mask": "data:image/png;base64,xx"}], "not a readable image|no PNG data"),
        ([{"piece": "red", "mask": torch.zeros(4, 4)}], "the mask is black"),
        ([{"piece": "red", "mask": torch.zeros(2, 4, 4)}], "a mask is a file, a PIL image or an"),
        ({"phrases": ["red", "blue"], "boxes": [BOX]}, "two lists of the same length"),
    ],
)
def test_what_is_wrong_is_one_line(data: Any, problem: str) -> None:
    with pytest.raises(DitAttnError, match=problem) as raised:
        parse_subjects(data)
    assert "\n" not in str(raised.value)


def test_a_mask_is_the_same_from_a_file_an_image_an_array_or_a_tensor(tmp_path: Path) -> None:
    drawn = np.zeros((6, 8), dtype=bool)
    drawn[2:5, 1:4] = True
    image = Image.fromarray(drawn)
    image.save(tmp_path / "m.png")
    file = tmp_path / "subjects.json"
    file.write_text(json.dumps([{"piece": "red", "mask": "m.png"}]))
    forms = (image, image.convert("RGB"), drawn, drawn.astype(np.uint8) * 255, torch.tensor(drawn)[None].float())
    found = [parse_subjects([{"piece": "red", "mask": form}]) for form in forms]
    found.append(subjects.read_subjects(file))
    found.append(parse_subjects(found[0]))
    assert all(one == found[0] for one in found)
    mask = mask_of(found[0][0])
    assert (mask.width, mask.height) == (8, 6) and (np.asarray(mask) == drawn).all()
    check_mask_size(found[0], (800, 600))
    with pytest.raises(DitAttnError, match="has 8 x 6 pixels, which does not fit 800 x 800"):
        check_mask_size(found[0], (800, 800))


def test_a_mask_is_shown_by_the_box_around_it() -> None:
    drawn = np.zeros((4, 8), dtype=bool)
    drawn[1:, 2:4] = True
    masked, boxed = parse_subjects([{"piece": "a", "mask": drawn}, {"piece": "b", "box": BOX}])
    assert shown_boxes(masked) == [(0.25, 0.25, 0.5, 1.0)] and shown_boxes(boxed) == [BOX]


def test_a_file_that_is_missing_or_no_json_is_said(tmp_path: Path) -> None:
    with pytest.raises(DitAttnError, match=r"cannot read subjects .*check the path"):
        subjects.read_subjects(tmp_path / "none.json")
    (tmp_path / "bad.json").write_text("[")
    with pytest.raises(DitAttnError, match="is not JSON"):
        subjects.read_subjects(tmp_path / "bad.json")


def test_a_moving_box_is_between_its_neighbors() -> None:
    boxes = [[0.0, 0.0, 0.2, 0.2], [0.4, 0.0, 0.6, 0.2], [0.4, 0.8, 0.6, 1.0]]
    assert [box_at(boxes, time)[:2] for time in (0.0, 0.25, 0.5, 1.0)] == [(0, 0), (0.2, 0), (0.4, 0), (0.4, 0.8)]
    assert box_at(boxes[:1], 0.7) == tuple(boxes[0])


def test_boxes_that_overlap_or_cross_are_refused_and_neighbors_are_not() -> None:
    left, right = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]
    check_overlap(parse_subjects([{"piece": "a", "box": left}, {"piece": "b", "box": right}]))
    with pytest.raises(DitAttnError, match="the boxes of 'a' and 'b' overlap"):
        check_overlap(parse_subjects([{"piece": "a", "box": left}, {"piece": "b", "box": [0.4, 0, 1, 1]}]))
    crossing = [{"piece": "a", "boxes": [left, right]}, {"piece": "b", "boxes": [right, left]}]
    with pytest.raises(DitAttnError, match="overlap"):
        check_overlap(parse_subjects(crossing))
