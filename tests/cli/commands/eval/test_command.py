"""`eval` on folders as people have them: mixed formats, broken files, names in other scripts."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
from PIL import Image

from dit_attn.eval.folders import read_folder
from dit_attn.eval.media import read_frames
from dit_attn.eval.shapes_world import multi, world
from tests._support.random_weights import lpips_weights

pytest.importorskip("torchmetrics")


def noise(seed, size=(24, 32)):
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


@pytest.fixture
def folders(tmp_path):
    """Three pictures in two folders; one name is not ASCII."""
    for name in ("made", "true"):
        (tmp_path / name).mkdir()
    for i, stem in enumerate(("a", "b", "schöne 猫")):
        brighter = np.clip(noise(i).astype(int) + 10, 0, 255).astype(np.uint8)
        Image.fromarray(noise(i)).save(tmp_path / "true" / f"{stem}.png")
        Image.fromarray(brighter).save(tmp_path / "made" / f"{stem}.png")
    return tmp_path


def test_pairs_are_matched_by_name_and_scored(cli, folders):
    outcome = cli("eval", "made", "--reference", "true", "--json", "-o", "new/scores.json")
    assert outcome.code == 0, outcome.err
    record = json.loads(outcome.out)
    assert record == json.loads((folders / "new/scores.json").read_text())
    psnr, ssim = record["scores"]
    assert psnr["metric"] == "psnr" and psnr["samples"] == 3 and 27 < psnr["value"] < 32 and 0.9 < ssim["value"] < 1
    (folders / "made" / "b.png").rename(folders / "made" / "c.png")
    outcome = cli("eval", "made", "--reference", "true")
    assert outcome.code == 0 and "left out, only in one folder: b, c" in outcome.out
    assert re.search(r"^psnr +[23]\d\.\d dB ", outcome.out, re.M) and re.search(r"^ssim +0\.\d{3} ", outcome.out, re.M)


def test_lpips_takes_its_backbone_and_its_weights_from_the_command_line(cli, folders):
    for folder in ("made", "true"):
        for file in (folders / folder).iterdir():
            Image.open(file).resize((64, 64)).save(file)
    weights = str(lpips_weights("squeeze", folders))
    words = ("eval", "made", "--reference", "true", "--metrics", "lpips")
    outcome = cli(*words, "--lpips", "squeeze", "--lpips-weights", weights, "--json")
    assert outcome.code == 0, outcome.err
    (lpips,) = json.loads(outcome.out)["scores"]
    assert lpips["label"] == "lpips (squeeze)" and lpips["samples"] == 3 and 0 < lpips["value"] < 1
    cli(*words, "--lpips-weights", weights).refused("not those of alex", "alexnet-owt")


def test_broken_files_are_named_left_out_and_counted(cli, folders):
    (folders / "made" / "broken.png").write_bytes(b"not a picture")
    np.save(folders / "made" / "holes.npy", np.full((24, 32, 3), np.nan))
    outcome = cli("eval", "made", "--reference", "true", "--json")
    assert outcome.code == 1
    record = json.loads(outcome.out)
    assert [entry["file"] for entry in record["skipped"]] == ["made/broken.png", "made/holes.npy"]
    assert record["files"] == 3 and "left out made/holes.npy: it holds NaN" in outcome.err


def test_every_kind_of_picture_becomes_colour(tmp_path):
    grey = np.linspace(0, 255, 16 * 16).reshape(16, 16)
    Image.fromarray(grey.astype(np.uint8)).save(tmp_path / "grey.png")
    Image.fromarray((grey * 257).astype(np.uint16)).save(tmp_path / "deep.png")
    glass = np.zeros((16, 16, 4), dtype=np.uint8)
    glass[:8, :, 3] = 255
    Image.fromarray(glass).save(tmp_path / "glass.png")
    np.save(tmp_path / "array.npy", noise(0, (16, 16)) / 255)
    frames = {file.stem: read_frames(file) for file in tmp_path.iterdir()}
    assert {tuple(x.shape) for x in frames.values()} == {(1, 3, 16, 16)}
    assert (frames["grey"].int() - frames["deep"].int()).abs().max() <= 1
    assert frames["glass"][0, :, 0, 0].tolist() == [0, 0, 0] and frames["glass"][0, :, 15, 0].tolist() == [255] * 3
    assert (frames["array"][0].permute(1, 2, 0).numpy() == noise(0, (16, 16))).all()


def test_clips_are_read_and_their_motion_measured(cli, tmp_path):
    import imageio

    (tmp_path / "clips").mkdir()
    frames = [np.full((32, 32, 3), 20 * t, dtype=np.uint8) for t in range(9)]
    imageio.mimwrite(tmp_path / "clips" / "steady.mp4", frames, fps=8, macro_block_size=1)
    flicker = [np.full((32, 32, 3), 200 * (t % 2), dtype=np.uint8) for t in range(9)]
    imageio.mimwrite(tmp_path / "clips" / "flicker.mp4", flicker, fps=8, macro_block_size=1)
    assert len(read_folder(tmp_path / "clips").frames[0]) == 9
    outcome = cli("eval", "clips", "--json")
    (temporal,) = json.loads(outcome.out)["scores"]
    assert outcome.code == 0 and temporal["samples"] == 2 and -0.3 < temporal["value"] < 0.3  # about 1 and -1


def test_captions_of_the_shapes_world_are_verified(cli, tmp_path):
    (tmp_path / "drawn").mkdir()
    scene = world.held_out_sample("image", 1, seed=0)[0]
    drawn = world.render_scenes([scene], 128)[0].permute(1, 2, 0).numpy()
    pixels = (drawn.clip(0, 1) * 255).round().astype(np.uint8)
    for name in ("right", "wrong"):
        Image.fromarray(pixels if name == "right" else 255 - pixels).save(tmp_path / "drawn" / f"{name}.png")
        (tmp_path / "drawn" / f"{name}.json").write_text(json.dumps({"prompt": world.caption(scene)}))
    outcome = cli("eval", "drawn", "--json")
    (verifier,) = json.loads(outcome.out)["scores"]
    assert outcome.code == 0, outcome.err
    assert verifier["value"] == 0.5 and verifier["samples"] == 2
    assert re.search(r"^prompt met .* 50 % ", cli("eval", "drawn").out, re.M)


def test_bad_input_is_one_line_and_exit_2(cli, folders):
    Image.fromarray(noise(7, (8, 8))).save(folders / "true" / "z.png")
    (folders / "empty").mkdir()
    (folders / "words.txt").write_text("one\n")
    (folders / "words.jsonl").write_text('{"file": "a.png"}\n')
    cli("eval", "nowhere").refused("no folder nowhere")
    cli("eval", "empty").refused("no image or video in empty")
    cli("eval", "made").refused("give --reference")
    (folders / "made" / "inner-dense").mkdir()
    (folders / "made" / "inner-dense" / "a.png").write_bytes((folders / "made" / "a.png").read_bytes())
    cli("eval", "made").refused("made may not be the folder you mean", "try: dit-attn eval made/inner-dense")
    cli("eval", "made", "--metric", "fidd").refused("unknown --metric 'fidd'")
    cli("eval", "made", "--metric", "psnr").refused("compares with reference images")
    cli("eval", "true", "--metric", "clip").refused("a caption for every file, 4 of 4 have none, first a")
    cli("eval", "true", "--reference", "made", "--metric", "kid").refused("differ in size", "--size N")
    cli("eval", "made", "--metric", "clip", "--captions", "words.txt").refused("1 captions for 3 files")
    cli("eval", "made", "--metric", "clip", "--captions", "words.jsonl").refused("line 1 is not")
    cli("eval", "made", "--metric", "temporal").refused("at least 3 frames, 3 of 3 files have fewer, first a")
    cli("eval", "made", "--reference", "empty").refused("no image or video in empty")


def test_saturation_and_artifacts_of_a_folder(cli, tmp_path):
    scenes = [item for item in world.held_out_sample("image", 3) if isinstance(item, world.Scene)]
    drawn = (world.render_scenes(scenes, 64) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    grey = drawn.mean(-1, keepdims=True)
    strong = (grey + 2 * (drawn - grey)).clip(0, 255).astype(np.uint8)
    for name, pictures in (("real", drawn), ("strong", strong)):
        (tmp_path / name).mkdir()
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(tmp_path / name / f"{i}.png")
    outcome = cli("eval", "real", "--metrics", "saturation,artifact-rate", "--json")
    assert outcome.code == 0, outcome.err
    assert [one["value"] for one in json.loads(outcome.out)["scores"]] == [0.0, 0.0]
    outcome = cli("eval", "strong", "--reference", "real", "--metric", "saturation", "--json")
    (found,) = json.loads(outcome.out)["scores"]
    assert found["value"] > 0.5 and found["label"] == "saturation (against the reference)" and found["ci95"]
    (tmp_path / "captions.txt").write_text("a cat\na dog\na cow\n")
    for metric, words in (("artifact-rate", "shapes world only"), ("saturation", "--reference")):
        outcome = cli("eval", "strong", "--captions", "captions.txt", "--metric", metric)
        assert outcome.code == 2 and words in outcome.err and outcome.err.count("\n") == 1


def test_outlines_of_a_folder(cli, tmp_path):
    scenes = [item for item in world.held_out_sample("image", 3) if isinstance(item, world.Scene)]
    drawn = (world.render_scenes(scenes, 64) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    ragged = drawn[:, 2::4, 2::4].repeat(4, 1).repeat(4, 2)
    for name, pictures in (("drawn", drawn), ("ragged", ragged), ("empty", np.full_like(drawn, 255))):
        (tmp_path / name).mkdir()
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(tmp_path / name / f"{i}.png")
    scores = {}
    for name in ("drawn", "ragged"):
        outcome = cli("eval", name, "--metrics", "perimeter,edge-width", "--json")
        assert outcome.code == 0, outcome.err
        scores[name] = json.loads(outcome.out)["scores"]
    assert [one["value"] for one in scores["drawn"]] == pytest.approx([1.0, 1.0], abs=0.05)
    assert [one["label"] for one in scores["drawn"]] == ["perimeter (1 = drawn)", "edge-width (px, 1 = drawn)"]
    rough = scores["ragged"][0]
    assert rough["value"] > 1.06 and rough["ci95"] and rough["better"] == "lower"
    cli("eval", "empty", "--metric", "perimeter").refused("no object on a plain background in any of 3 files")
    (tmp_path / "captions.txt").write_text("a cat\na dog\na cow\n")
    cli("eval", "drawn", "--captions", "captions.txt", "--metric", "edge-width").refused("shapes world only")


def test_scenes_of_several_objects_are_verified_by_their_captions(cli, tmp_path):
    scenes = [*multi.held_out_sample(3, objects=(2, 4)), *multi.held_out_sample(1, objects=(2, 2), filled=True)]
    drawn = (multi.render_scenes(scenes, 64) * 255).round().byte().permute(0, 2, 3, 1).numpy()
    (tmp_path / "made").mkdir()
    for i, picture in enumerate(drawn):
        Image.fromarray(picture).save(tmp_path / "made" / f"{i}.png")
    (tmp_path / "captions.txt").write_text("".join(f"{multi.caption(scene)}\n" for scene in scenes))
    words = ("eval", "made", "--captions", "captions.txt", "--json", "--metric")
    outcome = cli(*words, "verifier,artifact-rate,perimeter,detail")
    assert outcome.code == 0, outcome.err
    verifier, artifacts, perimeter, detail = json.loads(outcome.out)["scores"]
    assert detail["value"] == 1.0 and len(detail["unjudged"]) == 4 - detail["samples"] == 3
    assert verifier["value"] == 1.0 and verifier["samples"] == 4 and {"present", "fill"} <= set(verifier["by"])
    assert artifacts["value"] == 0.0 and artifacts["samples"] == perimeter["samples"] == 3  # fills have darker colors
    assert perimeter["value"] == pytest.approx(1.0, abs=0.01)
