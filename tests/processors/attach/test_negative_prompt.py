"""Stock pipelines of all families encode the negative prompt of NAG, and nothing of their run changes by that."""

from __future__ import annotations

import pytest
import torch

import dit_attn
from dit_attn import NAG, DitAttnError
from tests._support.outputs import same
from tests._support.pipeline_runs import run, without_cfg
from tests._support.prompted_pipelines import pipeline_of
from tests.processors.attach.prompt_spans.prompted_cases import CASES

LONGER = "grass and a small house, a blue cube, a red ball and a green tree"
REFUSED = {
    "cogview-4": "CogView4Transformer2DModel takes no mask of its text; the prompt has 16 tokens and the negative",
    "kandinsky-5": "takes no mask of its text; the prompt has 269 tokens and the negative prompt 278; give",
    "lumina-2": "captions of different lengths in one batch; give them the same number of tokens",
    "mochi": "nag cannot be enabled on MochiTransformer3DModel: it attends to the samples of a batch one by one",
    "omnigen": "nag cannot be enabled on OmniGenTransformer2DModel: its text is words in one sequence",
    "wan-animate": "cannot encode the negative prompt while it runs .*; give its embeddings: session.given",
}
"""Why a case cannot run the prompt and a longer negative one together."""


@pytest.mark.parametrize("name", sorted(CASES))
def test_a_pipeline_encodes_a_negative_prompt_and_its_run_goes_on_as_it_was(name: str) -> None:
    pipe, kwargs = pipeline_of(CASES[name])
    kwargs = {**without_cfg(kwargs), "prompt": CASES[name].prompt}
    if name in REFUSED:
        with pytest.raises(DitAttnError, match=REFUSED[name]):
            dit_attn.enable(pipe, NAG(negative_prompt=LONGER))
            run(pipe, kwargs, steps=1)
        return
    stock = run(pipe, kwargs, steps=1)
    dit_attn.enable(pipe, NAG(negative_prompt=LONGER, last_layer=0))  # two texts in a batch, and no guidance
    unguided = run(pipe, kwargs, steps=1)
    torch.testing.assert_close(unguided, stock, atol=1e-4, rtol=1e-4)
    dit_attn.enable(pipe, NAG(negative_prompt=LONGER))
    assert not same(run(pipe, kwargs, steps=1), unguided)
