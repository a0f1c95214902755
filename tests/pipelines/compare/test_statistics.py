"""Intervals are honest: several seeds of one prompt are one observation, and distances of sets are not pushed up."""

from __future__ import annotations

import numpy as np
import pytest

from dit_attn.pipelines.compare import statistics
from dit_attn.pipelines.compare.records import ItemResult
from dit_attn.pipelines.compare.summary_row import summary_row


def width(figure: dict | None) -> float:
    assert figure is not None and figure["ci95"] is not None
    return figure["ci95"][1] - figure["ci95"][0]


def test_seeds_of_one_prompt_do_not_narrow_the_interval() -> None:
    prompts = np.random.default_rng(0).normal(size=20)
    values = [value for value in prompts for _ in range(8)]  # eight seeds that say the same
    groups = [i for i in range(20) for _ in range(8)]
    once, naive = statistics.mean_figure(list(prompts)), statistics.mean_figure(values)
    grouped = statistics.mean_figure(values, groups)
    assert grouped is not None and grouped["n"] == 160
    assert width(grouped) == pytest.approx(width(once)) and width(naive) < 0.5 * width(grouped)


def test_one_prompt_has_no_interval_however_many_seeds() -> None:
    found = statistics.mean_figure([0.0, 1.0, 2.0], ["a", "a", "a"])
    assert found == {"value": 1.0, "ci95": None, "n": 3}


def test_values_that_do_not_exist_take_their_group_along() -> None:
    found = statistics.mean_figure([1.0, None, 3.0], ["a", "b", "c"])
    assert found is not None and found["value"] == 2.0 and found["ci95"] == [1.0, 3.0]


def test_ratios_and_differences_are_resampled_by_prompt_too() -> None:
    groups = ["a", "a", "b", "b"]
    over, under = [2.0, 4.0, 8.0, 8.0], [2.0, 2.0, 2.0, 2.0]
    ratio = statistics.ratio_figure(over, under, groups)
    assert ratio is not None and ratio["value"] == 22 / 8 and ratio["ci95"] == [1.5, 4.0]  # of a alone, of b alone
    change = statistics.difference_figure([True, False, True, True], [False] * 4, groups)
    assert change is not None and change["value"] == 0.75 and change["ci95"] == [0.5, 1.0]


def test_every_interval_of_the_headline_is_by_prompt() -> None:
    verdict = {"shape": True}
    results = [
        ItemResult(
            "a", i, "one", i, seconds=1.0 + i, dense_seconds=2.0, run_density=0.5, psnr=30.0 + i, verdict=verdict
        )
        for i in range(3)
    ]
    row = summary_row(results, results)
    verifier = row["verifier"]
    figures = [row[key] for key in ("seconds", "speedup", "attention_flops", "psnr")]
    assert all(figure["ci95"] is None for figure in [*figures, verifier["whole"], verifier["change"]])


def test_operations_of_a_step_are_taken_at_the_size_of_every_item() -> None:
    small = ItemResult("a", 0, "x", 0, run_density=0.5, attention_share=0.2)
    large = ItemResult("a", 1, "y", 0, run_density=0.5, attention_share=0.8)
    row = summary_row([small, large], [])
    assert row["step_flops"] == pytest.approx((0.9 + 0.6) / 2) and row["ceiling"] == pytest.approx(1 / 0.75)
    assert summary_row([ItemResult("a", 0, "x", 0, run_density=0.5)], [])["step_flops"] is None


def test_the_jackknife_of_a_mean_is_its_standard_error() -> None:
    values = np.random.default_rng(2).normal(3.0, 1.0, 40)
    found = statistics.jackknife(40, list(range(40)), lambda items: float(values[items].mean()))
    error = values.std(ddof=1) / np.sqrt(40)
    assert found == pytest.approx([values.mean() - 1.96 * error, values.mean() + 1.96 * error])


def test_the_jackknife_leaves_out_whole_groups_in_a_bounded_number_of_blocks() -> None:
    seen: list[list[int]] = []

    def statistic(items: list[int]) -> float:
        seen.append(items)
        return float(len(items))

    statistics.jackknife(6, ["a", "a", "b", "b", "c", "c"], statistic)
    assert seen[:3] == [[2, 3, 4, 5], [0, 1, 4, 5], [0, 1, 2, 3]]
    seen.clear()
    statistics.jackknife(500, list(range(500)), statistic)
    assert len(seen) == statistics.BLOCKS + 1
    assert statistics.jackknife(4, ["a"] * 4, statistic) is None
    assert statistics.jackknife(2, ["a", "b"], statistic) is None  # one item is left: no set


def test_steadiness_is_for_clips_of_three_frames_and_more() -> None:
    still = np.full((3, 4, 4, 3), 7, np.uint8)
    assert statistics.temporal(still) == 1.0 and statistics.temporal(still[:2]) is None
    flicker = np.stack([np.full((4, 4, 3), 100 * (t % 2), np.uint8) for t in range(6)])
    found = statistics.temporal(flicker)
    assert found is not None and found < 0
