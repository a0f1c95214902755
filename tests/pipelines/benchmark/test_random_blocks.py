"""Calls of Wan blocks with random weights have the structure of images, and logits as sharp as synthetic ones."""

from __future__ import annotations

from typing import Any

import torch

from dit_attn.pipelines.benchmark import random_blocks
from dit_attn.pipelines.benchmark.operator_error import measure_operators


def test_calls_are_those_of_wan_and_far_from_uniform() -> None:
    seen: list[Any] = []

    class Probe:
        def begin(self, run: int) -> None:
            pass

        def __call__(self, call: Any, *rest: Any) -> None:
            seen.append((call.clock.step, call))

    arch = random_blocks.wan_blocks((3, 8, 12), heads=2)
    assert arch.grid == (3, 8, 12) and arch.head_dim == 128
    about = measure_operators(random_blocks.wan_source(arch, steps=2), 1, [Probe()])
    assert about["calls"] == len(seen) == 2 * random_blocks.LAYERS and about["tokens"] == [288]
    assert [(step, call.layer.index) for step, call in seen] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    call = seen[0][1]
    q, k = (x[0].transpose(0, 1) for x in (call.q, call.k))
    logits = q @ k.transpose(1, 2) * q.shape[-1] ** -0.5
    assert 1.7 < logits.std(-1).mean() < 2.6
    values = call.v[0].flatten(1).unflatten(0, (3, 8, 12))
    near = torch.cosine_similarity(values[:, :, 1:], values[:, :, :-1], dim=-1).mean()
    assert near > 0.5 > torch.cosine_similarity(values[:, :, 11], values[:, :, 0], dim=-1).mean()
