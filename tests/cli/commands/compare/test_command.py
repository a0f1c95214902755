"""`compare` from end to end on the embedded image model, as small as it goes."""

from __future__ import annotations

import base64
import json
import subprocess
import sys

import pytest

from dit_attn.cli import runner
from dit_attn.cli.commands.compare.config import wanted_metrics
from dit_attn.eval.report.verdict import headline, verdicts
from dit_attn.eval.shapes_world import world

CAPTION = "a large red circle at the left on white"
SMALL = ("--height", "64", "--width", "64", "--steps", "2", "-o", "out")
METHOD = ("--method", "block-sparse:density=0.5,dense_steps=0")


@pytest.fixture
def compare(cli):
    return lambda *words: cli("compare", "--model", "tiny-image", *words)


@pytest.fixture
def first(compare):
    return lambda *words: compare("--prompt", CAPTION, "--seeds", "0,1", *SMALL, *METHOD, *words)


def counted(monkeypatch):
    """Indices of the jobs that are run from here on."""
    made, real = [], runner.call_pipeline

    def call(pipe, job):
        made.append(job.index)
        return real(pipe, job)

    monkeypatch.setattr(runner, "call_pipeline", call)
    return made


def test_every_prompt_and_seed_is_made_by_everyone_with_files_and_figures(first, tmp_path):
    outcome = first("--json")
    assert outcome.code == 0, outcome.err
    results = json.loads(outcome.out)
    assert json.loads((tmp_path / "out/results.json").read_text()) == results
    assert [(t["variant"], t["seed"]) for t in results["takes"]] == [
        ("dense", 0),
        ("block-sparse:density=0.5,dense_steps=0", 0),
        ("dense", 1),
        ("block-sparse:density=0.5,dense_steps=0", 1),
    ]
    for take in results["takes"]:
        sidecar = json.loads((tmp_path / "out" / take["file"]).with_suffix(".json").read_text())
        assert sidecar["compare"] == take and sidecar["seed"] == take["seed"]
    _dense, half = results["headline"]
    assert half["attention_flops"]["value"] == pytest.approx(0.5, abs=0.1)
    assert half["speedup"]["n"] == 2 and half["methods"][0]["density"] == 0.5
    assert results["command"].startswith("dit-attn compare --model tiny-image")
    assert results["versions"]["torch"] and results["environment"]["hardware"]
    assert results["prompts"] == 1 and half["speedup"]["ci95"] is None  # two seeds of one prompt are no sample


def test_embedded_models_get_the_world_metrics_and_a_map_of_every_method(first, tmp_path):
    results = json.loads(first("--json").out)
    dense, half = results["headline"]
    assert results["metrics"] == ["fid-world", "clip-world"] and dense["metrics"]["fid-world"]["value"] is None
    assert half["metrics"]["fid-world"]["value"] > 0 and half["metrics"]["clip-world"]["n"] == 2
    (label,) = results["maps"]
    maps = results["maps"][label]
    assert label == half["label"] and (maps["seed"], maps["steps"], len(maps["error"])) == (0, 2, len(maps["layers"]))
    cells = [value for row in maps["density"] for value in row]
    take = next(take for take in results["takes"] if take["variant"] == label)
    assert sum(cells) / len(cells) == pytest.approx(take["run_density"], rel=1e-4) and maps["error"][0][1] > 0
    page = (tmp_path / "out/report.html").read_text()
    assert "Layer by step" in page and "FID-world to dense" in page


def test_maps_are_kept_and_made_again_only_for_other_settings(first, tmp_path, monkeypatch):
    before = json.loads(first("--json").out)
    monkeypatch.setattr(runner, "call_pipeline", lambda pipe, job: pytest.fail("nothing is missing"))
    after = json.loads(first("--json", "--resume").out)
    assert after["maps"] == before["maps"] and after["headline"] == before["headline"]
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    calls = counted(monkeypatch)
    next((tmp_path / "out").glob("*/maps.json")).unlink()
    assert json.loads(first("--json", "--resume").out)["maps"].keys() == before["maps"].keys() and calls == [0]


def test_maps_and_metrics_can_be_left_out(first, tmp_path):
    results = json.loads(first("--json", "--no-maps", "--metrics", "none").out)
    assert results["maps"] == {} and results["metrics"] == [] and results["headline"][1]["metrics"] == {}
    assert not list((tmp_path / "out").glob("*/maps.json"))
    assert "Layer by step" not in (tmp_path / "out/report.html").read_text()


def test_a_metric_may_be_added_later_and_nothing_is_made_again(first, monkeypatch):
    assert first("--no-maps", "--metrics", "none").code == 0
    monkeypatch.setattr(runner, "call_pipeline", lambda pipe, job: pytest.fail("nothing is missing"))
    results = json.loads(first("--json", "--resume", "--no-maps", "--metrics", "kid-world,ssim").out)
    assert results["headline"][1]["metrics"]["kid-world"]["n"] == 2


def test_a_map_that_fails_says_why_and_the_comparison_stands(first, tmp_path, monkeypatch):
    def broken(self, call, request, out):
        raise RuntimeError("no memory\nfor this")

    monkeypatch.setattr("dit_attn.pipelines.compare.attention_map.AttentionRecorder.__call__", broken)
    outcome = first("--json")
    assert outcome.code == 0
    assert [one["failed"] for one in json.loads(outcome.out)["maps"].values()] == ["RuntimeError: no memory"]
    assert "No map of" in (tmp_path / "out/report.html").read_text()
    assert not list((tmp_path / "out").glob("*/maps.json"))


def test_a_page_that_fails_leaves_the_old_one_whole(first, tmp_path, monkeypatch):
    assert first("--no-maps", "--metrics", "none").code == 0
    page = tmp_path / "out/report.html"
    before = page.read_bytes()

    def full(self, *args, **kwargs):
        self.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    real = type(page).write_text
    monkeypatch.setattr(
        type(page), "write_text", lambda self, *a, **k: (full if self.suffix == ".html" else real)(self, *a, **k)
    )
    outcome = first("--no-maps", "--metrics", "none", "--resume")
    assert outcome.code == 2 and "No space left" in outcome.err
    assert page.read_bytes() == before and not list((tmp_path / "out").glob(".partial-*"))


def test_attention_counts_at_the_size_of_every_job(compare, tmp_path):
    (tmp_path / "p.jsonl").write_text(
        f'{{"prompt": "{CAPTION}"}}\n{{"prompt": "{CAPTION}", "height": 128, "width": 128}}\n'
    )
    few = ("--prompts", "p.jsonl", *SMALL, *METHOD, "--no-maps", "--metrics", "none", "--json")
    results = json.loads(compare(*few).out)
    small, large = (take["attention_share"] for take in results["takes"] if take["variant"] == "dense")
    assert 0 < small < large and results["attention_share"] == pytest.approx((small + large) / 2)
    kept = [take["run_density"] for take in results["takes"] if take["variant"] != "dense"]
    expected = [1 - share * (1 - density) for share, density in zip((small, large), kept)]
    assert results["headline"][1]["step_flops"] == pytest.approx(sum(expected) / 2)


def test_clips_get_steadiness_and_metrics_over_frames(cli, tmp_path):
    words = ("--model", "tiny-video", "--held-out", "2", "--num-frames", "9", *SMALL, "--no-maps", "--json", *METHOD)
    results = json.loads(cli("compare", *words).out)
    _dense, half = results["headline"]
    assert half["temporal"]["n"] == 2 and half["temporal"]["value"] <= 1.0
    file = tmp_path / "out" / results["takes"][0]["file"]
    frames = json.loads(file.with_suffix(".json").read_text())["size"][0]
    assert half["metrics"]["fid-world"]["images"] == 2 * frames > 2 and half["metrics"]["fid-world"]["n"] == 2
    assert "temporal consistency" in (tmp_path / "out/report.html").read_text()


def test_seeds_beside_seeds_of_the_prompts_file_are_refused(compare, tmp_path):
    (tmp_path / "p.jsonl").write_text('{"prompt": "a cat"}\n{"prompt": "a dog", "seed": 7}\n')
    compare("--prompts", "p.jsonl", "--seeds", "0,1", *METHOD).refused("--seeds 0,1", "seed 7", "line 2")


def test_a_network_that_is_not_there_is_refused_before_anything_is_loaded(compare, tmp_path, monkeypatch):
    pytest.importorskip("torchmetrics")
    monkeypatch.setattr("torch.hub.get_dir", lambda: str(tmp_path))
    monkeypatch.setattr("dit_attn.cli.load_pipeline.load_pipeline", lambda *args: pytest.fail("loaded"))
    words = ("--prompt", CAPTION, *METHOD)
    compare(*words, "--metrics", "lpips").refused("LPIPS needs", "PSNR and SSIM")
    compare(*words, "--metrics", "lpips", "--lpips-weights", "/nowhere/a.pth").refused("/nowhere/a.pth", "no such file")
    compare(*words, "--metrics", "clip", "--clip", "/nowhere/clip").refused("/nowhere/clip", "clip-world")
    compare(*words, "--metrics", "fid", "--inception", "/nowhere/i.pth").refused("nception")


def test_other_models_get_no_metrics_unasked():
    assert wanted_metrics("clip-world, psnr,clip-world", shapes=False) == ("clip-world",)
    assert wanted_metrics(None, shapes=False) == ()


def test_resume_makes_nothing_that_is_there_and_only_what_is_missing(first, tmp_path, monkeypatch):
    assert first().code == 0
    made = counted(monkeypatch)
    before = json.loads((tmp_path / "out/results.json").read_text())
    again = first("--resume")
    assert again.code == 0 and made == []
    assert json.loads((tmp_path / "out/results.json").read_text())["takes"] == before["takes"]
    found = verdicts(before["headline"], before["prompts"])  # the terminal and the page say the same
    words = [headline(found, before["prompts"], before["attention_share"]), found[0].chip, found[0].sentence]
    assert all(text in again.out and text in (tmp_path / "out/report.html").read_text() for text in words)
    (gone,) = (tmp_path / "out/block-sparse-density-0-5-dense-steps-0").glob("*s1.png")
    gone.unlink()
    assert first("--resume").code == 0
    assert [index for index in made if index == 1] == [1, 1]  # dense once more, to take the time against
    after = json.loads((tmp_path / "out/results.json").read_text())
    assert after["takes"][:3] == before["takes"][:3] and gone.is_file()
    assert after["takes"][3]["psnr"] == before["takes"][3]["psnr"]


def test_ctrl_c_keeps_what_is_finished(first, tmp_path, monkeypatch):
    real, count = runner.call_pipeline, iter(range(99))

    def interrupted(pipe, job):
        if next(count) == 4:  # after two warm-up calls and the first round
            raise KeyboardInterrupt
        return real(pipe, job)

    monkeypatch.setattr(runner, "call_pipeline", interrupted)
    outcome = first()
    assert outcome.code == 130 and "--resume" in outcome.err
    assert len(list((tmp_path / "out").glob("*/*_s0.png"))) == 2
    assert not list((tmp_path / "out").rglob(".partial-*"))
    monkeypatch.setattr(runner, "call_pipeline", real)
    assert first("--resume").code == 0


def test_a_failed_item_is_reported_and_the_others_are_there(first, tmp_path, monkeypatch):
    real, count = runner.call_pipeline, iter(range(99))

    def failing(pipe, job):
        if next(count) == 3:
            raise RuntimeError("out of luck")
        return real(pipe, job)

    monkeypatch.setattr(runner, "call_pipeline", failing)
    outcome = first()
    assert outcome.code == 1 and "out of luck" in outcome.err and "1 of 4 items failed" in outcome.err
    assert json.loads((tmp_path / "out/results.json").read_text())["headline"][1]["failed"] == 1


def test_held_out_captions_need_no_file(compare):
    outcome = compare("--held-out", "3", *METHOD, "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    plan = json.loads(outcome.out)
    assert len({item["prompt"] for item in plan["items"]}) == 3
    assert next(variant["label"] for variant in plan["variants"]) == "dense"


def test_a_configuration_file_may_name_the_competitors(compare, tmp_path):
    (tmp_path / "c.yaml").write_text("steps: 3\nmethod: [block-sparse:density=0.5, 'block-sparse:density=0.25']\n")
    plan = json.loads(compare("--prompt", CAPTION, "--config", "c.yaml", "--dry-run", "--json").out)
    assert len(plan["variants"]) == 3 and plan["items"][0]["call"]["num_inference_steps"] == 3


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((), ("nothing to compare", "--method")),
        (("--method", "block-spars"), ("block-spars", "Did you mean")),
        (("--method", "block-sparse:density"), ("KEY=VALUE",)),
        (("--method", "block-sparse:density=2"), ("density must be between",)),
        (("--method", ":density=2"), ("names no method",)),
        ((*METHOD, *METHOD), ("two variants",)),
        ((*METHOD, "--method", "block-sparse:dense_steps=0,density=0.5"), ("the same settings",)),
        ((*METHOD, "--seeds", "a"), ("--seeds", "whole numbers")),
        ((*METHOD, "--seeds", "1,1"), ("twice",)),
        ((*METHOD, "--seeds", "-1"), ("between 0 and",)),
        ((*METHOD, "--held-out", "2"), ("two sets of items",)),
        ((*METHOD, "--metrics", "fid-wold"), ("--metrics", "fid-wold", "fid-world")),
        ((*METHOD, "--metrics", ""), ("--metrics",)),
        ((*METHOD, "--lpips", "resnet"), ("resnet", "alex")),
    ],
)
def test_bad_input_costs_one_line(compare, words, parts):
    compare("--prompt", CAPTION, *words).refused(*parts)


def test_more_held_out_captions_than_there_are_are_refused(cli):
    told = f"{len(world.split('image')[1])} held-out image captions, 99999 were requested"
    cli("compare", "--model", "tiny-image", "--held-out", "99999", *METHOD).refused(told)


def test_held_out_captions_are_for_embedded_models(cli, folder_model):
    cli("compare", "--model", folder_model, "--held-out", "2", *METHOD).refused("embedded models", "--prompts")


def test_an_edited_folder_leads_nowhere_and_is_made_again(compare, tmp_path, monkeypatch):
    words = ("--prompt", CAPTION, *SMALL, *METHOD, "--metrics", "none")
    assert compare(*words).code == 0
    (tmp_path / "secret.txt").write_text("TOP-SECRET-" * 6)
    sidecar = next((tmp_path / "out/dense").glob("0*.json"))
    good = json.loads(sidecar.read_text())

    def edit(**change):
        sidecar.write_text(json.dumps({**good, "compare": {**good["compare"], **change}}))

    made = counted(monkeypatch)
    edit(file="../secret.txt", prompt="another")
    assert compare(*words, "--resume").code == 0 and made == []
    page = (tmp_path / "out/report.html").read_text()
    assert base64.b64encode(b"TOP-SECRET-TOP-SECRET-TOP").decode()[:20] not in page and "another" not in page
    for change in ({"psnr": "x"}, {"warnings": 5}, {"verdict": [1]}, {"seconds": True}, {"density": float("nan")}):
        made.clear()
        edit(**change)
        outcome = compare(*words, "--resume")
        assert outcome.code == 0 and made, (change, outcome.err)
    maps = next((tmp_path / "out").glob("block-sparse*/maps.json"))
    right = json.loads(maps.read_text())
    for name, value in {"layers": 5, "steps": 10**6, "density": [["x"]], "seconds": "x"}.items():
        maps.write_text(json.dumps({**right, "maps": {**right["maps"], name: value}}))
        assert compare(*words, "--resume").code == 0
        assert json.loads(maps.read_text())["maps"]["layers"] == right["maps"]["layers"]


def test_two_comparisons_in_one_folder_do_not_mix(compare, tmp_path):
    (tmp_path / "out").mkdir()
    code = (
        "import pathlib; from dit_attn import files\nclass Owner: pass\nowner = Owner()\n"
        "files.claim(owner, pathlib.Path('out'), 'compare', 'comparing'); print('ready', flush=True); input()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdin is not None and child.stdout is not None and child.stdout.readline() == "ready\n"
    compare("--prompt", CAPTION, *SMALL, *METHOD, "--metrics", "none").refused("another process is comparing in out")
    child.communicate("\n", timeout=60)
    assert not list((tmp_path / "out").iterdir())
