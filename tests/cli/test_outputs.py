"""Files appear whole or not at all, and nothing that was there is lost."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from dit_attn.cli import outputs
from dit_attn.cli.outputs import Media
from dit_attn.errors import DitAttnError


def picture(seed=0, shape=(16, 24, 3)):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize(
    "form",
    [
        lambda x: [Image.fromarray(x)],
        lambda x: x[None].astype(np.float32) / 255,
        lambda x: torch.from_numpy(x).permute(2, 0, 1)[None].float() / 255,
        lambda x: torch.from_numpy(x).permute(2, 0, 1)[None].double() / 255,
    ],
    ids=["pil", "numpy", "torch", "torch-double"],
)
def test_images_of_every_form_are_read(form):
    media = outputs.media_of(SimpleNamespace(images=form(picture())))
    assert not media.video and media.ending == ".png"
    np.testing.assert_array_equal(media.frames[0], picture())


@pytest.mark.parametrize(
    "form",
    [
        lambda x: [[Image.fromarray(frame) for frame in x]],
        lambda x: x[None].astype(np.float32) / 255,
        lambda x: torch.from_numpy(x).permute(0, 3, 1, 2)[None].float() / 255,
    ],
    ids=["pil", "numpy", "torch"],
)
def test_videos_of_every_form_are_read(form):
    clip = np.stack([picture(i) for i in range(3)])
    media = outputs.media_of(SimpleNamespace(frames=form(clip)))
    assert media.video and media.ending == ".mp4"
    np.testing.assert_array_equal(media.frames, clip)


def test_a_video_has_the_sound_that_the_model_made(tmp_path):
    import imageio_ffmpeg

    clip, waves = np.stack([picture(i, (32, 48, 3)) for i in range(6)]), torch.rand(1, 2, 8000) - 0.5
    pipe = SimpleNamespace(audio_sampling_rate=16000)
    media = outputs.media_of(SimpleNamespace(frames=clip[None] / 255.0, audio=waves), pipe)
    outputs.write_media(media, tmp_path / "a.mp4", 12, {})
    assert outputs.read_media(tmp_path / "a.mp4").frames.shape == clip.shape
    words = [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(tmp_path / "a.mp4")]
    about = subprocess.run(words, capture_output=True, text=True).stderr
    assert "Audio: aac" in about and "16000 Hz, stereo" in about and "Duration: 00:00:00.5" in about
    silent = outputs.media_of(SimpleNamespace(frames=clip[None] / 255.0, audio=None), pipe)
    assert silent.sound is None
    with pytest.raises(outputs.NotFinite, match="the sound is NaN"):
        outputs.media_of(SimpleNamespace(frames=clip[None] / 255.0, audio=waves * float("nan")), pipe)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_reported(bad):
    values = np.zeros((1, 4, 4, 3), dtype=np.float32)
    values[0, 0, 0, 0] = bad
    with pytest.raises(outputs.NotFinite, match=r"2\.1 % of the output is NaN"):
        outputs.media_of(SimpleNamespace(images=values))


def test_an_image_comes_back_with_its_text(tmp_path):
    media = Media(picture()[None], False)
    outputs.write_media(media, tmp_path / "a.png", 8, {"prompt": "ein schönes 猫", "dit_attn": "{}"})
    np.testing.assert_array_equal(outputs.read_media(tmp_path / "a.png").frames, media.frames)
    assert Image.open(tmp_path / "a.png").text == {"prompt": "ein schönes 猫", "dit_attn": "{}"}
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("size", [(48, 48), (32, 80), (50, 62)])
def test_a_video_keeps_its_size_and_number_of_frames(tmp_path, size):
    media = Media(np.stack([picture(i, (*size, 3)) for i in range(5)]), True)
    outputs.write_media(media, tmp_path / "a.mp4", 6, {})
    assert outputs.read_media(tmp_path / "a.mp4").frames.shape == (5, *size, 3)


def test_a_block_that_fails_leaves_the_old_file(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(KeyboardInterrupt), outputs.output_file(tmp_path / "a.txt") as temporary:
        temporary.write_text("half")
        raise KeyboardInterrupt
    assert (tmp_path / "a.txt").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_says_what_to_do_and_leaves_nothing(tmp_path):
    with pytest.raises(DitAttnError, match=r"No space left.*--resume"), outputs.output_file(tmp_path / "a.txt") as path:
        path.write_text("half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert not list(tmp_path.iterdir())


def test_a_video_that_ffmpeg_cut_short_is_not_taken_for_whole(tmp_path, monkeypatch):
    import diffusers.utils

    def cut(frames, path, **kwargs):
        with open(path, "wb") as file:
            file.write(b"not a video")

    monkeypatch.setattr(diffusers.utils, "export_to_video", cut)
    with pytest.raises(DitAttnError, match="wrote 0 of 2 frames"):
        outputs.write_media(Media(np.stack([picture(), picture(1)]), True), tmp_path / "a.mp4", 8, {})
    assert not list(tmp_path.iterdir())


def test_leftovers_of_a_killed_run_are_swept_but_not_those_of_a_running_one(tmp_path):
    old, new = tmp_path / ".partial-old.png", tmp_path / ".partial-new.png"
    for path in (old, new):
        path.write_bytes(b"x")
    os.utime(old, (time.time() - 7200,) * 2)
    outputs.prepare_folder(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [new.name]


def test_a_folder_that_is_a_file_or_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(DitAttnError, match="is a file"):
        outputs.prepare_folder(tmp_path / "file")
    with pytest.raises(DitAttnError, match="cannot write"):
        outputs.prepare_folder(tmp_path / "file" / "inside")


def test_another_jobs_output_keeps_its_name(tmp_path):
    assert outputs.place(tmp_path, "a", "1" * 64) == "a"
    outputs.write_json({"job_hash": "1" * 64}, tmp_path / "a.json")
    assert outputs.place(tmp_path, "a", "1" * 64) == "a"
    assert outputs.place(tmp_path, "a", "2" * 64) == "a_22222222"
    (tmp_path / "b.png").write_bytes(b"somebody's picture")
    assert outputs.place(tmp_path, "b", "3" * 64) == "b_33333333"


def saved(folder, stem="a", digest="h" * 64, seed=0):
    facts = {"job_hash": digest, "seconds": 1.5, "summary": {"run_density": 0.5}, "warnings": ["w"]}
    sidecar = lambda name, sha256: {**facts, "file": name, "sha256": sha256}  # noqa: E731
    return outputs.save(Media(picture(seed)[None], False), folder, stem, digest, 8, {}, sidecar)


def test_an_output_is_finished_only_if_it_is_the_file_that_was_written(tmp_path):
    path, digest = saved(tmp_path), "h" * 64
    found = outputs.finished(tmp_path, "a", digest)
    assert path == tmp_path / "a.png" and found is not None
    assert (found.path, found.seconds, found.density, found.warnings) == (path, 1.5, 0.5, ("w",))
    assert outputs.finished(tmp_path, "a", "other") is None
    path.write_bytes(b"pict")
    assert outputs.finished(tmp_path, "a", digest) is None
    (tmp_path / "a.json").write_text("{half")
    assert outputs.finished(tmp_path, "a", digest) is None


@pytest.mark.parametrize(
    "edit",
    [
        {"seconds": "x"},
        {"seconds": float("nan")},
        {"seconds": True},
        {"warnings": 5},
        {"warnings": [5]},
        {"summary": [1]},
        {"summary": {"run_density": "x"}},
        {"file": "../a.png"},
        {"file": "b.png"},
        {"file": ["a.png"]},
        {"sha256": None},
    ],
    ids=str,
)
def test_an_edited_sidecar_is_not_finished(tmp_path, edit):
    saved(tmp_path)
    saved(tmp_path, "b")
    (tmp_path.parent / "a.png").write_bytes((tmp_path / "a.png").read_bytes())
    sidecar = outputs.read_sidecar(tmp_path / "a.json")
    outputs.write_json({**sidecar, **edit}, tmp_path / "a.json")
    assert outputs.finished(tmp_path, "a", "h" * 64) is None


def test_a_sidecar_that_is_nested_deeply_is_none(tmp_path):
    (tmp_path / "a.json").write_text("[" * 100_000)
    assert outputs.read_sidecar(tmp_path / "a.json") == {}


def test_links_are_neither_read_nor_written_through(tmp_path):
    folder, outside = tmp_path / "out", tmp_path / "outside"
    folder.mkdir()
    outside.mkdir()
    saved(outside)
    before = {path.name: path.read_bytes() for path in outside.iterdir()}
    for name in before:
        (folder / name).symlink_to(outside / name)
    assert outputs.read_sidecar(folder / "a.json") == {}
    assert outputs.finished(folder, "a", "h" * 64) is None
    assert saved(folder, seed=1).name == "a_hhhhhhhh.png"  # somebody's link keeps its name
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before
    (folder / "a.json").unlink()
    shutil.copyfile(outside / "a.json", folder / "a.json")  # our sidecar, and a link where its image was
    assert outputs.finished(folder, "a", "h" * 64) is None
    assert not saved(folder, seed=1).is_symlink()
    assert {path.name: path.read_bytes() for path in outside.iterdir()} == before


@pytest.mark.parametrize("ending", [".json", ".png"])
def test_a_kill_leaves_no_output_without_a_sidecar(tmp_path, monkeypatch, ending):
    class Killed(BaseException):
        pass

    replace = os.replace

    def killed(old, new):
        replace(old, new)
        if str(new).endswith(ending):
            raise Killed

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(Killed):
        saved(tmp_path)
    monkeypatch.setattr(os, "replace", replace)
    there = (tmp_path / "a.png").exists()
    assert there == (outputs.finished(tmp_path, "a", "h" * 64) is not None)
    assert saved(tmp_path) == tmp_path / "a.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "a.png"]


def test_two_processes_never_take_one_name(tmp_path):
    code = f"""
import sys, time, pathlib
from tests.cli.test_outputs import saved
from dit_attn.cli import outputs
folder, mine = pathlib.Path({str(tmp_path)!r}), sys.argv[1]
place = outputs.place
def slow(*args):
    stem = place(*args)
    time.sleep(0.05)
    return stem
outputs.place = slow
(folder / (".ready-" + mine)).touch()
while len(list(folder.glob(".ready-*"))) < 2:
    time.sleep(0.005)
for i in range(5):
    saved(folder, f"item{{i}}", mine * 64, int(mine))
"""
    several = [subprocess.Popen([sys.executable, "-c", code, digit]) for digit in "12"]
    assert [one.wait(timeout=300) for one in several] == [0, 0]
    for i in range(5):
        names = {outputs.place(tmp_path, f"item{i}", digit * 64) for digit in "12"}
        found = [outputs.finished(tmp_path, outputs.place(tmp_path, f"item{i}", d * 64), d * 64) for d in "12"]
        assert len(names) == 2 and all(found)
        for seed, one in zip((1, 2), found):
            np.testing.assert_array_equal(outputs.read_media(one.path).frames[0], picture(seed))
    assert not list(tmp_path.glob(".lock-*"))
