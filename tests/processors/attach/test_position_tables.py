"""Tables of positions that are added to tokens: rows between rows, and halves that exchange theirs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import SubjectReposition
from dit_attn.processors.attach.position_tables import resample
from tests._support.family_cases import HEIGHT, WIDTH
from tests._support.outputs import same
from tests._support.pipeline_runs import run
from tests._support.prompted_pipelines import pipeline_of
from tests.families.test_omnigen import TestOmniGen as OmniGenCase
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


@pytest.mark.parametrize("picture_only", [False, True], ids=["reference", "picture"])
def test_an_image_among_the_words_gets_the_rows_of_the_picture_where_its_subject_belongs(picture_only: bool) -> None:
    """OmniGen adds a table to the picture and to its input images; rows without an image are stock."""
    torch.manual_seed(0)
    case = OmniGenCase()
    net: Any = case.model().eval()
    args = case.inputs() | {"input_img_latents": [torch.randn(1, 4, 8, 12)], "input_image_sizes": {0: [[1, 25]]}}
    text, total = 26, 26 + 1 + HEIGHT * WIDTH
    args |= {"input_ids": torch.randint(0, 50, (2, text)), "position_ids": torch.arange(total)[None].repeat(2, 1)}
    args["attention_mask"] = torch.ones(2, total, total)
    entered: list[torch.Tensor] = []
    net.layers[0].register_forward_pre_hook(lambda module, given: entered.append(given[0]))
    net(**args)
    box = [0.5, 0.0, 1.0, 0.5]
    moved = {"piece": "a cube", "box": box, "reference": 1}
    dit_attn.enable(net, SubjectReposition(subjects=SWAP if picture_only else [moved]))
    net(**args)
    change = entered[1] - entered[0]
    assert dit_attn.summary(net).positions
    dit_attn.disable(net)
    assert not net.patch_embedding._forward_hooks

    def table(height: int, width: int) -> torch.Tensor:
        rows = net.patch_embedding(torch.zeros(1, 4, 2 * height, 2 * width), is_input_image=True)
        return rows[0].unflatten(0, (height, width))

    expected = torch.zeros_like(change)
    if picture_only:
        own = table(HEIGHT, WIDTH)
        expected[:, text + 1 :] = (own.roll(WIDTH // 2, 1) - own).flatten(0, 1)
    else:
        points = torch.cartesian_prod(torch.arange(4.0), torch.arange(6.0)).double()
        height, width = (box[3] - box[1]) * HEIGHT / 4, (box[2] - box[0]) * WIDTH / 6
        y = (points[:, 0] + 0.5) * height - 0.5
        x = (points[:, 1] + 0.5) * width + box[0] * WIDTH - 0.5
        expected[0, 1:25] = resample(table(HEIGHT, WIDTH), torch.stack([y, x], 1)) - table(4, 6).flatten(0, 1)
    torch.testing.assert_close(change, expected, atol=1e-5, rtol=1e-4)


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
