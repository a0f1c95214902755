"""Images and videos of a folder by name, and what is said of a folder without them."""

from __future__ import annotations

import pytest

from dit_attn.errors import DitAttnError
from dit_attn.eval.listing import folders_with_media, media_files


@pytest.fixture
def parent(tmp_path):
    for name in ("a-dense", "a-softpag", "b-dense", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / ("x.png" if name != "notes" else "x.txt")).write_bytes(b"")
    return tmp_path


def test_hidden_files_sheets_and_other_kinds_do_not_count(tmp_path):
    for name in ("b.MP4", "a.png", ".c.png", "sheet.png", "a.json"):
        (tmp_path / name).write_bytes(b"")
    assert [file.name for file in media_files(tmp_path)] == ["a.png", "b.MP4"]


def test_a_folder_of_folders_names_those_that_count_and_a_command_for_two_of_one_model(parent):
    told = f"a-dense, a-softpag, b-dense; try: dit-attn eval {parent}/a-softpag --reference {parent}/a-dense"
    assert folders_with_media(parent).endswith(told)
    with pytest.raises(DitAttnError, match=r"no image or video in .*; its folders have some: a-dense"):
        media_files(parent)


def test_without_a_dense_folder_the_first_one_is_to_be_tried(parent):
    for name in ("a-dense", "b-dense"):
        (parent / name / "x.png").unlink()
    assert folders_with_media(parent) == f"its folders have some: a-softpag; try: dit-attn eval {parent}/a-softpag"


def test_folders_without_media_are_not_named(tmp_path):
    (tmp_path / "empty").mkdir()
    assert folders_with_media(tmp_path) == ""
    with pytest.raises(DitAttnError, match="give a folder of images"):
        media_files(tmp_path)
