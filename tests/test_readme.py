"""What the README claims is what the tests and the recorded files say."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dit_attn import models
from dit_attn.pipelines.high_resolution import high_resolution
from dit_attn.processors.attach.families import families
from tests._support import finetune_tables, head_tables, result_tables, selector_tables, subject_tables
from tests._support.page_tables import PageTable
from tests._support.subjects_benchmark import mcnemar
from tests.families import table as families_table

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = (finetune_tables, head_tables, selector_tables, subject_tables)


def test_family_table_is_the_one_the_tests_make() -> None:
    begin, end = families_table.BEGIN, families_table.END
    shown = README[README.index(begin) + len(begin) : README.index(end)].strip()
    assert shown == families_table.table(), "run: python -m tests.families.table"


def test_every_family_that_is_offered_is_tested() -> None:
    cases = families_table.tested()
    assert not [row.name for row in families() if not row.refused and row.name not in cases]


def test_the_comparison_is_what_the_records_say() -> None:
    assert result_tables.current() == result_tables.table(), "run: python -m tests._support.result_tables"


def test_the_dense_rows_are_those_of_the_records_and_their_intervals_overlap() -> None:
    shown = result_tables.current(result_tables.BASELINES)
    assert shown == result_tables.baselines(), "run: python -m tests._support.result_tables"
    for name in result_tables.MODELS:
        made = [result_tables.dense(pattern.format(name)) for pattern in result_tables.OF_MODELS.values()]
        assert len([found for found in made if found]) >= 3, name
        for earlier in (False, True):  # the weights of each are the same
            bounds = [found["ci95"] for found in made if found and found["earlier"] == earlier]
            assert not bounds or max(low for low, _ in bounds) <= min(high for _, high in bounds), name


def test_the_page_of_the_models_names_the_weights_that_ship() -> None:
    page = (ROOT / "docs/models.md").read_text()
    lines = [line for line in page.splitlines() if line.startswith("| `tiny-") and "shipped" in line]
    named = dict(re.findall(r"\| `(tiny-[a-z]+)` \| `([0-9a-f]{16})`", "\n".join(lines)))
    assert named == {name: result_tables.shipped(name) for name in models.available()}


IMAGES, VIDEOS = result_tables.rows()
RECOMMENDED = {
    "re-ttention": VIDEOS["re-ttention:density=0.0625,mask=selected"],
    "rectified-spaattn": IMAGES["rectified-spaattn:density=0.25"],
    "block-sparse": IMAGES["block-sparse:density=0.25"],
}
MEASURED = "rectified-spaattn:density=0.25,selector=measured,spread=head"


@pytest.mark.parametrize("slug", RECOMMENDED)
def test_a_recommendation_quotes_its_record(slug: str) -> None:
    row = RECOMMENDED[slug]
    share, decibels = 100 * row["attention_flops"]["value"], row["psnr"]["value"]
    line = next(line for line in README.splitlines() if line.startswith("| ") and f"| `{slug}`" in line)
    assert f"{share:.0f} % of the attention: {decibels:.0f} dB" in line


@pytest.mark.parametrize(("rows", "slug"), [(IMAGES, "rectified-spaattn"), (VIDEOS, "re-ttention")])
def test_a_recommended_method_follows_prompts_like_dense_and_is_closer_to_it_than_the_baseline(
    rows: Any, slug: str
) -> None:
    best, baseline = RECOMMENDED[slug], rows["block-sparse:density=0.25"]
    assert best["verifier"]["change"]["ci95"][1] >= 0.0  # within the interval over prompts
    assert best["psnr"]["ci95"][0] > baseline["psnr"]["ci95"][1]
    followed, of = (row["verifier"]["whole"] for row in (best, rows["dense"]))
    right, total = (round(found["value"] * found["n"]) for found in (followed, of))
    assert f"{right} of {of['n']} prompts (dense: {total})" in README


def test_measured_masks_are_the_closest_of_what_computes_less() -> None:
    """What the README's row of them says."""
    for rows in (IMAGES, VIDEOS):
        measured = rows[MEASURED]
        less = [row for row in rows.values() if row["attention_flops"]["value"] <= measured["attention_flops"]["value"]]
        assert max(less, key=lambda row: row["psnr"]["value"])["label"] == MEASURED
    share, *decibels = (IMAGES[MEASURED]["attention_flops"], IMAGES[MEASURED]["psnr"], VIDEOS[MEASURED]["psnr"])
    images, videos = (found["value"] for found in decibels)
    assert f"{100 * share['value']:.0f} % of the attention: {images:.0f} dB on images, {videos:.0f} on videos" in README


def test_auto_is_quoted_from_its_records() -> None:
    names = ("cpu_1_thread", "cpu_amx")
    rows = [row for name in names for row in json.loads((ROOT / f"benchmarks/auto/{name}.json").read_text())["rows"]]
    large, small = ([row for row in rows if (row["tokens"] or 1024) // 4000 == many] for many in (1, 0))
    assert large and max(row["against_dense"]["ci95"][1] for row in large) < 1.0
    slowest = max(row["against_dense"]["value"] for row in small) - 1
    assert f"faster on CPUs from 4,096 tokens; at 1,000 up to {100 * slowest:.0f} % slower" in README


def test_isolation_is_quoted_from_its_record() -> None:
    arms = json.loads((ROOT / "benchmarks/subjects/tiny-joint_isolation_2.json").read_text())["arms"]
    stock, isolated = (arms[name]["color"] for name in ("stock", "words and regions"))
    assert f"{100 * stock['rate']:.0f} to {100 * isolated['rate']:.0f} % of objects right" in README
    assert isolated["ci95"][0] > stock["ci95"][1] and f"{arms['stock']['prompts']} prompts" in README
    four = json.loads((ROOT / "benchmarks/subjects/tiny-multi_isolation_4.json").read_text())["arms"]
    assert four["words and regions"]["color"]["difference"]["ci95"][0] < 0 and "no gain on tiny-multi" in README


def test_edits_are_quoted_from_their_records() -> None:
    arms = [subject_tables.arms_of(f"tiny-edit_saas_{count}") for count in (2, 3, 4)]
    stock, lifted, wrong = (
        [one[name]["whole"] for one in arms] for name in ("stock", "strength 16, boxes given", "wrong words 16")
    )
    done, ours, other = (sum(one["right"] for one in rows) for rows in (stock, lifted, wrong))
    count = sum(one["of"] for one in stock)
    p = mcnemar(sum(one["mended"] for one in lifted), sum(one["broken"] for one in lifted))
    assert (
        f"{100 * done / count:.0f} to {100 * ours / count:.0f} % of instructions done on tiny-edit, p = {p:.4f}"
        in README
    )
    matched = [one["strength 16, boxes given"]["matched"]["whole"] for one in arms]
    for_it, against = (sum(one[word] for one in matched) for word in ("mended", "broken"))
    page = " ".join((ROOT / "docs/methods/saas.md").read_text().split())
    assert f"({for_it} against {against} instructions in favor of SaaS, p = {mcnemar(for_it, against):.2f})" in page
    assert f"edits {count} of two to four parts" in README.replace("\n", " ") and other < done


@pytest.mark.parametrize(
    "table", [*subject_tables.TABLES, *selector_tables.TABLES, *head_tables.TABLES], ids=lambda table: table.name
)
def test_tables_of_pages_are_those_of_their_records(table: PageTable) -> None:
    assert table.current() == table.text(), f"run: python -m {type(table).__module__}"


def test_large_pictures_are_quoted_from_their_records() -> None:
    record = json.loads((ROOT / "benchmarks/high_resolution/tiny-image_4x.json").read_text())
    rows = {row["arm"]: row for row in record["rows"]}
    dense, window = rows["two stages dense"], rows["two stages window"]
    ratio = dense["cpu seconds"]["value"] / window["cpu seconds"]["value"]
    assert f"of {window['factor']}x: {ratio:.1f}x faster" in README
    assert dense["whole"]["value"] <= window["whole"]["value"]
    table = json.loads((ROOT / "benchmarks/high_resolution/tiny-image.json").read_text())
    found = {(row["arm"], row["sigma"]): 100 * row["whole"]["value"] for row in table["rows"]}
    native, two = found["native", None], found["two stages window", high_resolution.IMAGES]
    assert f"images of 2x: {two:.0f} % follow the prompt (natively {native:.0f})" in README


def test_no_cell_above_the_fold_is_longer_than_a_line() -> None:
    text = README[: README.index("<details>")]
    cells = [cell for line in text.splitlines() if line.startswith("|") for cell in line.strip("|").split("|")]
    shown = [re.sub(r"\]\([^)]*\)", "]", cell).strip() for cell in cells]
    assert len(shown) > 40 and not [cell for cell in shown if len(cell) > 80]


@pytest.mark.parametrize("path", sorted(set(re.findall(r"\]\(((?!http)[^)#]+)\)", README))))
def test_linked_files_exist(path: str) -> None:
    assert (ROOT / path).exists()
