"""Rows of a batch in the arguments of a model call, and predictions in whatever container a model returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from hypothesis import given
from hypothesis import strategies as st

from dit_attn.processors.attach import batch

ROWS = 3
INDEX = [2, 0, 2]
X = torch.arange(ROWS * 4.0).reshape(ROWS, 4)


@given(index=st.lists(st.integers(0, ROWS - 1), min_size=1, max_size=5))
def test_rows_are_taken_from_everything_that_has_as_many(index: list[int]) -> None:
    other = torch.ones(5, 4)
    value = {"x": X, "pair": (X + 1, [X + 2, other]), "none": None, "number": 3.5, "name": "cond", "scalar": X.sum()}
    found = batch.take(value, index, ROWS)
    assert torch.equal(found["x"], X[index]) and torch.equal(found["pair"][0], X[index] + 1)
    assert isinstance(found["pair"], tuple) and torch.equal(found["pair"][1][0], X[index] + 2)
    assert found["pair"][1][1] is other and found["scalar"] is value["scalar"]
    assert (found["none"], found["number"], found["name"]) == (None, 3.5, "cond")


def test_a_list_with_an_entry_for_every_sample_loses_entries() -> None:
    samples = [torch.zeros(length, 4) for length in (5, 6, 7)]
    assert [len(sample) for sample in batch.take(samples, INDEX, ROWS)] == [7, 5, 7]
    assert batch.take(["a", "b", "c"], INDEX, ROWS) == ["c", "a", "c"]
    assert batch.take(["a", "b"], INDEX, ROWS) == ["a", "b"]
    layers = [X, X + 1, X + 2]  # as many tensors of full batches as rows: residuals of three layers
    assert all(torch.equal(x, y[INDEX]) for x, y in zip(batch.take(layers, INDEX, ROWS), layers, strict=True))


def test_the_batch_may_be_another_axis() -> None:
    stacked = torch.randn(2, ROWS, 4)
    assert torch.equal(batch.take(stacked, INDEX, ROWS, axis=1), stacked[:, INDEX])
    assert batch.take(stacked, INDEX, ROWS) is stacked  # two rows are not the batch
    assert batch.take(X[:, 0], INDEX, ROWS, axis=1) is not None


def test_tensors_with_another_batch_axis_are_no_list_with_an_entry_for_every_sample() -> None:
    parts = [torch.arange(10.0).reshape(5, 2) + i for i in range(2)]  # as many parts as samples
    found = batch.take(parts, [1], 2, axis=1)
    assert len(found) == 2 and all(torch.equal(new, old[:, 1:]) for new, old in zip(found, parts, strict=True))


class Model(torch.nn.Module):
    """Arguments as transformers take them."""

    def forward(self, hidden_states: Any, timestep: Any, ids: Any = None, text: Any = None, llama: Any = None) -> None:
        """Nothing."""


def test_arguments_of_a_call_are_taken_by_name_and_by_their_own_axes() -> None:
    ids = torch.zeros(ROWS, 2)
    llama = torch.randn(2, ROWS, 4)
    text = [torch.full((ROWS, 1), float(i)) for i in range(ROWS)]  # entries per row, whatever their size
    found = batch.take_call(
        Model(), (X, torch.tensor(900.0)), {"ids": ids, "text": text, "llama": llama}, INDEX, ROWS,
        {"ids": None, "text": "list", "llama": 1},
    )  # fmt: skip
    assert list(found) == ["hidden_states", "timestep", "ids", "text", "llama"]
    assert torch.equal(found["hidden_states"], X[INDEX]) and float(found["timestep"]) == 900.0
    assert found["ids"] is ids and torch.equal(found["llama"], llama[:, INDEX])
    assert [float(entry[0]) for entry in found["text"]] == [2.0, 0.0, 2.0]


# -- predictions ------------------------------------------------------------------------------------------------------

SAMPLES = [torch.zeros(4, 5), torch.ones(4, 6)]


@pytest.mark.parametrize(
    ("output", "count"),
    [
        (X, 1),
        ((X, X + 1), 2),
        ((X, None), 1),
        ((X, [X, X + 1]), 2),
        ({"video": X, "audio": (X + 1, "name")}, 2),
        ((SAMPLES,), 1),
        (Transformer2DModelOutput(sample=X), 1),
        (Transformer2DModelOutput(sample=SAMPLES), 1),
        ((), 0),
    ],
    ids=["tensor", "tuple", "none", "residuals", "dict", "samples", "output", "output of samples", "nothing"],
)
def test_predictions_are_found_and_replaced_in_place_of_the_old_ones(output: Any, count: int) -> None:
    before = batch.leaves(output)
    assert len(before) == count
    new = [[x + 10 for x in leaf] if isinstance(leaf, list) else leaf + 10 for leaf in before]
    found = batch.replace_leaves(output, new)
    assert type(found) is type(output)
    after = batch.leaves(found)
    assert all(x is y or all(a is b for a, b in zip(x, y, strict=True)) for x, y in zip(after, new, strict=True))
    if isinstance(output, (tuple, dict)):
        assert len(found) == len(output)
    restored = batch.replace_leaves(found, before)
    assert all(x is y or isinstance(x, list) for x, y in zip(batch.leaves(restored), before, strict=True))


def test_what_is_no_prediction_stays_in_the_output() -> None:
    found = batch.replace_leaves({"name": "x", "video": X, "none": None}, [X + 1])
    assert found["name"] == "x" and found["none"] is None and torch.equal(found["video"], X + 1)
    output = batch.replace_leaves(Transformer2DModelOutput(sample=X), [X + 1])
    assert output[0] is output.sample and torch.equal(output.sample, X + 1)
