"""Each statistic is that of a dense map in double precision, and known where attention is uniform or takes one key."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_attn.eval import attention_stats as stats

T, H, W, TEXT = 3, 4, 5, 7
S = TEXT + T * H * W
SPANS = (("text", 0, TEXT), ("video", TEXT, S))
BLOCK = 16


def inputs(kv_heads: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    return 2 * torch.randn(2, S, 4, 8).double(), torch.randn(2, S, kv_heads, 8).double()


def measured(q: torch.Tensor, k: torch.Tensor, picks: torch.Tensor, mask: torch.Tensor | None = None, **more: object):
    logits = stats.row_logits(q[:, picks], k, mask=mask)
    return stats.row_statistics(logits, SPANS, (TEXT, (T, H, W), picks - TEXT), BLOCK, **more)  # type: ignore[arg-type]


def dense_map(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """(B, H, S, S) logits, one head after the other."""
    parts = [q[:, :, h] @ k[:, :, h * k.shape[2] // 4].mT / 8**0.5 for h in range(4)]
    logits = torch.stack(parts, 1)
    return logits if mask is None else logits.masked_fill(~mask, -math.inf)


def brute(logits: torch.Tensor) -> dict[str, float]:
    """Every statistic of the rows of one head, (R, S) logits of rows at ``TEXT ...``, in plain Python."""
    rows: dict[str, list[float]] = {}
    for i, row in enumerate(logits.tolist()):
        total = sum(math.exp(x) for x in row)
        p = [math.exp(x) / total for x in row]
        exists = [x > -math.inf for x in row]
        blocks = [sum(p[b : b + BLOCK]) for b in range(0, S, BLOCK)]
        alive = sum(any(exists[b : b + BLOCK]) for b in range(0, S, BLOCK))
        values = {"lse": math.log(total), "entropy": -sum(x * math.log(x) for x in p if x > 0)}
        values |= {"keys_90": holding(p, sum(exists)), "blocks_90": holding(blocks, alive)}
        for share, name in zip((0.05, 0.1, 0.25), ("best_5", "best_10", "best_25")):
            values[name] = sum(sorted(blocks, reverse=True)[: math.ceil(share * alive)])
        values |= {"mass.text": sum(p[:TEXT]), "mass.video": sum(p[TEXT:])}
        here, place = divmod(i, H * W)[0], lambda j: (j // (H * W), j // W % H, j % W)
        for axis, name in enumerate(("dt", "dh", "dw")):
            apart = [abs(place(i)[axis] - place(j)[axis]) * p[TEXT + j] for j in range(T * H * W)]
            values[name] = sum(apart) / sum(p[TEXT:])
        frame = slice(TEXT + here * H * W, TEXT + (here + 1) * H * W)
        values["same_frame"] = sum(p[frame]) / sum(p[TEXT:])
        for name, value in values.items():
            rows.setdefault(name, []).append(value)
    means = {name: sum(found) / len(found) for name, found in rows.items()}
    spread = sum((x - means["lse"]) ** 2 for x in rows["lse"]) / len(rows["lse"])
    return {**means, "lse_spread": math.sqrt(spread)}


def holding(mass: list[float], count: int) -> float:
    running, needed = 0.0, 0
    for value in sorted(mass, reverse=True):
        running, needed = running + value, needed + 1
        if running >= 0.9 - 1e-6:
            break
    return needed / count


def key_mask() -> torch.Tensor:
    mask = torch.ones(2, 1, 1, S, dtype=torch.bool)
    mask[0, ..., 3:TEXT], mask[1, ..., 40:] = False, False
    return mask


@pytest.mark.parametrize("mask", [None, key_mask()], ids=["all keys", "padded"])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_statistics_are_those_of_the_dense_map(kv_heads: int, mask: torch.Tensor | None) -> None:
    q, k = inputs(kv_heads)
    found = measured(q, k, torch.arange(TEXT, S), mask)
    logits = dense_map(q, k, mask)
    for b in range(2):
        for h in range(4):
            for name, value in brute(logits[b, h, TEXT:]).items():
                assert float(found[name][b, h]) == pytest.approx(value, abs=1e-9), name


def test_single_precision_and_half_inputs_agree_with_double() -> None:
    q, k = (x.bfloat16() for x in inputs())
    picks = torch.arange(TEXT, S)
    exact = measured(q.double(), k.double(), picks)
    for name, value in measured(q, k, picks).items():
        torch.testing.assert_close(value.double(), exact[name], rtol=1e-4, atol=1e-4)


def test_an_additive_mask_means_what_a_boolean_one_does() -> None:
    q, k = inputs()
    picks, mask = torch.arange(TEXT, S), key_mask()
    added = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for name, value in measured(q, k, picks, mask).items():
        torch.testing.assert_close(measured(q, k, picks, added)[name], value, msg=name)


def test_uniform_attention_gives_known_values() -> None:
    q, k = torch.zeros(1, 640, 2, 4), torch.randn(1, 640, 2, 4)
    picks = torch.arange(640)
    found = stats.row_statistics(
        stats.row_logits(q, k), (("text", 0, 64), ("video", 64, 640)), None, 64, stats.row_logits(q, k[:, :10])
    )
    wanted = {
        "keys_90": 0.9, "blocks_90": 0.9, "best_5": 0.1, "best_10": 0.1, "best_25": 0.3, "recall_10": 0.1,
        "recall_25": 0.3, "recall_50": 0.5, "entropy": math.log(640), "lse": math.log(640), "lse_spread": 0.0,
        "mass.text": 0.1, "mass.video": 0.9,
    }  # fmt: skip
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], torch.full((1, 2), value), atol=1e-5, rtol=1e-5, msg=name)
    near = stats.locality(torch.full((1, 1, 640, 640), 1 / 640), (10, 8, 8), picks)
    for name, size in (("dt", 10), ("dh", 8), ("dw", 8)):
        assert float(near[name].mean()) == pytest.approx(stats.uniform_distance(size), rel=1e-4)
    assert float(near["same_frame"].mean()) == pytest.approx(0.1, rel=1e-4)


def test_attention_to_one_key_gives_known_values() -> None:
    logits = torch.full((1, 1, S, S), -1e4)
    logits[..., torch.arange(S), torch.arange(S)] = 100.0  # every row attends to itself
    picks = torch.arange(TEXT, S)
    found = stats.row_statistics(logits[:, :, picks], SPANS, (TEXT, (T, H, W), picks - TEXT), BLOCK)
    wanted = dict.fromkeys(("entropy", "lse_spread", "mass.text", "dt", "dh", "dw"), 0.0)
    wanted |= dict.fromkeys(("best_5", "best_10", "best_25", "mass.video", "same_frame"), 1.0)
    wanted |= {"keys_90": 1 / S, "blocks_90": 1 / math.ceil(S / BLOCK), "lse": 100.0}
    assert {name: float(value) for name, value in found.items()} == pytest.approx(wanted, abs=1e-6)


def test_the_recall_of_a_selection_is_the_mass_of_the_blocks_it_picks() -> None:
    mass, scores = torch.tensor([0.1, 0.2, 0.3, 0.4]), torch.tensor([9.0, 1.0, 7.0, 0.0])
    for share, recall in ((0.25, 0.1), (0.26, 0.4), (0.5, 0.4), (0.75, 0.6), (1.0, 1.0)):
        assert float(stats.selected_mass(mass, scores, 4, share)) == pytest.approx(recall)
    assert float(stats.best_mass(mass, 4, 0.5)) == pytest.approx(0.7)


def test_scores_of_block_means_are_those_of_pooled_keys() -> None:
    q, k = inputs(2)
    allowed = key_mask()[:, 0, 0]
    found = stats.mean_scores(q[:, :3], k, BLOCK, allowed)
    for b in range(2):
        for h in range(4):
            for n in range(found.shape[-1]):
                part = slice(n * BLOCK, (n + 1) * BLOCK)
                keys = k[b, part, h // 2][allowed[b, part]]
                wanted = q[b, :3, h] @ keys.mean(0) / 8**0.5 if len(keys) else torch.full((3,), -math.inf).double()
                torch.testing.assert_close(found[b, h, :, n], wanted)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**31), st.sampled_from((0.1, 0.25, 0.5)), st.sampled_from((0.1, 1.0, 8.0)))
def test_no_selection_beats_the_best_blocks(seed: int, share: float, sharpness: float) -> None:
    torch.manual_seed(seed)
    mass, scores = (sharpness * torch.randn(3, 13)).softmax(-1), torch.randn(3, 13)
    best, selected = stats.best_mass(mass, 13, share), stats.selected_mass(mass, scores, 13, share)
    assert bool((best >= selected - 1e-6).all()) and bool((selected >= 0).all()) and bool((best <= 1 + 1e-6).all())
    enough = stats.share_for_mass(mass, 13)
    assert bool((stats.best_mass(mass, 13, 1.0) >= 0.9).all())
    for row in range(3):
        assert float(stats.best_mass(mass[row], 13, float(enough[row]))) >= 0.9 - 1e-5


def test_rows_that_may_read_nothing_are_left_out_and_all_of_them_are_a_hole() -> None:
    q, k = inputs()
    picks = torch.arange(TEXT, TEXT + 8)
    mask = torch.ones(2, 1, 8, S, dtype=torch.bool)
    mask[0, :, 4:], mask[1] = False, False
    found, half = measured(q, k, picks, mask), measured(q, k, picks[:4])
    for name, value in found.items():
        torch.testing.assert_close(value[0], half[name][0], msg=name)
        assert bool(value[1].isnan().all()), name


def test_sampled_rows_are_a_function_of_the_seed_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    one, same, other = (stats.sample_rows(10, 500, 64, seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one, same) and not torch.equal(one, other)
    assert len(set(one.tolist())) == 64 and int(one.min()) >= 10 and int(one.max()) < 500
    assert stats.sample_rows(10, 20, 64, 0).tolist() == list(range(10, 20))


def test_every_statistic_can_be_described() -> None:
    q, k = inputs()
    found = measured(q, k, torch.arange(TEXT, S), scores=torch.randn(2, 4, S - TEXT, math.ceil(S / BLOCK)))
    for name in found:
        about = stats.describe(name)
        assert about.title and about.unit and about.reading.endswith(".")
    assert set(stats.STATISTICS) <= set(found)
