"""``explain`` says what ``auto`` will do: what it picks in the run itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

import dit_attn
from dit_attn import Auto, models
from dit_attn.cli import main
from dit_attn.processors.attach.decision import TEXT_TOKENS, sequence_length, settle
from dit_attn.processors.methods.base import Method
from tests._support.cost_files import measured

SMALL = {"height": 64, "width": 64, "num_inference_steps": 4}


def test_explain_prints_the_decision_of_the_run(tmp_path: Path, monkeypatch: Any) -> None:
    measured(tmp_path, monkeypatch)
    pipe = models.load("tiny-image")
    pipe.set_progress_bar_config(disable=True)
    before = dit_attn.explain(pipe, "auto", **SMALL)
    dit_attn.enable(pipe, Auto(watch=False))
    pipe("a red circle", output_type="latent", **{**models.call_defaults("tiny-image"), **SMALL})
    after = dit_attn.summary(pipe)
    (decision,) = after.reports["auto"].decisions
    assert before.decision == decision and decision["method"]["method"] == "rectified-spaattn"
    for line in decision["text"].split("\n"):
        assert line[:60] in str(before).replace("\n" + 15 * " ", " ") and line[:60] in str(after)
    picked = Method.from_dict(decision["method"])
    alone = dit_attn.explain(pipe, picked, **SMALL)
    assert (before.density, before.memory, before.fallbacks) == (alone.density, alone.memory, alone.fallbacks)
    assert json.dumps(before.to_dict())


def test_a_decision_for_dense_attention_gains_nothing(tmp_path: Path, monkeypatch: Any) -> None:
    measured(tmp_path, monkeypatch, tokens=257)
    found = dit_attn.explain(models.load("tiny-image"), "auto", **SMALL)
    assert found.density == 1.0 and found.decision is not None and found.decision["method"] is None
    assert "dense: no gain is assumed, 256 tokens are fewer than the fewest measured, 257" in str(found)


def test_the_command_line_prints_it_too(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    measured(tmp_path, monkeypatch)
    assert main(["explain", "--model", "tiny-video", "--method", "auto", "--steps", "20"]) == 0
    shown = capsys.readouterr().out
    assert "re-ttention, density 0.0625, 5 of 20 steps dense" in shown and "costs: measured on this machine" in shown
    assert main(["explain", "--model", "tiny-video", "--method", "auto", "--preset", "none", "--json"]) == 0
    assert "the method's defaults" in json.loads(capsys.readouterr().out)["decision"]["text"]


def test_only_joint_attention_has_the_text_in_its_sequence() -> None:
    assert sequence_length(["blocks.0.attn1"], 100) == 100
    assert sequence_length(["blocks.0.attn"], 100) == 100 + TEXT_TOKENS
    assert sequence_length(["blocks.0.attn"], 100, 7) == 107


def test_the_other_methods_stay_where_they_are(tmp_path: Path, monkeypatch: Any) -> None:
    measured(tmp_path, monkeypatch)
    model, guidance = models.load("tiny-image").transformer, dit_attn.SoftPAG(heads="1")
    names = ["transformer_blocks.0.attn1"]
    found, decision = settle(model, (Auto(), guidance), names, (1, 16, 16), 20, dtype=torch.float32)
    assert decision is not None and found == (guidance, decision.method)
    assert settle(model, (guidance,), names, (1, 16, 16), 20) == ((guidance,), None)
    dense, decision = settle(model, (Auto(), guidance), names, (1, 16, 16), 20, dtype=torch.float16)
    assert dense == (guidance,) and decision is not None and "float16 was not measured" in decision.reason
