"""Methods with subjects in whole pipelines: batches, padding, the order of the branches, and reference images."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import SaaS, SubjectIsolation
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.region_maps import region_masks
from tests._support.edit_pipelines import editing
from tests._support.pipeline_runs import run
from tests._support.prompted_pipelines import pipeline_of
from tests._support.recorded_calls import requests, weights
from tests.processors.attach.prompt_spans.prompted_cases import CASES

PIECES = ("red cube", "tree")
PROMPTS = ("a red cube and a green tree", "the tree at the sea, a small house and a red cube")
SAME_LENGTH = "a green tree and a red cube"
SUBJECTS = [
    {"piece": "red cube", "box": [0.0, 0.1, 0.5, 1.0]},
    {"piece": "tree", "box": [0.5, 0.0, 1.0, 0.7]},
]
EVERY: dict[str, Any] = {"stop": 1.0, "first_layer": 0.0, "min_quality": 0.0}
METHODS: dict[str, Any] = {
    "isolation": SubjectIsolation(subjects=SUBJECTS),
    "saas": SaaS(**EVERY, pieces=PIECES, strength=3.0, clamp=(0.1, 9.0), rival="pieces"),
}


def made(pipe: Any, kwargs: dict[str, Any], prompt: Any, seeds: tuple[int, ...]) -> tuple[Any, dict[int, torch.Tensor]]:
    """Latents of a run, and what its last biased call adds in the conditional rows: image rows by text keys."""
    with requests() as seen:
        latents = run(pipe, kwargs, 2, seeds, prompt=prompt)
    call, request, _ = [each for each in seen if each[1].biases and "cond" in each[0].branches][-1]
    bias = request.bias(slice(0, call.q.shape[1]))
    assert bias is not None and call.tokens is not None
    matrix = (bias.q @ bias.k.mT).expand(len(call.branches), -1, -1, -1)[:, 0]
    (image,) = [span for span in call.tokens.spans if span.kind == "image"]
    text = [slice(span.start, span.stop) for span in call.tokens.spans if span.kind == "text"] or [slice(None)]
    conditional = {number: row for row, number in enumerate(call.samples) if call.branches[row] == "cond"}
    others = [row for row in range(len(matrix)) if row not in conditional.values()]
    assert not matrix[others].any()
    return latents, {at: matrix[row][image.start : image.stop, text[0]] for at, row in conditional.items()}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["sd3", "qwen-image", "cogview-4", "omnigen", "pixart"])
def test_a_batch_of_prompts_is_the_prompts_one_by_one(name: str, method: str) -> None:
    """SD 3 has the prompt's rows last, OmniGen first; Qwen-Image pads on the right, CogView 4, OmniGen left."""
    pipe, kwargs = pipeline_of(CASES[name])
    # CogView 4 attends to its padding, and OmniGen turns all rows by the positions of the first one: without a method
    # too, prompts of other lengths change each other there
    prompts = [PROMPTS[0], SAME_LENGTH if name in ("cogview-4", "omnigen") else PROMPTS[1]]
    dit_attn.enable(pipe, METHODS[method])
    together, added = made(pipe, kwargs, prompts, (3, 4))
    for at, prompt in enumerate(prompts):
        alone, single = made(pipe, kwargs, prompt, (3 + at,))
        own = single[0]
        torch.testing.assert_close(together[at], alone[0], atol=5e-4, rtol=1e-3)
        assert own.any() and not added[at][:, own.shape[1] :].any()
        torch.testing.assert_close(added[at][:, : own.shape[1]], own, atol=1e-2, rtol=1e-2)
    dit_attn.disable(pipe)


@pytest.mark.parametrize("name", ["kontext", "qwen-image-edit", "omnigen"])
def test_the_reference_image_of_an_editing_pipeline_is_the_rival(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What SaaS reports of the first step is what the full attention matrices say, with the image's keys by hand."""
    pipe, kwargs = editing(name, monkeypatch)
    prompt = f"{'<img><|image_1|></img>, ' if name == 'omnigen' else ''}a red cube, and a green tree"
    placed: list[Any] = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda model, args, given: placed.append(given.get("input_image_sizes")), with_kwargs=True
    )
    dit_attn.enable(pipe, SaaS(**EVERY, observe=True, rival="reference"))
    seen: list[tuple[AttentionCall, torch.Tensor, list[torch.Tensor]]] = []

    def look(call: AttentionCall, request: Request, out: torch.Tensor) -> None:
        if call.clock.step == 0 and "cond" in call.branches:
            words = [call.prompt_tokens(piece) for piece in ("a red cube", "a green tree")]
            seen.append((call, weights(call, Request())[0][call.branches.index("cond")].mean(0), words))

    with dit_attn.observing(pipe, look):
        run(pipe, kwargs, 2, (3,), prompt=prompt)
    hook.remove()
    report = dit_attn.summary(pipe).reports["saas"]
    dit_attn.disable(pipe)
    call, _, words = seen[0]
    assert call.tokens is not None and call.tokens.grid is not None
    (picture,) = [span for span in call.tokens.spans if span.kind == "image"]
    image = slice(*placed[0][0][0]) if name == "omnigen" else slice(picture.stop, None)
    total = torch.stack([matrix[picture.start : picture.stop] for _, matrix, _ in seen]).sum(0)
    row = call.branches.index("cond")
    for trace, own in zip(report.traces, words, strict=True):
        share = total[:, own[row]].sum(1)
        (mask,) = region_masks(share[None], call.tokens.grid)
        assert trace.shares[0] == pytest.approx(float(share[mask].mean()) / len(seen), rel=1e-3, abs=2e-6)
        rival = float(total[mask][:, image].sum(1).mean()) / len(seen)
        assert rival > 0.0 and trace.rivals[0] == pytest.approx(rival, rel=1e-3, abs=2e-6)
