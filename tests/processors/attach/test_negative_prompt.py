"""Stock pipelines of all families encode the negative prompt of NAG, and nothing of their run changes by that."""

from __future__ import annotations

import pytest
import torch

import dit_attn
from dit_attn import NAG, DitAttnError
from tests._support.pipeline_runs import run, without_cfg
from tests._support.prompted_pipelines import pipeline_of
from tests.processors.attach.prompt_spans.prompted_cases import CASES

LONGER = "grass and a small house, a blue cube, a red ball and a green tree"
REFUSED: dict[str, str] = {}
"""Why a case cannot run the prompt and a longer negative one together."""


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_pipeline_encodes_a_negative_prompt_and_its_run_goes_on_as_it_was(name: str) -> None:
    pipe, kwargs = pipeline_of(CASES[name])
    kwargs = {**without_cfg(kwargs), "prompt": CASES[name].prompt}
    stock = run(pipe, kwargs, steps=1)
    if name in REFUSED:
        with pytest.raises(DitAttnError, match=REFUSED[name]):
            dit_attn.enable(pipe, NAG(negative_prompt=LONGER))
            run(pipe, kwargs, steps=1)
        return
    dit_attn.enable(pipe, NAG(negative_prompt=LONGER, last_layer=0))  # two texts in a batch, and no guidance
    torch.testing.assert_close(run(pipe, kwargs, steps=1), stock, atol=1e-4, rtol=1e-4)
    dit_attn.enable(pipe, NAG(negative_prompt=LONGER))
    assert not torch.allclose(run(pipe, kwargs, steps=1), stock, atol=1e-4, rtol=1e-4)
