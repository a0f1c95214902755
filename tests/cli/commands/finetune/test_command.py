"""`dit-attn finetune`: a tiny run from end to end, resumed, and what is refused in one line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dit_attn import cli
from dit_attn.pipelines.finetune.loop import CHECKPOINT, Finetune


def test_a_tiny_run_is_stopped_resumed_and_leaves_what_generate_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["finetune", "sla", "--tiny", "--output", str(tmp_path), "--device", "cpu", "--set", "density=0.2"]
    stock = Finetune.train_step

    def stop(self: Finetune) -> float:
        if self.step == 1:
            raise KeyboardInterrupt
        return stock(self)

    monkeypatch.setattr(Finetune, "train_step", stop)
    assert cli.main(words) == 130
    assert "stopped at step 1 of 3; continue: dit-attn finetune" in capsys.readouterr().err
    monkeypatch.setattr(Finetune, "train_step", stock)
    assert cli.main(words) == 2 and "add --resume" in capsys.readouterr().err
    assert cli.main([*words, "--resume"]) == 0
    assert "The loss on held-out examples went from" in capsys.readouterr().out
    log = json.loads((tmp_path / "log.json").read_text())
    assert [entry["step"] for entry in log["log"]] == [0, 1, 2, 3] and log["method"]["density"] == 0.2
    assert "<svg" in (tmp_path / "finetune.html").read_text()
    call = ["--height", "32", "--width", "32", "--num-frames", "4", "--steps", "1", "--prompt", "a circle"]
    made = ["generate", "--model", str(tmp_path / "pipeline"), "--method", str(tmp_path / "method"), *call]
    assert cli.main([*made, "--output", str(tmp_path / "items"), "--device", "cpu"]) == 0
    assert "sparse" in capsys.readouterr().out


MODEL = ("--model", "tiny-video")


@pytest.mark.parametrize(
    ("words", "message"),
    (
        (("slaa", *MODEL), "unknown fine-tuning 'slaa'. Did you mean 'sla'"),
        (("sla",), "no model; give --model NAME"),
        (("sla", *MODEL, "--method", "sla", "--method", "block-sparse"), "cannot run together"),
        (("sla", *MODEL, "--set", "densty=0.1"), "Did you mean 'density'"),
        (("sla", *MODEL, "--densities", "0.3;0.1"), "--densities must be numbers with commas between"),
        (("sla", *MODEL, "--data", "absent"), "--data absent: there is no such folder"),
        (("sla", *MODEL, "--data", ".", "--prompt", "a cat"), "give one of them"),
        (("sla", *MODEL, "--stage", "half"), "unknown --stage 'half'"),
        (("sla", *MODEL, "--lr", "0"), "--lr must be above 0"),
        (("sla", *MODEL, "--method", "re-ttention"), "goes by what earlier steps of a run stored"),
        (("sla", *MODEL, "--method", "block-sparse", "--stage", "proj"), "learns no tensors of its own"),
        (("sla", *MODEL, "--resume", "--output", "new"), "nothing to resume: new/checkpoint.pt does not exist"),
        (("moh", *MODEL, "--set", "top_k=99"), "moh.top_k is 99, and 2 of 2 heads are routed"),
        (("moh", *MODEL, "--set", "shared=1"), "moh with one shared head of 2 gives it no router"),
        (("merge", "--base", "."), "finetune merge needs --tuned DIR"),
        (("merge", "--base", ".", "--tuned", ".", "--target", "."), "has no transformer weights"),
    ),
)
def test_bad_input_is_one_line_and_leaves_nothing(
    words: tuple[str, ...], message: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["finetune", *words]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not list(tmp_path.rglob(CHECKPOINT))
