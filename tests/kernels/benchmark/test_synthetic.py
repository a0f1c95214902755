"""Random fields with the structure of pictures."""

from __future__ import annotations

import pytest
import torch

from dit_attn.kernels.benchmark.synthetic import STRUCTURES, Structure, rotated, structured_qkv

GRID = (4, 8, 8)


def test_the_six_kinds_differ_and_a_seed_repeats_them() -> None:
    found = {name: structured_qkv(kind, GRID, 2, 12, seed=3)[0] for name, kind in STRUCTURES.items()}
    assert len(found) == 6 and all(x.shape == (1, 256, 2, 12) for qkv in found.values() for x in qkv)
    again = structured_qkv(STRUCTURES["smooth"], GRID, 2, 12, seed=3)[0]
    assert all(torch.equal(a, b) for a, b in zip(found["smooth"], again, strict=True))
    assert not torch.allclose(found["smooth"][0], structured_qkv(STRUCTURES["smooth"], GRID, 2, 12, seed=4)[0][0])


def test_logits_have_the_spread_that_was_asked_for() -> None:
    q, k, _ = structured_qkv(Structure(sharpness=3.0), GRID, 1, 32)[0]
    logits = q[0, :, 0] @ k[0, :, 0].T * 32**-0.5
    assert float(logits.std()) == pytest.approx(3.0, rel=0.1)


def test_neighbors_are_alike_and_strangers_are_not() -> None:
    _, k, _ = structured_qkv(Structure(smooth=2.0, noise=0.1), (1, 24, 24), 1, 64, seed=1)[0]
    keys = torch.nn.functional.normalize(k[0, :, 0], dim=-1).unflatten(0, (24, 24))
    near = (keys[:, 1:] * keys[:, :-1]).sum(-1).mean()
    far = (keys[:, 12:] * keys[:, :-12]).sum(-1).mean()
    assert near > 0.6 and abs(far) < 0.2


def test_fields_turn_slowly() -> None:
    steps = structured_qkv(Structure(turn=0.1), GRID, 1, 16, steps=3)
    values = [v for _, _, v in steps]
    one, two = ((values[i] - values[0]).norm() / values[0].norm() for i in (1, 2))
    assert 0.0 < one < 0.2 and one < two < 0.4


def test_rotation_keeps_lengths_and_makes_logits_depend_on_differences_alone() -> None:
    q, k = (torch.randn(1, 1, 1, 18, generator=torch.Generator().manual_seed(i)).expand(1, 256, 1, 18) for i in (0, 1))
    turned_q, turned_k = rotated(q, GRID), rotated(k, GRID)
    torch.testing.assert_close(turned_q.norm(dim=-1), q.norm(dim=-1))
    logits = (turned_q[0, :, 0] @ turned_k[0, :, 0].T).view(*GRID, *GRID)
    torch.testing.assert_close(logits[0, 1, 2, 2, 4, 3], logits[1, 2, 4, 3, 5, 5])
    assert abs(float(logits[0, 0, 0, 0, 0, 0] - logits[0, 0, 0, 0, 0, 3])) > 1e-3
