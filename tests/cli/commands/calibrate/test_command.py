"""``dit-attn calibrate`` from the command line: its file, that it goes on where it was, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import dit_attn
from dit_attn import Method, models
from dit_attn.cli.captions import shuffled_captions
from dit_attn.cli.commands.calibrate import run as calibrate_run
from dit_attn.cli.commands.calibrate.command import verdict
from dit_attn.eval.shapes_world import world

FILE = "dit_attn_method.json"
RUNS = 1 + 1 + 6 + 2  # of one item: every density, all sparse, every layer, both parts
SMALL = (
    "--model", "tiny-image", "--height", "64", "--width", "64", "--steps", "2", "--method", "block-sparse",
    "--set", "dense_steps=0", "--densities", "0.5,0.125", "--parts", "2", "--items", "1",
)  # fmt: skip


@pytest.fixture
def calibrate(cli: Any) -> Any:
    """``calibrate(...)`` is the command on the embedded image model, as small and fast as it goes."""
    return lambda *words: cli("calibrate", *SMALL, *words)


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / calibrate_run.MEASURED).read_text().splitlines()]


def test_it_writes_one_file_that_enable_and_generate_take_and_goes_on(calibrate: Any, cli: Any, tmp_path: Path) -> None:
    done = calibrate("--held-out", "2", "--output", "out")
    assert done.code == 0, done.err
    assert done.err == ""  # no bar where nobody watches
    for part in ("50 to 100 %", "mean", "calibrated", "uniform, density 0.25", "over 2 items", f"saved     out/{FILE}"):
        assert part in done.out
    method = Method.from_pretrained(tmp_path / "out" / FILE)
    about: Any = method.calibration
    assert (method.parts, len(method.densities), method.q_block) == (2, 12, 32)
    assert about["model"] == "tiny-image" and about["commit"] and about["environment"]["torch"]
    assert about["command"].startswith("dit-attn calibrate --model tiny-image") and about["call"]["height"] == 64
    assert len(about["calibrated_on"]) == 1 and len(about["checked_on"]) == 2
    assert about["checked"]["ratio"]["n"] == 2 and about["expected"]["calibrated"]["cost"] <= 0.25 + 1e-6

    before = rows(tmp_path / "out")
    assert len(before) == 1 + RUNS + 2 * 2
    again = calibrate("--held-out", "2", "--output", "out", "--resume", "--json")
    data = json.loads(again.out)
    assert rows(tmp_path / "out") == before and data["file"] == f"out/{FILE}"
    assert data["densities"] == [list(method.densities[:6]), list(method.densities[6:])]
    assert Method.from_pretrained(tmp_path / "out" / FILE) == method

    dearer = calibrate("--cost", "0.4", "--output", "out", "--resume", "--json")
    assert json.loads(dearer.out)["expected"]["calibrated"]["cost"] == pytest.approx(0.4, abs=0.02)
    assert rows(tmp_path / "out") == before

    pipe = models.load("tiny-image")
    dit_attn.enable(pipe, str(tmp_path / "out" / FILE))
    words = ("--height", "64", "--width", "64", "--steps", "1", "--prompt", "a large red circle on white")
    made = cli("generate", "--model", "tiny-image", *words, "--method", f"out/{FILE}", "--output", "item")
    assert made.code == 0, made.err

    refused = calibrate("--output", "out", "--resume", "--set", "kv_block=64")
    refused.refused("another model, method, prompts or settings", "--resume")


def test_ctrl_c_keeps_what_is_measured(calibrate: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = calibrate_run.item_runner

    def stopping(pipe: Any, jobs: Any) -> Any:
        made, play = [], real(pipe, jobs)

        def stop(item: str) -> Any:
            made.append(item)
            if len(made) > 2:
                raise KeyboardInterrupt
            return play(item)

        return stop

    monkeypatch.setattr(calibrate_run, "item_runner", stopping)
    done = calibrate("--output", "out")
    assert done.code == 130 and "interrupted; what is measured is in out" in done.err and "--resume" in done.err
    assert [row.get("key", "").split("/")[0] for row in rows(tmp_path / "out")] == ["", "local", "all"]
    assert not (tmp_path / "out" / FILE).exists()


def test_a_failed_run_is_named_with_exit_code_1(calibrate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(pipe: Any, jobs: Any) -> Any:
        def fail(item: str) -> Any:
            raise RuntimeError("no memory left\nmore")

        return fail

    monkeypatch.setattr(calibrate_run, "item_runner", failing)
    done = calibrate("--output", "out")
    assert done.code == 1 and "a run failed: RuntimeError: no memory left; what is measured is in out" in done.err


def test_a_dry_run_prints_the_plan_and_writes_nothing(calibrate: Any, tmp_path: Path) -> None:
    done = calibrate("--dry-run", "--held-out", "2", "--error", "0.1")
    assert done.code == 0 and "an error of 0.1" in done.out and "0.5, 0.25, 0.125" in done.out
    assert done.out.count("\ncheck ") == 2 and done.out.count("\ncalibrate ") == 1
    data = json.loads(calibrate("--dry-run", "--json").out)
    assert (data["parts"], data["steps"], data["every"], data["checked_on"]) == (2, 2, 1, [])
    assert "by_head" not in data and json.loads(calibrate("--dry-run", "--json", "--by-head").out)["by_head"]
    assert list(tmp_path.iterdir()) == []


def test_by_head_the_table_shows_means_and_the_file_holds_rows(calibrate: Any, tmp_path: Path) -> None:
    done = calibrate("--by-head", "--held-out", "1", "--output", "out")
    assert done.code == 0 and "errors, calibrated over the same cost by layer alone: " in done.out
    method = Method.from_pretrained(tmp_path / "out")
    assert len(method.densities) == 12 and all(len(row) == 2 for row in method.densities)
    mean = sum(sum(row) for row in method.densities) / 24
    assert done.out.split("\nmean")[1].splitlines()[0].split()[-1] == f"{mean:.2f}"
    assert calibrate("--output", "out", "--resume").code == 2  # other measurements


def test_it_calibrates_on_training_captions_and_checks_on_others(calibrate: Any) -> None:
    defaults = models.call_defaults("tiny-video")
    train, held = (shuffled_captions(defaults, held_out, 6) for held_out in (False, True))
    assert not any(world.held_out(world.parse(text)) for text in train)
    assert all(world.held_out(world.parse(text)) for text in held)
    data = json.loads(calibrate("--dry-run", "--json", "--held-out", "3", "--seed", "5").out)
    assert [item["seed"] for item in data["calibrated_on"]] == [5]
    assert [item["seed"] for item in data["checked_on"]] == [1005, 1006, 1007]


def test_prompts_are_calibrated_on_and_the_next_ones_checked(calibrate: Any, tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\nfour\n")
    data = json.loads(calibrate("--dry-run", "--json", "--prompts", "p.txt", "--check", "2", "--items", "2").out)
    assert [item["prompt"] for item in data["calibrated_on"]] == ["one", "two"]
    assert [item["prompt"] for item in data["checked_on"]] == ["three", "four"]
    data = json.loads(calibrate("--dry-run", "--json", "--prompts", "p.txt", "--held-out", "1").out)
    assert data["calibrated_on"][0]["prompt"] == "one" and world.parse(data["checked_on"][0]["prompt"])


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--cost", "0.3", "--error", "0.1"), ("two budgets",)),
        (("--cost", "0"), ("--cost must be above 0",)),
        (("--cost", "1.5"), ("between 0 and 1", "1.5")),
        (("--densities", "a,b"), ("--densities", "0.5,0.25,0.125")),
        (("--densities", "0.5,2"), ("below 1, got 2.0",)),
        (("--parts", "9"), ("2 steps has no 9 parts",)),
        (("--items", "0"), ("at least 1",)),
        (("--method", "re-ttention"), ("takes one method, got 2",)),
        (("--set", "top_p=0.9"), ("no top_p",)),
        (("--check", "2", "--held-out", "2"), ("give one of them",)),
        (("--prompt", "one", "--check", "3"), ("--check 3", "there are 1")),
        (("--push-to-hub", "name"), ("ORG/NAME", "name")),
        (("--output", "a-file"), ("a-file", "give a folder")),
        (("--num-frames", "9"), ("num_frames",)),
    ],
)  # fmt: skip
def test_bad_input_is_refused_in_one_line(calibrate: Any, tmp_path: Path, words: tuple[str, ...], parts: Any) -> None:
    (tmp_path / "a-file").write_text("")
    calibrate(*words).refused(*parts)


def test_other_bad_input_is_refused(cli: Any, tmp_path: Path, folder_model: Path) -> None:
    cli("calibrate", "--model", "tiny-image").refused("takes one method, got 0", "--method NAME")
    cli("calibrate", "--method", "block-sparse").refused("no model")
    words = ("calibrate", "--model", folder_model, "--method", "block-sparse", "--set", "density=0.25")
    cli(*words).refused("no prompt", "--prompts FILE")
    cli(*words, "--prompt", "one", "--held-out", "2").refused("for embedded models")
    cli("calibrate", "--model", "tiny-image", "--method", "softpag").refused("softpag has no density")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "height": 64}\n{"prompt": "b", "height": 128}\n')
    cli("calibrate", *SMALL, "--prompts", "p.jsonl", "--items", "2").refused("height 128, 64", "one for all")
    (tmp_path / "p.jsonl").write_text('{"prompt": "a", "seed": 1}\n{"prompt": "a", "seed": 1}\n')
    cli("calibrate", *SMALL, "--prompts", "p.jsonl", "--items", "1", "--check", "1").refused("there twice")


def test_the_file_goes_to_the_hub_and_stays_here_when_that_fails(
    calibrate: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sent: list[tuple[str, str]] = []

    def push(self: Method, repo: str) -> str:
        sent.append((repo, self.slug))
        if len(sent) > 1:
            raise ConnectionError("nobody there")
        return "https://hub/commit"

    monkeypatch.setattr(Method, "push_to_hub", push)
    store = tmp_path / "out" / calibrate_run.MEASURED
    done = calibrate("--output", "out", "--json", "--push-to-hub", "me/mine")
    assert (
        done.code == 0 and json.loads(done.out)["hub"] == "https://hub/commit" and sent == [("me/mine", "block-sparse")]
    )
    before = store.read_text()
    refused = calibrate("--output", "out", "--resume", "--push-to-hub", "me/mine")
    refused.refused("cannot upload to me/mine", "nobody there", f"out/{FILE}", "--resume")
    assert (tmp_path / "out" / FILE).is_file() and store.read_text() == before


@pytest.mark.parametrize(
    ("value", "ci95", "words"),
    [
        (0.8, None, "0.80 times the error of one density for all, over 1 item; too few to tell"),
        (0.8, (0.7, 0.9), "Verdict: better, 0.80 times"),
        (0.98, (0.9, 1.1), "Verdict: no difference shown, 0.98 times"),
        (1.2, (1.1, 1.3), "Verdict: worse, 1.20 times"),
    ],
)
def test_the_verdict_is_in_words(value: float, ci95: Any, words: str) -> None:
    assert words in verdict({"value": value, "ci95": ci95, "n": 1 if ci95 is None else 9})


def test_the_bar_names_an_item_by_its_number() -> None:
    assert calibrate_run.short_label("a-red_s42_ab12: dense", ["x", "a-red_s42_ab12"]) == "item 2: dense"
    assert calibrate_run.short_label("choosing", ["x"]) == "choosing"
