"""Subjects of the command line: from a file into the methods, and what is wrong with them before torch is imported."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from dit_attn import SubjectIsolation
from dit_attn.cli import subjects
from dit_attn.cli.jobs import Job
from dit_attn.cli.method_options import MethodSpec
from dit_attn.cli.options import Options
from dit_attn.cli.resolve_methods import resolve
from dit_attn.errors import DitAttnError
from tests._support.prompted_pipelines import pipeline_of
from tests.processors.attach.prompt_spans.prompted_cases import CASES

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


def test_a_piece_that_the_length_of_the_text_cuts_off_is_refused_before_the_first_item() -> None:
    pipe, _ = pipeline_of(CASES["cogview-4"])
    long = "a house " * 40 + "and a red cube"
    method = SubjectIsolation(subjects=[{"piece": "red cube", "box": LEFT}])
    subjects.check_tokens([method], [Job(0, "a red cube", 0)], pipe)
    with pytest.raises(DitAttnError, match=r"--prompt: the prompt .*cut off"):
        subjects.check_tokens([method], [Job(0, long, 0, {"max_sequence_length": 32})], pipe)


def test_reposition_takes_subjects_that_are_moved_and_refuses_a_file_without_one(tmp_path: Path) -> None:
    data = [{"piece": "red circle", "box": LEFT, "from": [32, 0, 64, 32]}, TWO[1]]
    (spec,) = made(tmp_path, data, [MethodSpec("reposition")])
    assert spec.settings["subjects"][0]["from"] == [0.5, 0.0, 1.0, 1.0]
    with pytest.raises(DitAttnError, match='no subject is to be moved; add "from"'):
        made(tmp_path, TWO, [MethodSpec("reposition")])
