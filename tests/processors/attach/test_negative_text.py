"""The rows with a negative text in the calls of a transformer: when they are there, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import NAG, DitAttnError
from dit_attn.processors.attach import step_cache
from tests._support.outputs import same
from tests.families.test_pixart import TestPixArt as PixArt
from tests.families.test_qwen_image import TestQwenImage as QwenImage


@pytest.fixture
def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return PixArt().model().eval()


@pytest.fixture
def args() -> dict[str, Any]:
    torch.manual_seed(1)
    return PixArt().inputs()


def call(net: Any, args: dict[str, Any]) -> Any:
    with torch.no_grad():
        return net(**args, return_dict=False)


def test_without_a_pipeline_the_embeddings_are_asked_for_and_their_number_is_checked(net: Any, args: Any) -> None:
    session = dit_attn.enable(net, NAG())
    with pytest.raises(DitAttnError, match="nag: no pipeline is running that encodes the negative prompt; give its"):
        call(net, args)
    session.given["nag"] = {"encoder_hidden_states": torch.randn(3, 7, 16)}
    with pytest.raises(DitAttnError, match="nag: the negative text is of 3 samples, the prompt of 2; give one or 2"):
        call(net, args)
    session.given["nag"] = {"encoder_hidden_states": torch.randn(1, 7, 16)}
    guided = call(net, args)
    assert guided[0].shape[0] == 2
    dit_attn.disable(net)
    assert not same(guided, call(net, args))


def test_one_text_for_all_samples_is_that_text_for_each(net: Any, args: Any) -> None:
    text = torch.randn(1, 7, 16)
    session = dit_attn.enable(net, NAG())
    session.given["nag"] = {"encoder_hidden_states": text}
    guided = call(net, args)
    session.given["nag"] = {"encoder_hidden_states": text.expand(2, -1, -1)}
    assert same(guided, call(net, args))


@pytest.mark.parametrize("case", [PixArt, QwenImage])
@pytest.mark.parametrize("length", [3, 15])
def test_texts_are_padded_to_one_length_and_padding_counts_for_nothing(case: Any, length: int) -> None:
    torch.manual_seed(0)
    net, args = case().model().eval(), case().inputs()
    masks = [name for name in args if "encoder" in name and "mask" in name]
    args = {**args, **dict.fromkeys(masks)}  # nothing of the prompt is padding
    stock = call(net, args)
    width = args["encoder_hidden_states"].shape[-1]
    dit_attn.enable(net, NAG(last_layer=0)).given["nag"] = {"encoder_hidden_states": torch.randn(1, length, width)}
    torch.testing.assert_close(call(net, args), stock, atol=1e-5, rtol=1e-4)


def test_it_stands_aside_where_a_loss_may_follow(net: Any, args: Any) -> None:
    net.train()
    torch.manual_seed(2)
    stock = net(**args, return_dict=False)
    dit_attn.enable(net, NAG())
    torch.manual_seed(2)
    assert same(stock, net(**args, return_dict=False))


def test_a_step_cache_wants_every_step_guided(net: Any, args: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_cache, "is_cached", lambda model: True)
    dit_attn.enable(net, NAG(stop=1)).given["nag"] = {"encoder_hidden_states": torch.randn(1, 7, 16)}
    with dit_attn.run_context(net, step=0, steps=2, branch="cond"):
        call(net, args)
    with (
        dit_attn.run_context(net, step=1, steps=2, branch="cond"),
        pytest.raises(DitAttnError, match="nag with a step cache must guide every step"),
    ):
        call(net, args)
