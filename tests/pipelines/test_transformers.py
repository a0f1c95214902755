"""The transformers of a pipeline are found by name, and their passes are counted per sample."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn

from dit_attn.pipelines.transformers import count_passes, transformers_of


class Twice(nn.Module):
    """Takes hidden states by name or by position."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return 2 * hidden_states


def test_absent_transformers_are_left_out() -> None:
    first, second = Twice(), Twice()
    assert transformers_of(SimpleNamespace(transformer=first, transformer_2=None)) == {"transformer": first}
    both = transformers_of(SimpleNamespace(transformer=first, transformer_2=second))
    assert list(both) == ["transformer", "transformer_2"] and both["transformer_2"] is second
    assert transformers_of(SimpleNamespace(unet=first)) == {}


def test_samples_of_all_transformers_are_counted_within_the_block_only() -> None:
    pipe = SimpleNamespace(transformer=Twice(), transformer_2=Twice())
    with count_passes(pipe) as count:
        pipe.transformer(torch.zeros(2, 3))
        pipe.transformer_2(hidden_states=torch.zeros(4, 3))
    pipe.transformer(torch.zeros(8, 3))
    assert count.samples == 6 and not pipe.transformer._forward_pre_hooks
