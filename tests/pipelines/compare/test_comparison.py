"""A comparison is fair (same noise, turns within rounds, dense first) and its figures are what they say."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from dit_attn import BlockSparse, models
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.compare import DENSE, ItemResult, Variant, compare, statistics
from dit_attn.pipelines.compare.comparison import as_frames, attention_share, run_round, with_dense
from dit_attn.pipelines.compare.summary_row import summary_row

CAPTION = "a large red circle at the left on white"
HALF = BlockSparse(density=0.5, q_block=32, kv_block=32, dense_steps=0)


@pytest.fixture(scope="module")
def pipe():
    found = models.load("tiny-image")
    found.set_progress_bar_config(disable=True)
    return found


@pytest.fixture(scope="module")
def result(pipe):
    call = {**models.call_defaults("tiny-image"), "num_inference_steps": 2}
    variants = [Variant("one", (BlockSparse(density=1.0),)), Variant("half", (HALF,))]
    return compare(pipe, [CAPTION, "a red thing"], variants, seeds=(3,), call=call, metrics=("fid-world", "clip-world"))


def test_psnr_of_known_errors() -> None:
    black = np.zeros((1, 4, 4, 3), np.uint8)
    assert statistics.psnr(black, black) == math.inf
    assert statistics.psnr(black, black + 51) == pytest.approx(20 * math.log10(5))


def test_equal_outputs_score_no_decibels_but_are_counted() -> None:
    gray = np.full((1, 16, 16, 3), 90, np.uint8)
    assert statistics.pair_scores(gray, gray) == {"psnr": None, "ssim": 1.0, "equal": True}
    noisy = np.random.default_rng(0).integers(0, 255, gray.shape, dtype=np.uint8)
    found = statistics.pair_scores(gray, noisy)
    assert found["psnr"] < 15 and found["ssim"] < 0.5 and not found["equal"]
    with pytest.raises(DitAttnError, match="one size"):
        statistics.pair_scores(gray, noisy[:, :8])


def test_every_item_is_made_by_everyone_dense_first_and_in_turns(result) -> None:
    order = [(one.index, one.variant) for one in result.results]
    assert order == [(i, label) for i in (0, 1) for label in ("dense", "one", "half")]
    assert all(one.error is None and one.seconds > 0 for one in result.results)


def test_density_one_gives_the_pixels_of_dense_and_half_does_not(result) -> None:
    dense, one, half = result.summary_rows()
    assert (dense["equal"], one["equal"], half["equal"]) == (2, 2, 0)
    assert one["psnr"] is None and one["ssim"]["value"] == 1.0 and one["attention_flops"]["value"] == 1.0
    assert half["psnr"]["value"] > 10 and half["attention_flops"]["value"] == pytest.approx(0.5, abs=0.02)
    assert half["step_flops"] == pytest.approx(1 - 0.5 * result.attention_share, abs=0.02)
    assert half["methods"] == [HALF.to_dict()]


def test_metrics_are_taken_from_the_frames_in_memory(result) -> None:
    dense, one, half = (row["metrics"] for row in result.summary_rows())
    assert dense["fid-world"]["value"] is None and dense["clip-world"]["n"] == 2
    assert abs(one["fid-world"]["value"]) < 1e-6 < half["fid-world"]["value"]
    assert one["clip-world"] == dense["clip-world"]


def test_only_captions_of_the_world_are_judged(result) -> None:
    assert [one.verdict is None for one in result.results] == [False] * 3 + [True] * 3
    assert result.summary_rows()[0]["verifier"]["whole"]["n"] == 1


def test_dense_runs_on_the_stock_pipeline_and_methods_are_off_afterwards(pipe, result) -> None:
    from dit_attn.processors.attach.attention_processor import is_wrapped

    assert not any(is_wrapped(getattr(module, "processor", None)) for module in pipe.transformer.modules())


def test_the_ratio_of_times_is_taken_within_rounds() -> None:
    slow_machine = ItemResult("a", 0, "x", 0, seconds=10.0, dense_seconds=20.0)
    fast_machine = ItemResult("a", 1, "", 0, seconds=1.0, dense_seconds=2.0)
    row = summary_row([slow_machine, fast_machine], [])
    assert row["speedup"]["value"] == pytest.approx(2.0)
    assert row["speedup"]["ci95"] == pytest.approx([2.0, 2.0])
    assert summary_row([fast_machine], [])["speedup"]["ci95"] is None  # one item says nothing of the spread


def test_bootstrap_intervals_cover_the_mean_of_known_data() -> None:
    values = np.random.default_rng(1).normal(5.0, 1.0, 400)
    found = statistics.mean_figure(list(values))
    assert found is not None and found["n"] == 400
    low, high = found["ci95"]
    assert low < 5.0 < high and high - low == pytest.approx(2 * 1.96 / 20, rel=0.2)
    assert statistics.mean_figure([None, None]) is None


def test_the_change_of_accuracy_is_taken_on_the_same_items() -> None:
    right, wrong = {"shape": True, "color": True}, {"shape": True, "color": False}
    dense = [ItemResult("dense", i, "", 0, verdict=right) for i in range(4)]
    ours = [ItemResult("a", i, "", 0, verdict=wrong if i == 0 else right) for i in range(4)]
    found = summary_row(ours, dense)["verifier"]
    assert found["whole"]["value"] == 0.75 and found["change"]["value"] == -0.25
    assert found["attributes"]["value"] == pytest.approx(7 / 8)
    assert found["by"]["color"]["value"] == 0.75 and found["by"]["shape"]["value"] == 1.0


def test_a_failure_is_kept_with_its_reason_and_the_others_go_on(pipe) -> None:
    calls = iter([RuntimeError("kernel\nbroke"), (np.zeros((1, 16, 16, 3), np.uint8), 1.0)])

    def make(variant):
        value = next(calls)
        if isinstance(value, Exception):
            raise value
        return value

    results = list(run_round(pipe, ItemResult("", 0, "x", 0), [DENSE, Variant("half", (HALF,))], make, lambda *_: None))
    assert results[0].error == "RuntimeError: kernel" and results[1].error is None
    assert results[1].dense_seconds is None and results[1].psnr is None  # nothing to compare with


def test_dense_is_added_once_and_names_are_unique() -> None:
    assert with_dense([Variant("a"), DENSE])[0] is DENSE and len(with_dense([DENSE])) == 1
    with pytest.raises(DitAttnError, match="two variants are called 'a'"):
        with_dense([Variant("a"), Variant("a", (HALF,))])


def test_frames_are_read_from_pictures_and_clips() -> None:
    assert as_frames(SimpleNamespace(images=np.ones((1, 4, 5, 3)))).shape == (1, 4, 5, 3)
    video = as_frames(SimpleNamespace(frames=np.full((1, 7, 4, 5, 3), 0.5), images=None))
    assert video.shape == (7, 4, 5, 3) and video.max() == 128


def test_an_unknown_model_has_no_share_of_attention() -> None:
    assert attention_share(SimpleNamespace(), {}) is None
