"""Decisions of ``auto``: by the edges of the cost table, the steps, the memory, and the kind of model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dit_attn import Auto, ReTtention
from dit_attn.kernels.cost import Cost, CostTable, Machine
from dit_attn.processors.methods.auto_choice import Decision, RunShape

IMAGE = RunShape(4096, (1, 64, 64), 4096, 24, 64, "float32", "cpu", 20, 30)
VIDEO = replace(IMAGE, grid=(16, 16, 16))
FAST = {0.0625: 0.1, 0.25: 0.3, 0.5: 0.6}


def table(ratios: dict[float, float] = FAST, tokens: int = 4096) -> CostTable:
    costs = tuple(Cost(64, "float32", tokens, density, ratio) for density, ratio in ratios.items())
    return CostTable(Machine("cpu", "x", 1, "2", 1), costs)


AUTO = Auto()


def decide(shape: RunShape, ratios: dict[float, float] = FAST, auto: Auto = AUTO, free: int = 2**40) -> Decision:
    return auto.decide(shape, table(ratios), free)


def slug(decision: Decision) -> str:
    return decision.method.slug if decision.method is not None else "dense"


def test_videos_and_images_have_the_candidate_that_keeps_them_best_first() -> None:
    assert slug(decide(VIDEO)) == "re-ttention" and slug(decide(IMAGE)) == "rectified-spaattn"
    assert slug(decide(IMAGE, auto=Auto(candidates=("block-sparse", "re-ttention")))) == "block-sparse"


def test_the_edges_of_the_table_are_the_edges_of_what_is_sparse() -> None:
    assert slug(decide(replace(IMAGE, tokens=4096))) != "dense"
    short = decide(replace(IMAGE, tokens=4095, visual=4095))
    assert slug(short) == "dense" and "4,095 tokens are fewer than the fewest measured, 4,096" in short.reason
    assert slug(decide(replace(IMAGE, head_dim=63))) == slug(decide(replace(IMAGE, dtype="float16"))) == "dense"


def test_a_candidate_that_would_not_gain_gives_way_to_the_next_one_and_then_to_dense() -> None:
    # Re-ttention costs 1 / period + ratio(0.0625), Rectified SpaAttn 1.2 ratio(0.25 + 1/32).
    second = decide(VIDEO, {0.0625: 0.75, 0.25: 0.75, 0.5: 0.75})
    assert slug(second) == "rectified-spaattn" and "re-ttention is expected to take 0.95" in second.reason
    none = decide(VIDEO, {0.0625: 0.8, 0.25: 0.8, 0.5: 0.8})
    assert slug(none) == "dense" and none.reason.count("is expected to take") == 2
    least = decide(VIDEO, {0.0625: 0.82, 0.25: 0.82, 0.5: 0.82}, Auto(min_gain=1.0))
    assert slug(least) == "rectified-spaattn"


def test_what_a_call_takes_besides_its_kernels_counts_by_the_size_of_the_call() -> None:
    costs = tuple(replace(cost, seconds=1e-3) for cost in table().costs)
    slow = replace(table(), costs=costs, fixed=6e-3)
    ratios = [AUTO.decide(replace(IMAGE, heads=12, batch=batch), slow, 2**40).ratio for batch in (1, 2)]
    least = decide(IMAGE).ratio
    assert least is not None and ratios == [pytest.approx(least + 0.5), pytest.approx(least + 0.25)]
    few = AUTO.decide(replace(IMAGE, heads=6), slow, 2**40)
    assert slug(few) == "dense" and f"rectified-spaattn is expected to take {least + 1:.2f}" in few.reason


def test_rows_of_text_are_dense_in_the_expected_time() -> None:
    half = replace(IMAGE, visual=2048)
    ratios = (decide(IMAGE).ratio, decide(half).ratio)
    assert ratios[0] is not None and ratios[1] == pytest.approx(0.5 * ratios[0] + 0.5)


@pytest.mark.parametrize("steps", [4, 9])
def test_few_steps_have_no_history_and_a_bound_instead_of_dense_steps(steps: int) -> None:
    found = decide(replace(VIDEO, steps=steps))
    assert slug(found) == "rectified-spaattn" and f"which {steps} steps do not repay" in found.reason
    assert found.method is not None and found.method.max_error == 0.1 and found.method.dense_steps == 0
    assert f"0 of {steps} steps dense" in found.lines()[0] and "at most 0.1" in found.lines()[0]
    many = decide(replace(VIDEO, steps=10))
    assert slug(many) == "re-ttention" and many.method is not None and many.method.max_error is None


def test_an_unknown_number_of_steps_has_no_history_either_and_keeps_its_dense_steps() -> None:
    found = decide(replace(VIDEO, steps=None))
    assert slug(found) == "rectified-spaattn" and found.method is not None and found.method.dense_steps == 0.1


def test_statistics_that_do_not_fit_into_a_quarter_of_the_memory_are_not_stored() -> None:
    needed = ReTtention().cache_bytes(4096, 24, 64, 4) * 30 * 2
    assert slug(decide(VIDEO, free=4 * needed)) == "re-ttention"
    found = decide(VIDEO, free=4 * needed - 4)
    assert slug(found) == "rectified-spaattn" and "more than a quarter of the free memory" in found.reason


def test_blocks_that_are_added_to_the_density_are_counted() -> None:
    """The preset of Wan adds every neighbor of a block to its density: nearly all of 32 blocks."""
    auto = Auto(preset="wan2.1-1.3b", candidates=("rectified-spaattn",))
    sizes = (replace(VIDEO, tokens=256 * width, visual=256 * width, grid=(16, 16, width)) for width in (16, 256))
    small, large = (decide(shape, auto=auto) for shape in sizes)
    assert slug(small) == "dense" and slug(large) == "rectified-spaattn"


def test_settings_are_those_of_the_preset_with_their_provenance() -> None:
    found = decide(VIDEO, auto=Auto(preset="tiny-video"))
    assert found.method == ReTtention(density=0.0625, q_block=36, kv_block=36)
    assert found.settings == "preset tiny-video (measured on this model)"
    assert decide(VIDEO, auto=Auto(preset="none")).settings == "the method's defaults"
    assert decide(VIDEO).to_dict()["method"]["density"] == 0.0625
