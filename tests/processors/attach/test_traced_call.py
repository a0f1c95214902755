"""The copy of a processor's code that calls another attention function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.functional import scaled_dot_product_attention

from dit_attn.processors.attach.traced_call import copy_with_attention


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
