"""``dit-attn bench model``."""

from __future__ import annotations

import json

import pytest
import torch

from dit_attn.cli.commands.bench.early import CONFIGS
from dit_attn.cli.commands.bench.model_table import what_it_can_gain
from dit_attn.models.architectures import ARCHITECTURES
from dit_attn.pipelines.benchmark.model_step import NOTE

SMALL = ("--layers", 2, "--heads", 1, "--tokens", 512, "--repeats", 1, "--threads", 1, "--device", "cpu")
SPARSE = "block-sparse:density=0.25,q_block=32,kv_block=32"


def test_the_table_and_the_record(cli, tmp_path) -> None:
    words = ("--config", "wan2.1-1.3b", "--random-weights", *SMALL, "--method", SPARSE)
    more = ("--method", "re-ttention:density=0.25,q_block=32,kv_block=32,period=3")
    done = cli("bench", "model", *words, *more, "-o", tmp_path / "deep" / "found.json")
    assert done.code == 0, done.err
    assert "wan2.1-1.3b (scaled): 2 layers, 1 head of 128" in done.out
    assert "81 frames of 112 x 64 pixels: 588 tokens" in done.out
    assert "refresh" in done.out and "mean of 3 steps" in done.out
    for column in ("whole step", "against dense [range]", "best possible", "attention alone", "choosing blocks"):
        assert column in done.out
    assert not {"pass", "FAIL", "target", "CPU time"} & set(done.out.split()) and NOTE not in done.out
    record = json.loads((tmp_path / "deep" / "found.json").read_text())
    assert {"command", "commit", "environment", "load_average", "note", "memory", "target"} <= record.keys()
    assert record["command"].startswith("dit-attn bench model --config wan2.1-1.3b --random-weights --method")
    assert record["model"]["grid"] == [21, 4, 7] and not record["model"]["real_size"]
    assert [row["phase"] for row in record["rows"]] == ["sparse", "refresh", "sparse", "mean of 3 steps"]
    assert "dense_layers" not in record["rows"][0]["fallbacks"]
    assert str(tmp_path) not in json.dumps(record)


@pytest.mark.parametrize("config", ["krea-2", "minimax-h3", "cosmos-3"])
def test_models_whose_sequence_is_packed_are_measured(cli, config) -> None:
    done = cli("bench", "model", "--config", config, *SMALL, "--method", SPARSE, "--json")
    assert done.code == 0, done.err
    record = json.loads(done.out)
    assert (record["model"]["layers"], record["model"]["heads"], record["model"]["head_dim"]) == (2, 1, 128)
    assert [row["phase"] for row in record["rows"]] == ["sparse"]


def test_targets_and_processor_times_are_for_those_who_ask(cli) -> None:
    done = cli("bench", "model", "--config", "flux", *SMALL, "--method", SPARSE, "--verbose")
    assert done.code == 0, done.err
    assert ("pass" in done.out or "FAIL" in done.out) and "CPU time" in done.out and NOTE in done.out


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0.13, "At 1,050 tokens attention is 13 % of a dense step: too short for sparse attention to pay; a step can "
               "become at most 1.15x as fast, were attention free."),
        (0.5, "At 1,050 tokens attention is 50 % of a dense step; a step can become at most 2.00x as fast"),
        (1.0, "the whole step can gain what attention gains"),
    ],
)  # fmt: skip
def test_what_a_step_can_gain_is_said_in_words(share, text) -> None:
    assert text in what_it_can_gain({"dense": {"attention_share": share}, "model": {"visual_tokens": 1050}})


def test_the_recorded_command_repeats_the_measurement(cli) -> None:
    done = cli("bench", "model", "--config", "flux", *SMALL, "--method", SPARSE, "--json")
    record = json.loads(done.out)
    again = cli(*record["command"].split()[1:], "--json")
    second = json.loads(again.out)
    assert second["model"] == record["model"] and second["command"] == record["command"]
    assert [row["density"] for row in second["rows"]] == [row["density"] for row in record["rows"]]


def test_presets_of_the_real_model_hold_but_for_its_dense_layers(cli) -> None:
    done = cli("bench", "model", "--config", "wan2.1-1.3b", *SMALL, "--method", "rectified-spaattn", "--json")
    (row,) = json.loads(done.out)["rows"]
    assert row["method"]["budget"] == "extra" and row["method"]["dense_layers"] == []
    kept = cli("bench", "model", "--config", "wan2.1-1.3b", *SMALL, "--method", "block-sparse:dense_layers=0", "--json")
    assert json.loads(kept.out)["rows"][0]["fallbacks"] == {"dense layer": 1}
    shown = cli("bench", "model", "--config", "wan2.1-1.3b", *SMALL, "--method", "block-sparse:dense_layers=0")
    assert "block-sparse:dense_layers=0, sparse: 1 of 2 calls stayed dense: dense layer" in shown.out


def test_the_names_of_the_help_are_those_of_the_table() -> None:
    assert tuple(row.name for row in ARCHITECTURES) == CONFIGS


def test_help_says_that_weights_do_not_matter(capsys) -> None:
    from dit_attn.cli import main

    with pytest.raises(SystemExit):
        main(["bench", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "latency does not depend on them" in text and "top_p" in text


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        ((), ("--config", "wan2.1-1.3b")),
        (("--config", "wan3"), ("wan3", "pixart-sigma")),
        (("--config", "flux", "--method", "blok-sparse"), ("blok-sparse", "block-sparse")),
        (("--config", "flux", "--method", "block-sparse:density=2"), ("density", "2")),
        (("--config", "flux", "--method", "block-sparse:density=1"), ("keeps everything",)),
        (("--config", "flux", "--method", SPARSE, "--method", SPARSE), ("twice",)),
        (("--config", "flux", "--method", "block-sparse + re-ttention"), ("cannot run together", "re-ttention")),
        (("--config", "flux", "--method", "block-sparse + softpag"), ("is not one sparse method", "softpag")),
        (("--config", "flux", "--layers", 1), ("--layers", "2")),
        (("--config", "flux", "--frames", 9), ("--frames", "images")),
        (("--config", "flux", "--tokens", 0), ("--tokens", "at least 1")),
        (("--config", "flux", "--tokens", 512, "--height", 512), ("--tokens", "--height")),
        (("--config", "flux", "--density", 0.5), ("--density", "--method")),
        (("--config", "flux", "--seq", 512), ("--seq", "leave it out")),
        (("--config", "flux", "--dtype", "int8"), ("--dtype", "bfloat16")),
        (("--config", "flux", "--dtype", "float32", "bfloat16"), ("--dtype", "one of")),
        (("--config", "flux", "--tokens", 64, "--layers", 2, "--heads", 1, "--preset", "wan9"), ("wan9",)),
        (("--config", "cosmos-3", *SMALL, "--batch", 2), ("--batch 2", "one sample")),
    ],
)
def test_bad_input_is_refused_in_one_line(cli, words, parts) -> None:
    cli("bench", "model", *words).refused(*parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_a_gpu_that_is_not_there_is_said(cli) -> None:
    cli("bench", "model", "--config", "flux", "--device", "cuda").refused("--device cuda", "GPU")


def test_what_a_method_keeps_counts_as_memory(cli, monkeypatch) -> None:
    monkeypatch.setattr("dit_attn.models.architecture.free_memory", lambda device: 60 * 2**30)
    words = ("bench", "model", "--config", "hunyuan-video", "--full", "--device", "cpu", "--dtype", "bfloat16")
    done = cli(*words, "--method", "block-sparse", "--method", "re-ttention")
    done.refused("hunyuan-video", "GiB of it cached by the method")


def test_the_full_size_is_refused_where_it_does_not_fit(cli, monkeypatch) -> None:
    monkeypatch.setattr("dit_attn.models.architecture.free_memory", lambda device: 2**30)
    done = cli("bench", "model", "--config", "wan2.1-14b", "--full", "--device", "cpu")
    done.refused("wan2.1-14b", "40 layers, 40 heads", "GiB", "--layers")
