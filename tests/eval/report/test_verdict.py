"""What a comparison decides, and what it leaves open; a page and the terminal print these words."""

from __future__ import annotations

from typing import Any

import pytest

from dit_attn.eval.report.verdict import Verdict, headline, speed_estimate, verdict, verdicts
from dit_attn.pipelines.compare.statistics import difference_figure, mean_figure, ratio_figure

PROMPTS = 100


def row(label: str = "sparse:density=0.25", speed: float = 1.3, lost: int = 0, won: int = 0, prompts: int = PROMPTS,
        noise: float = 0.05, **more: Any) -> dict[str, Any]:  # fmt: skip
    """A row as a comparison records it: of ``prompts`` that dense all follows but ``won``, ``lost`` are lost."""
    dense = [0] * won + [1] * (prompts - won)
    own = [1] * (prompts - lost) + [0] * lost
    seconds = [1.0 + noise * (-1) ** i for i in range(prompts)]
    names = list(range(prompts))
    verifier = {"whole": mean_figure(own, names), "change": difference_figure(own, dense, names)}
    return {
        "label": label, "items": prompts, "equal": 0, "methods": [{"method": "block-sparse"}], "call": {},
        "speedup": ratio_figure([speed] * prompts, seconds, names), "verifier": verifier, "ssim": mean_figure([0.95]),
        "psnr": mean_figure([30.0]), "attention_flops": mean_figure([0.25]), "parallel": None, **more,
    }  # fmt: skip


def dense(prompts: int = PROMPTS, won: int = 0) -> dict[str, Any]:
    followed = [0] * won + [1] * (prompts - won)
    return {"label": "dense", "verifier": {"whole": mean_figure(followed)}}


def decided(one: dict[str, Any], prompts: int = PROMPTS, won: int = 0) -> Verdict:
    return verdict(one, dense(prompts, won), prompts)


@pytest.mark.parametrize(
    ("changes", "kind", "chip"),
    [
        ({"lost": 0}, "good", "keeps quality, 1.3x"),
        ({"lost": 1, "won": 1}, "good", "keeps quality, 1.3x"),
        ({"lost": 40}, "bad", "faster, loses quality"),
        ({"lost": 40, "speed": 0.8}, "bad", "no gain, loses quality"),
        ({"speed": 1.0}, "none", "no gain"),
        ({"speed": 0.7}, "none", "no gain"),
        ({"speed": 1.02}, "good", "keeps quality, 1.02x"),  # little, and sure
        ({"items": 0}, "bad", "failed"),
    ],
)
def test_enough_prompts_decide(changes: dict[str, Any], kind: str, chip: str) -> None:
    found = decided(row(**changes), won=changes.get("won", 0))
    assert (found.kind, found.chip, found.prompts) == (kind, chip, 0)


@pytest.mark.parametrize(("lost", "prompts"), [(0, 2), (1, 2), (1, 16), (2, 24)])
def test_few_prompts_are_too_few_and_the_number_that_would_do_does(lost: int, prompts: int) -> None:
    found = decided(row(lost=lost, prompts=prompts), prompts)
    assert found.kind == "few" and found.chip == f"too few prompts: {found.prompts} would do"
    assert found.prompts > prompts
    many = found.prompts * 2  # the share that was seen stays, so that more prompts than that decide for sure
    again = decided(row(lost=round(lost / prompts * many), prompts=many), many)
    assert again.kind != "few", again


def test_the_number_of_prompts_follows_from_the_spread() -> None:
    calm, wild = (decided(row(lost=n, won=n, prompts=20), 20, won=n).prompts for n in (1, 5))
    assert 20 < calm < wild
    noisy = decided(row(speed=1.06, noise=0.3, prompts=40), 40)
    assert noisy.kind == "few" and "Speed undecided" in noisy.sentence


def test_the_sentence_has_the_figures_and_counts() -> None:
    assert decided(row(lost=40)).sentence == (
        "1.30x as fast as dense (1.29 to 1.31); prompt followed 60 of 100 times, dense 100 of 100; "
        "25 % of the attention computed."
    )
    assert decided(row(speed=1.0, noise=0.1)).sentence.startswith("No measurable speed-up (1.00x, 0.98 to 1.02)")
    assert decided(row(speed=0.7)).sentence.startswith("Slower than dense (0.70")


def test_prompts_that_cannot_be_judged_are_compared_with_dense_and_the_words_say_so() -> None:
    close = decided(row(verifier=None))
    assert (close.kind, close.chip) == (
        "good",
        "close to dense, 1.3x",
    ) and "SSIM 0.95 to dense, PSNR 30 dB" in close.sentence
    far = decided(row(verifier=None, ssim=mean_figure([0.5])))
    assert (far.kind, far.chip) == ("look", "faster, differs from dense") and "look at the items" in far.claim
    assert "quality" not in close.chip + close.sentence + far.chip + far.sentence


def test_a_method_that_changes_no_pixel_is_called_that() -> None:
    found = decided(row(speed=1.0, equal=PROMPTS))
    assert found.chip == "no gain" and "every pixel is that of dense" in found.sentence


@pytest.mark.parametrize(
    ("won", "lost", "chip"),
    [(40, 0, "better than dense, 2x the time"), (0, 0, "no better than dense"), (0, 40, "worse than dense")],
)
def test_guidance_is_judged_by_quality_and_its_cost_is_said(won: int, lost: int, chip: str) -> None:
    one = row(speed=0.5, won=won, lost=lost, parallel=mean_figure([0.2]))
    found = decided(one, won=won)
    assert found.chip == chip and "Takes 2 times as long as dense" in found.sentence
    plain = row(speed=0.5, won=won, lost=lost, methods=[], call={"guidance_scale": 4})
    assert decided(plain, won=won).chip == chip
    few = decided(row(speed=0.5, won=1, prompts=8, parallel=mean_figure([0.2])), 8, won=1)
    assert few.kind == "few"


def test_the_best_method_comes_first_and_the_headline_names_it() -> None:
    far = row("far", verifier=None, ssim=mean_figure([0.5]))
    few = row("few", lost=20, won=20)
    rows = [dense(), row("lossy", lost=40), row("slow", speed=0.7), few, far, row("good"), row("better", speed=1.5)]
    found = verdicts(rows, PROMPTS)
    assert [one.label for one in found] == ["better", "good", "far", "few", "slow", "lossy"]
    assert headline(found, PROMPTS) == "better keeps quality and is 1.5x as fast as dense."


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([row(speed=0.7)], "No method is faster than dense here. Attention is 13 % of the operations"),
        ([row(lost=40)], "No method keeps quality."),
        ([row(lost=40), row("slow", speed=0.7)], "No method is faster than dense and keeps quality."),
        ([row(items=0)], "Every item failed."),
        ([], "Nothing was compared with dense."),
        ([row(parallel=mean_figure([0.2]))], "No method follows more prompts than dense."),
    ],
)
def test_a_headline_without_a_winner_says_why(rows: list[dict[str, Any]], words: str) -> None:
    assert headline(verdicts([dense(), *rows], PROMPTS), PROMPTS, 0.13).startswith(words)


def test_a_headline_of_few_prompts_says_how_many_would_do() -> None:
    found = verdicts([dense(2), row(lost=1, prompts=2), row("other", prompts=2)], 2)
    lossy, same = sorted(found, key=lambda one: one.quality)
    assert found[0] == same and same.prompts > lossy.prompts
    assert headline(found, 2) == f"Too few prompts to decide (2): {same.prompts} would do."
    later = f"{lossy.prompts} would do for the best so far, {same.prompts} for every method."
    assert headline(found[::-1], 2) == f"Too few prompts to decide (2): {later}"
    assert headline(found[:1], 2) == f"Too few prompts to decide (2): {found[0].prompts} would do."


def test_seeds_of_one_prompt_are_no_further_prompts() -> None:
    one = row(prompts=40)
    assert decided(one, 40).kind == "good" and verdict(one, dense(40), 4).kind == "few"
    wide, narrow = (speed_estimate(one, count) for count in (4, 40))
    assert wide is not None and narrow is not None and wide.low < narrow.low < narrow.high < wide.high


def test_a_headline_blames_short_attention_only_where_it_is_short() -> None:
    assert (
        headline(verdicts([dense(), row(speed=0.7)], PROMPTS), PROMPTS, 0.5) == "No method is faster than dense here."
    )
