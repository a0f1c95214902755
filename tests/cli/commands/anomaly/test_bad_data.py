"""`dit-attn anomaly` and bad data, a full disk or Ctrl-C: one line, and nothing that is done is lost."""

from __future__ import annotations

import errno
import shutil

import numpy as np
import pytest
from PIL import Image

from dit_attn import files, hub
from dit_attn.cli import main
from dit_attn.pipelines.anomaly.mask_training import MaskTraining
from dit_attn.pipelines.anomaly.painter import Painter


def _train(place, data, *words):
    folders = [str(x) for name in ("normal", "defects", "masks") for x in (f"--{name}", data / name)]
    model = ["--model", str(place / "model"), "--resolution", "32", "--product", "metal", "--defect", "hole"]
    short = ["--train-steps", "1", "--train-batch", "1", "--lora-rank", "2", "--device", "cpu"]
    return main(["anomaly", "train", *model, *folders, *short, "--output", str(data / "out"), *words])


def _generate(place, data, *words):
    short = ["--steps", "1", "--retries", "0", "--controls", "0", "--per-defect", "2", "--device", "cpu"]
    named = ["--model", place / "model", "--concept", data / "out/concept.safetensors", "--normal", data / "normal"]
    return main(["anomaly", "generate", *map(str, named), *short, "--output", str(data / "pairs"), *words])


@pytest.fixture
def own(place, tmp_path):
    """A copy of the data, in a folder with a name that is not ASCII."""
    return shutil.copytree(place / "data", tmp_path / "größe 测")


def _line(capsys):
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("dit-attn: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_one_shot_and_images_of_several_sizes_are_learned_and_painted(place, own, capsys):
    for folder in ("defects", "masks"):
        next(iter(sorted((own / folder).glob("001*")))).unlink()
    for i, size in enumerate([(64, 48), (90, 120), (33, 40)]):
        path = own / "normal" / f"{i:03d}.png"
        Image.open(path).resize(size).save(path)
    assert _train(place, own, "--learn-masks", "--mask-steps", "1") == 0
    out = capsys.readouterr().out
    assert "metal+hole: 1 shot, ratio 1.00" in out and "of the masks drawn for a trial can be used" in out
    assert _generate(place, own) in (0, 1)
    rows = (own / "pairs/manifest.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(rows) == 2
    capsys.readouterr()
    if "0% of the masks" in out:
        assert _generate(place, own, "--mask-source", "learned", "--output", str(own / "other")) == 2
        assert "learn them with more --mask-steps" in _line(capsys)


def test_ctrl_c_while_masks_are_learned_leaves_the_rest_and_goes_on(place, own, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(MaskTraining, "loss", _interrupt)
        assert _train(place, own, "--learn-masks", "--mask-steps", "1") == 130
    assert "continue with the same command and --resume" in capsys.readouterr().err
    assert (own / "out/concept.safetensors").is_file()
    assert _train(place, own, "--learn-masks", "--mask-steps", "1", "--resume") == 0
    with monkeypatch.context() as patch:
        patch.setattr(Painter, "paint", _interrupt)
        assert _generate(place, own) == 130
    assert "continue with --resume" in capsys.readouterr().err
    assert _generate(place, own, "--resume") in (0, 1)


def test_a_full_disk_and_a_bad_image_are_one_line(place, own, capsys, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", _full)
        assert _train(place, own) == 2
    assert "cannot write the checkpoint" in _line(capsys)
    shutil.rmtree(own / "out", ignore_errors=True)
    assert _train(place, own) == 0
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "replace", _full)
        assert _generate(place, own) == 2
    assert "free some space and go on with --resume" in _line(capsys)
    for path in (own / "normal").glob("*.png"):
        path.write_bytes(path.read_bytes()[:200])
    assert _generate(place, own, "--resume") == 2
    assert "cannot be read (image file is truncated); replace it or leave it out" in _line(capsys)


def test_regions_of_another_size_or_without_a_place_are_one_line(place, own, capsys):
    assert _train(place, own) == 0
    roi = own / "roi.png"
    for size, says in (((20, 30), "is of another size than"), ((32, 32), "fits nowhere on the product")):
        Image.fromarray(np.zeros(size, np.uint8)).save(roi)
        assert _generate(place, own, "--roi", str(roi), "--resume") == 2
        assert says in _line(capsys)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--push-to-hub", "name"), "--push-to-hub must be ORG/NAME, got 'name'"),
        (("--mask-steps", "3"), "--mask-steps without --learn-masks"),
    ],
)
def test_flags_that_cannot_work_are_one_line(words, says, place, own, capsys):
    assert _train(place, own, *words) == 2
    assert says in _line(capsys) and not (own / "out").exists()


def test_a_concept_is_uploaded_and_a_failure_says_where_it_is(place, own, capsys, monkeypatch):
    import huggingface_hub

    calls = []

    class Api:
        def create_repo(self, repo_id, exist_ok):
            calls.append((repo_id, exist_ok))

        def upload_file(self, **kwargs):
            if not calls[1:]:
                calls.append(kwargs)
                return "https://hub/commit/1"
            raise _HttpError("[Errno 111] Connection refused")

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    assert _train(place, own, "--push-to-hub", "me/hole") == 0
    assert calls[0] == ("me/hole", True)
    assert calls[1]["repo_id"] == "me/hole" and calls[1]["path_in_repo"] == "concept.safetensors"
    capsys.readouterr()
    assert _train(place, own, "--push-to-hub", "me/hole", "--resume") == 2
    line = _line(capsys)
    assert "cannot upload to me/hole ([Errno 111] Connection refused); the concept is in" in line
    monkeypatch.setattr(hub, "is_offline", lambda: True)
    assert _train(place, own, "--push-to-hub", "me/hole", "--resume") == 2
    assert "the Hub cannot be reached; the concept is in" in _line(capsys)


class _HttpError(Exception):
    """As the error of an HTTP library: no OSError."""


def _interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def _full(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")
