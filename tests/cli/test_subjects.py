"""Subjects of the command line: from a file into the methods, and what is wrong with them before torch is imported."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

import dit_attn
from dit_attn import SaaS, SubjectIsolation
from dit_attn.cli import load_pipeline, main, model_source, subjects
from dit_attn.cli.jobs import Job
from dit_attn.cli.method_options import MethodSpec
from dit_attn.cli.options import Options
from dit_attn.cli.resolve_methods import resolve
from dit_attn.errors import DitAttnError
from tests._support.edit_pipelines import editing

LEFT, RIGHT = [0.0, 0.0, 0.4, 1.0], [0.5, 0.0, 1.0, 1.0]
TWO = [{"piece": "red circle", "box": LEFT}, {"piece": "blue cross", "box": RIGHT}]
JOB = Job(0, "a red circle and a blue cross", 0, {"width": 64, "height": 32})


def made(folder: Path, data: Any, specs: Any = (), job: Job = JOB, **options: Any) -> list[MethodSpec]:
    file = folder / "s.json"
    file.write_text(json.dumps(data))
    values = {"subjects": str(file), **options}
    return subjects.with_subjects(Options(values), list(specs), [job])


def test_subjects_alone_mean_isolation_and_go_to_the_method_that_is_named(tmp_path: Path) -> None:
    (spec,) = made(tmp_path, TWO)
    assert spec.name == "isolation" and spec.settings["subjects"] == TWO
    named = [MethodSpec("block-sparse"), MethodSpec("isolation", {"isolate_image": "true"})]
    specs = made(tmp_path, TWO, named)
    assert [one.name for one in specs] == ["block-sparse", "isolation"] and "subjects" not in specs[0].settings
    (method,) = resolve(specs[1:], SimpleNamespace(config={}), "none")
    assert method == SubjectIsolation(subjects=TWO, isolate_image=True)
    assert subjects.with_subjects(Options({}), named, [JOB]) == named


def test_saas_takes_subjects_whose_boxes_may_overlap_and_no_pieces_beside_them(tmp_path: Path) -> None:
    wide = [{**one, "box": [0.0, 0.0, 1.0, 1.0]} for one in TWO]
    (spec,) = made(tmp_path, wide, [MethodSpec("saas", {"stop": "1.0"})])
    assert spec.name == "saas" and spec.settings["subjects"] == wide
    (method,) = resolve([spec], SimpleNamespace(config={}), "none")
    assert method == SaaS(subjects=wide, stop=1.0) and subjects.pieces_of([method]) == ["red circle", "blue cross"]
    with pytest.raises(DitAttnError, match=r"saas has pieces, and --subjects .* has them too"):
        made(tmp_path, TWO, [MethodSpec("saas", {"pieces": "red circle"})])


def test_boxes_in_pixels_are_of_the_items_or_of_an_embedded_model(tmp_path: Path) -> None:
    data = [{"piece": "red circle", "box": [0, 0, 32, 16]}]
    assert made(tmp_path, data)[0].settings["subjects"][0]["box"] == [0.0, 0.0, 0.5, 0.5]
    bare = Job(0, JOB.prompt, 0, {})
    assert made(tmp_path, data, job=bare, model="tiny-joint")[0].settings["subjects"][0]["box"] == [0, 0, 0.25, 0.125]
    with pytest.raises(DitAttnError, match="is in pixels; give fractions"):
        made(tmp_path, data, job=bare, model="org/name")


@pytest.mark.parametrize(
    ("data", "specs", "problem"),
    [
        ([], (), "has no subject"),
        ([{"piece": "dog", "box": LEFT}], (), "'dog' is not in the prompt 'a red circle and a blue cross'"),
        ([{"piece": [20, 90], "box": LEFT}], (), "is not in the prompt"),
        ([{"piece": "red", "box": [0, 0, 65, 10]}], (), "outside of the picture of 64 x 32"),
        ([{"piece": "red", "box": LEFT}, {"piece": "blue", "box": [0.3, 0, 1, 1]}], (), "overlap"),
        ([{"piece": "red", "mask": "m.png"}], (), "has 16 x 16 pixels, which does not fit 64 x 32"),
        (TWO, [MethodSpec("isolation", {"subjects": "other.json"})], "subjects of its own"),
    ],
)
def test_what_is_wrong_is_one_line(tmp_path: Path, data: Any, specs: Any, problem: str) -> None:
    Image.new("1", (16, 16), 1).save(tmp_path / "m.png")
    with pytest.raises(DitAttnError, match=problem) as raised:
        made(tmp_path, data, specs)
    assert "\n" not in str(raised.value)


def test_overlapping_boxes_pass_where_the_method_says_whose_tokens_they_are(tmp_path: Path) -> None:
    data = [{"piece": "red", "box": LEFT}, {"piece": "blue", "box": [0.3, 0, 1, 1]}]
    assert made(tmp_path, data, [MethodSpec("isolation", {"overlap": "share"})])


LONG = "a large red circle at the left " * 6 + "and a blue cross"
SMALL = {"width": 128, "height": 128, "max_sequence_length": 16}


@pytest.mark.parametrize(
    ("method", "prompt", "problem"),
    [
        (SubjectIsolation(subjects=TWO), "a red circle", "the piece 'blue cross' is not in the prompt 'a red circle'"),
        (SubjectIsolation(subjects=TWO), LONG, "the prompt is cut off before the piece 'blue cross'"),
        (SaaS(pieces=("a yellow hat",)), "a red circle", "the piece 'a yellow hat' is not in the prompt"),
        (SaaS(pieces=("blue cross",)), LONG, "the prompt is cut off before the piece 'blue cross'"),
        (SubjectIsolation(subjects=[{"piece": "red", "mask": np.ones((2, 4))}]), "red", "4 x 2 pixels, which does not"),
    ],
)
def test_what_a_method_cannot_find_in_an_item_is_one_line_before_weights_are_loaded(
    method: Any, prompt: str, problem: str
) -> None:
    source = model_source.describe("tiny-joint")
    with pytest.raises(DitAttnError, match=problem) as raised:
        subjects.check_methods([method], [Job(0, prompt, 0, SMALL)], source)
    assert "\n" not in str(raised.value) and str(raised.value).startswith("--prompt: ")
    subjects.check_methods([SubjectIsolation(subjects=TWO)], [Job(0, JOB.prompt, 0, SMALL)], source)


@pytest.mark.parametrize("method", ["isolation", "saas:pieces=blue cross"])
def test_a_piece_that_is_cut_off_ends_generate_with_2_and_loads_nothing(
    method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "s.json").write_text(json.dumps(TWO))
    monkeypatch.setattr(load_pipeline, "load_pipeline", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    given = ["--subjects", str(tmp_path / "s.json")] if method == "isolation" else []
    command = ["generate", "--model", "tiny-joint", "--prompt", LONG, "--method", method, "--output", str(tmp_path)]
    assert main([*command, *given]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "is cut off before the piece 'blue cross'" in line


def test_a_text_that_is_known_in_a_run_only_is_left_to_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, _ = editing("qwen-image-edit", monkeypatch)
    subjects.check_tokens([SaaS(pieces=("a cube",))], [Job(0, "a cube", 0, {"image": "in.png"})], pipe)


def test_pieces_of_all_methods_are_named_once() -> None:
    ranged = [{"piece": [0, 3], "box": LEFT}, TWO[1]]
    methods = [SubjectIsolation(subjects=ranged), SaaS(pieces=("blue cross", "red")), dit_attn.BlockSparse()]
    assert subjects.pieces_of(methods) == ["blue cross", "red", (0, 3)]


def test_reposition_takes_subjects_that_are_moved_and_refuses_a_file_without_one(tmp_path: Path) -> None:
    data = [{"piece": "red circle", "box": LEFT, "from": [32, 0, 64, 32]}, TWO[1]]
    (spec,) = made(tmp_path, data, [MethodSpec("reposition")])
    assert spec.settings["subjects"][0]["from"] == [0.5, 0.0, 1.0, 1.0]
    with pytest.raises(DitAttnError, match='no subject is to be moved; add "from"'):
        made(tmp_path, TWO, [MethodSpec("reposition")])
