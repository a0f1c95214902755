"""Flags and configuration files are typed by one table."""

from __future__ import annotations

import argparse

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dit_attn.cli import options
from dit_attn.cli.options import DEVICE, RUN, Flag, convert, merge, only, read_config
from dit_attn.errors import DitAttnError

ALL = options.SHARED


def test_every_flag_is_listed_once():
    names = [flag.name for flag in ALL]
    assert len(names) == len(set(names))
    assert all(flag.help for flag in ALL)


@given(st.integers(1, 10**6))
def test_text_and_yaml_give_the_same_number(value):
    flag = Flag("height", "", int, low=1)
    assert convert(flag, str(value), "height") == convert(flag, value, "height") == value


@pytest.mark.parametrize("value", ["x", "1.5", 1.5, True, None, [4], "nan", "inf"])
def test_what_is_no_whole_number_is_refused(value):
    with pytest.raises(DitAttnError, match="height must be a whole number, got"):
        convert(Flag("height", "", int, low=1), value, "height")


@pytest.mark.parametrize("value", ["0", 0, "-3"])
def test_a_whole_number_out_of_range_is_refused_with_the_range(value):
    with pytest.raises(DitAttnError, match=f"height must be at least 1, got {value!r}"):
        convert(Flag("height", "", int, low=1), value, "height")


@pytest.mark.parametrize("value", ["nan", "inf", float("nan"), "abc"])
def test_what_is_no_number_is_refused(value):
    with pytest.raises(DitAttnError, match="scale must be a number, got"):
        convert(Flag("scale", "", float, low=0.0), value, "scale")


@pytest.mark.parametrize(
    ("low", "high", "value", "bounds"),
    [(0.0, None, "-1", "at least 0"), (0.0, 1.0, "1.5", "between 0 and 1"), (None, 0.5, 2, "at most 0.5")],
)
def test_a_number_out_of_range_is_refused_with_the_range(low, high, value, bounds):
    with pytest.raises(DitAttnError, match=f"scale must be {bounds}, got {value!r}"):
        convert(Flag("scale", "", float, low=low, high=high), value, "scale")


def test_a_configuration_file_gives_typed_values(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: tiny-image\nprompt: one\nnum-frames: 9\nguidance_scale: 3\nresume: true\ncompile: true\n")
    assert read_config(str(path), ALL) == {
        "model": "tiny-image",
        "prompt": ["one"],
        "num_frames": 9,
        "guidance_scale": 3.0,
        "resume": True,
        "compile": {},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "line 1 is not YAML"),
        ("model: x\nsteps: [1\n", "is not YAML"),
        ("- a\n- b\n", "flag: value"),
        ("", "flag: value"),
        ("modle: x\n", "'modle'. Did you mean 'model'"),
        ("steps: many\n", "steps in .* must be a whole number"),
        ("resume: 1\n", "resume in .* must be true or false"),
        ("model: 3\n", "model in .* must be text"),
        ("dtype: int8\n", "Allowed: auto"),
        ("pipeline_kwargs: 3\n", "must be a JSON object"),
        ("config: other.yaml\n", "'config'"),
    ],
)
def test_a_bad_configuration_file_is_refused(tmp_path, text, message):
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(DitAttnError, match=message):
        read_config(str(path), ALL)


def test_a_configuration_file_that_is_not_there_or_not_text_is_refused(tmp_path):
    with pytest.raises(DitAttnError, match="No such file"):
        read_config(str(tmp_path / "none.yaml"), ALL)
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DitAttnError, match="cannot read"):
        read_config(str(tmp_path / "binary.yaml"), ALL)


def test_a_file_that_must_be_there_is_asked_for_in_flags_and_in_the_configuration_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flag = Flag("weights", "a file", metavar="FILE", exists=True)
    groups = {"files": (flag,), "run": only(RUN, "config")}
    (tmp_path / "c.yaml").write_text("weights: absent.pth\n")
    for flags in ({"weights": "absent.pth"}, {"config": "c.yaml"}):
        with pytest.raises(DitAttnError, match=r"--weights absent\.pth: there is no such file; check the path"):
            merge(argparse.Namespace(**flags), groups)
    (tmp_path / "absent.pth").write_bytes(b"x")
    assert merge(argparse.Namespace(config="c.yaml"), groups)["weights"] == "absent.pth"


@pytest.mark.parametrize(("metavar", "kind", "other"), [("FILE", "file", "folder"), ("DIR", "folder", "file")])
def test_a_folder_is_no_file_and_a_file_no_folder(tmp_path, metavar, kind, other):
    place = tmp_path / "place"
    place.mkdir() if kind == "file" else place.write_bytes(b"x")
    with pytest.raises(DitAttnError, match=f"--place .*place is a {other}; give a {kind}"):
        convert(Flag("place", "somewhere", metavar=metavar), str(place), "--place")


@pytest.mark.parametrize("name", ["tpu", "cuda:", "meta", "cuda:x"])
def test_a_device_is_one_of_those_that_torch_names_here(name):
    with pytest.raises(DitAttnError, match=f"unknown --device '{name}'; use auto, cpu, cuda, cuda:N or mps"):
        convert(DEVICE, name, "--device")
    assert convert(DEVICE, "cuda:1", "--device") == "cuda:1"
