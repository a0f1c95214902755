"""Tables of positions that are added to tokens: rows between rows, and halves that exchange theirs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import SubjectReposition
from dit_attn.processors.attach.position_tables import resample
from tests._support.outputs import same
from tests._support.pipeline_runs import run
from tests._support.prompted_pipelines import pipeline_of
from tests.processors.attach.prompt_spans.prompted_cases import CASES

LEFT, RIGHT = [0.0, 0.0, 0.5, 1.0], [0.5, 0.0, 1.0, 1.0]
SWAP = ({"piece": "a cube", "box": LEFT, "from": RIGHT}, {"piece": "a ball", "box": RIGHT, "from": LEFT})


def test_rows_between_those_of_a_table_are_linear_and_its_own_are_exact() -> None:
    table = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    whole = torch.cartesian_prod(torch.arange(4.0), torch.arange(5.0)).double()
    assert torch.equal(resample(table, whole), table.flatten(0, 1))
    places = torch.tensor([[0.5, 1.0], [2.25, 3.5], [-2.0, 9.0]], dtype=torch.float64)
    low, high = 0.5 * (table[2, 3] + table[2, 4]), 0.5 * (table[3, 3] + table[3, 4])
    expected = torch.stack([0.5 * (table[0, 1] + table[1, 1]), 0.75 * low + 0.25 * high, table[0, 4]])
    torch.testing.assert_close(resample(table, places), expected)


@pytest.mark.parametrize("name", ["sd3", "pixart"])
def test_an_added_table_gives_exchanged_halves_each_others_rows(name: str) -> None:
    """What enters the first block is the content of a token with the row of the place that it is given."""
    pipe, kwargs = pipeline_of(CASES[name])
    net = pipe.transformer
    size = kwargs["height"] // 8
    latents = torch.randn(1, net.config.in_channels, size, kwargs["width"] // 8)
    entered: list[torch.Tensor] = []
    net.transformer_blocks[0].register_forward_pre_hook(
        lambda module, args, given: entered.append(given.get("hidden_states", args[0] if args else None)),
        with_kwargs=True,
    )
    run(pipe, kwargs, 1, prompt="a cube and a ball", latents=latents)
    dit_attn.enable(pipe, SubjectReposition(subjects=SWAP))
    run(pipe, kwargs, 1, prompt="a cube and a ball", latents=latents)
    dit_attn.disable(pipe)
    grid = (size // net.config.patch_size, kwargs["width"] // 8 // net.config.patch_size)
    table = net.pos_embed.forward(torch.zeros_like(latents))[0].unflatten(0, grid)
    expected = table.roll(grid[1] // 2, 1) - table
    found = (entered[1] - entered[0])[0].unflatten(0, grid)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


def test_a_copy_moves_too_until_it_is_disabled_and_steps_outside_of_the_range_are_stock() -> None:
    pipe, kwargs = pipeline_of(CASES["sd3"])
    stock = run(pipe, kwargs, 1, prompt="a cube and a ball")
    dit_attn.enable(pipe, SubjectReposition(subjects=SWAP))
    moved = run(pipe, kwargs, 1, prompt="a cube and a ball")
    twin: Any = copy.copy(pipe)
    twin.transformer = copy.deepcopy(pipe.transformer)
    assert same(moved, run(twin, kwargs, 1, prompt="a cube and a ball")) and not same(moved, stock)
    dit_attn.disable(twin)
    assert same(stock, run(twin, kwargs, 1, prompt="a cube and a ball"))
    dit_attn.enable(pipe, SubjectReposition(subjects=SWAP, start=1))
    assert same(stock, run(pipe, kwargs, 1, prompt="a cube and a ball"))
    dit_attn.disable(pipe)
    assert not pipe.transformer.pos_embed._forward_hooks
