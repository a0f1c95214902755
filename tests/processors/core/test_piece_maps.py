"""Where pieces are among the keys, and maps of their attention with and without the factors that act."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.observation import Observation
from dit_attn.processors.core.piece_maps import PieceMaps, find_pieces, observe_pieces, unscaled
from tests._support.core_calls import GRID, TEXT, VISUAL, Dispatched, host_run, random_args

PLACES = {"a": [1, 2, 3], "b": [3, 4]}


def call_of(branches: tuple[str, ...] = ("uncond", "cond")) -> AttentionCall:
    run, layer = host_run([])
    call = Dispatched(run, layer, random_args()).call
    assert call is not None
    call.branches, call.samples = branches, (0, 0)

    def find(call: AttentionCall, piece: Any) -> torch.Tensor:
        if piece not in PLACES:
            raise DitAttnError("cut off")
        out = torch.zeros(2, call.k.shape[1], dtype=torch.bool)
        out[1, PLACES[piece]] = True
        return out

    call.find_piece = find
    return call


def test_every_key_is_of_one_piece_and_of_rows_that_have_it() -> None:
    lost: list[str] = []
    spoken = find_pieces(call_of(), [("a",), ("a", "b", "c")], lost.append)
    assert spoken.rows == ((), ("a", "b")) and lost == ["c"]
    assert {name: words.nonzero().tolist() for name, words in spoken.words.items()} == {
        "a": [[1, 1], [1, 2], [1, 3]],
        "b": [[1, 4]],
    }
    with pytest.raises(DitAttnError, match="cut off"):
        find_pieces(call_of(), [(), ("c",)])


def test_the_shares_without_factors_are_those_of_the_softmax_without_them() -> None:
    draw = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 5, 7, generator=draw, dtype=torch.float64)
    logs = torch.rand(5, 2, generator=draw, dtype=torch.float64)
    lifted = logits.clone()
    lifted[..., 0:2] += logs[:, :1]
    lifted[..., 2:3] += logs[:, 1:]

    def shares(x: torch.Tensor) -> torch.Tensor:
        weights = x.softmax(-1)
        return torch.stack([weights[..., 0:2].sum(-1), weights[..., 2], weights[..., 5]], -1)

    torch.testing.assert_close(unscaled(shares(lifted), logs), shares(logits), atol=1e-14, rtol=1e-12)


def test_maps_of_layers_add_up_for_the_conditional_row() -> None:
    call, request, found = call_of(), Request(), {}
    spoken = find_pieces(call, [(), ("a", "b")])
    picture = torch.zeros(2, TEXT + VISUAL, dtype=torch.bool)
    picture[1, TEXT:] = True

    def maps_of(number: int, pieces: tuple[str, ...]) -> PieceMaps:
        return found.setdefault(number, PieceMaps(pieces, GRID))

    observe_pieces(call, request, spoken, maps_of, rival=picture)
    (probe,) = request.probes
    assert len(probe.spans) == 3 and probe.rows == ()
    mass = torch.rand(2, 4, TEXT + VISUAL, 3, generator=torch.Generator().manual_seed(0)) / 3
    for _ in range(2):
        probe.callback(Observation(torch.zeros(0), mass, torch.zeros(0)))
    (maps,) = found.values()
    expected = 2 * mass[1, :, TEXT:].mean(0).T
    torch.testing.assert_close(maps.mass, expected[:2])
    torch.testing.assert_close(maps.rival, expected[2])
    assert maps.layers == 2 and maps.counts.tolist() == [3.0, 1.0]
    maps.clear()
    assert maps.layers == 0 and maps.rival is None
