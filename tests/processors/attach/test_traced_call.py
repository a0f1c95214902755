"""The copy of a processor's code that calls another attention function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor
from diffusers.models.attention_processor import AttnProcessor2_0, FusedJointAttnProcessor2_0, JointAttnProcessor2_0
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch.nn.functional import scaled_dot_product_attention

from dit_attn.processors.attach.traced_call import copy_with_attention, same_as_copy


def attention(*args: Any, **kwargs: Any) -> tuple[Any, ...]:
    return ("ours", args, kwargs)


def helper(x: Any, *, scale: float = 2.0) -> Any:
    return F.scaled_dot_product_attention(x, x, x, scale=scale)


def by_helper(self: Any, x: Any, add: int = 1) -> Any:
    return helper(F.relu(x) + add)


def by_name(self: Any, x: Any) -> Any:
    return scaled_dot_product_attention(x, x, x)


def by_other(self: Any, x: Any) -> Any:
    return helper(x)


def test_only_the_attention_call_is_another_one_in_helpers_too() -> None:
    x = torch.tensor([[[[-1.0, 2.0]]]])
    copied = copy_with_attention(by_helper, attention)
    assert copied is not None
    name, (q, _, _), kwargs = copied(None, x)
    assert name == "ours" and torch.equal(q, torch.tensor([[[[1.0, 3.0]]]])) and kwargs == {"scale": 2.0}
    copied = copy_with_attention(by_name, attention)
    assert copied is not None and copied(None, x)[0] == "ours"
    assert isinstance(by_helper(None, x), torch.Tensor) and isinstance(by_name(None, x), torch.Tensor)
    assert F.scaled_dot_product_attention is scaled_dot_product_attention


def test_other_functions_may_be_replaced_too() -> None:
    copied = copy_with_attention(by_other, attention, {helper: attention})
    assert copied is not None and copied(None, 3) == ("ours", (3,), {})
    alone = copy_with_attention(by_other, attention)
    assert alone is not None and alone(None, 3) == ("ours", (3, 3, 3), {"scale": 2.0})  # the helper's own code


def test_code_that_finds_attention_in_another_way_is_not_copied() -> None:
    scope: dict[str, Any] = {"torch": torch}
    exec("def call(self, x): return torch.nn.functional.scaled_dot_product_attention(x, x, x)", scope)
    assert copy_with_attention(scope["call"], attention) is None
    assert copy_with_attention(len, attention) is None


def test_the_copy_of_a_processor_serves_until_other_code_replaces_what_it_was_made_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for processor in (AttnProcessor2_0, JointAttnProcessor2_0, FusedJointAttnProcessor2_0):
        same = same_as_copy(processor.__call__)
        assert same is not None and same()
        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", attention)
            assert same()  # the copy calls another one
        with monkeypatch.context() as patch:
            patch.setattr(attention_processor, "F", None)
            assert not same()
        assert same()


def test_code_that_may_hold_another_attention_call_is_not_known() -> None:
    scope: dict[str, Any] = {"F": F, "torch": torch, "__name__": "diffusers.made_up", "super": super}
    exec(
        "def one(x): return F.scaled_dot_product_attention(x, x, x)\n"
        "def by_helper(self, x): return F.scaled_dot_product_attention(x, x, x) + one(x)\n"
        "def by_module(self, x): return F.scaled_dot_product_attention(x, x, x) + torch.nn.functional.relu(x)\n"
        "def by_base(self, x): return F.scaled_dot_product_attention(x, x, x) + super(x)\n"
        "def by_other_code(self, attn, x): return F.relu(attn.attend(x))\n"
        "def inside(self, x): return [F.scaled_dot_product_attention(y, y, y) for y in x]\n",
        scope,
    )
    assert all(same_as_copy(scope[name]) is None for name in ("by_helper", "by_module", "by_base", "by_other_code"))
    assert same_as_copy(scope["one"]) is not None and same_as_copy(scope["inside"]) is not None
    assert same_as_copy(by_name) is None  # not of diffusers
    assert same_as_copy(WanAttnProcessor.__call__) is None  # another tap
    assert same_as_copy(len) is None
