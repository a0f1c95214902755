"""Videos are saved at the rate that their pipeline is made for."""

from __future__ import annotations

import diffusers
import pytest

from dit_attn.cli.run_record import frames_per_second


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("WanPipeline", 16),
        ("LTXPipeline", 25),
        ("LTX2Pipeline", 24),
        ("Kandinsky6TI2VAPipeline", 24),
        ("Cosmos3OmniPipeline", 24),
        ("MiniMaxH3ModularPipeline", 24),
        ("LattePipeline", 8),
    ],
)
def test_the_rate_is_that_of_the_pipeline(name, rate):
    if not hasattr(diffusers, name):
        pytest.skip(f"this diffusers has no {name}")
    kind = getattr(diffusers, name)
    assert frames_per_second(kind, embedded=False) == rate and frames_per_second(kind, embedded=True) == 6
