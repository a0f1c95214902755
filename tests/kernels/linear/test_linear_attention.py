"""Linear attention over key blocks: its definition, its gradients, its edges."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels import linear_attention
from dit_attn.kernels.linear import products
from dit_attn.kernels.linear.feature_maps import FEATURE_MAPS, feature_map

Case = dict[str, Any]


def drawn(
    dim: int = 8, value_dim: int = 6, key_heads: int = 1, marginal: bool = True, weighted: bool = True,
    blocks: tuple[int, int] = (8, 4),
) -> Case:  # fmt: skip
    """Ragged tails on both sides, mixed classes, and a query block without any key block."""
    rng = torch.Generator().manual_seed(3)
    q_len, kv_len = 3 * blocks[0] + 1, 4 * blocks[1] + 1
    shapes = {"q": (2, q_len, 2, dim), "k": (2, kv_len, key_heads, dim), "v": (2, kv_len, key_heads, value_dim)}
    case: Case = {name: torch.randn(shape, generator=rng) for name, shape in shapes.items()}
    pairs = torch.rand(2, 2, 4, 5, generator=rng) < 0.4
    pairs[:, :, 2] = False
    weight = torch.rand(2, 1, kv_len, generator=rng)
    case |= {"blocks": pairs if marginal else None, "q_block": blocks[0], "kv_block": blocks[1]}
    return case | {"key_weight": weight.masked_fill(weight < 0.2, 0.0) if weighted else None}


def results(
    case: Case, name: str, backend: str | None, dtype: torch.dtype = torch.float64, rounded: torch.dtype | None = None
) -> list[torch.Tensor]:
    """The output, and the gradients of q, k and v for a fixed gradient of it; ``rounded`` to a dtype first."""
    q, k, v = (case[x].to(rounded or dtype).to(dtype).requires_grad_() for x in "qkv")
    given = {x: case[x] for x in ("blocks", "q_block", "kv_block", "key_weight")}
    out = linear_attention(q, k, v, feature_map=name, backend=backend, **given)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(4)).to(rounded or dtype).to(dtype)
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), grad)]


@pytest.mark.parametrize("weighted", (True, False))
@pytest.mark.parametrize("marginal", (True, False))
@pytest.mark.parametrize("key_heads", (1, 2))
@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_results_and_gradients_equal_the_definition(name: str, key_heads: int, marginal: bool, weighted: bool) -> None:
    case = drawn(key_heads=key_heads, marginal=marginal, weighted=weighted)
    for found, expected in zip(results(case, name, None), results(case, name, "reference"), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-13, rtol=1e-11)


@pytest.mark.parametrize("name", FEATURE_MAPS)
def test_gradients_equal_finite_differences(name: str) -> None:
    case = drawn(dim=3, value_dim=2, blocks=(3, 2))
    q, k, v = (case[x].double().requires_grad_() for x in "qkv")
    given = {x: case[x] for x in ("blocks", "q_block", "kv_block", "key_weight")}

    def run(*tensors: torch.Tensor) -> torch.Tensor:
        return linear_attention(*tensors, feature_map=name, **given)

    assert torch.autograd.gradcheck(run, (q, k, v), fast_mode=True)


def test_over_all_keys_it_is_the_closed_form() -> None:
    case = drawn(key_heads=2, marginal=False, weighted=False)
    q, k, v = (case[x].double().transpose(1, 2) for x in "qkv")
    f, g = feature_map(q, "softmax"), feature_map(k, "softmax")
    expected = (f @ (g.mT @ v)) / (f @ g.sum(-2)[..., None])
    torch.testing.assert_close(results(case, "softmax", None)[0], expected.transpose(1, 2), atol=1e-14, rtol=1e-12)


def test_sums_by_product_complement_and_addition_agree() -> None:
    """Ways of computing the sums over the blocks of a query block."""
    rng = torch.Generator().manual_seed(0)
    pairs = torch.rand(6, 9, generator=rng) < 0.8
    h = torch.randn(9, 4, 5, generator=rng, dtype=torch.float64)
    product = (pairs.double() @ h.flatten(1)).unflatten(-1, (4, 5))
    added = torch.stack([h[row].sum(0) for row in pairs])
    complement = h.sum(0) - torch.stack([h[~row].sum(0) for row in pairs])
    torch.testing.assert_close(product, added, atol=1e-13, rtol=1e-12)
    torch.testing.assert_close(complement, added, atol=1e-13, rtol=1e-12)


def test_rows_without_key_blocks_are_0_and_pass_no_gradient() -> None:
    case = drawn()
    out, dq, _, _ = results(case, "softmax", None)
    empty = slice(2 * case["q_block"], 3 * case["q_block"])
    assert not out[:, empty].any() and not dq[:, empty].any() and torch.isfinite(dq).all()


def test_heads_apart_give_the_same_result(monkeypatch: pytest.MonkeyPatch) -> None:
    case = drawn(key_heads=2)
    together = results(case, "softmax", None)
    monkeypatch.setattr(products, "chunk_sizes", lambda _: type("Sizes", (), {"group": 1}))
    for a, b in zip(results(case, "softmax", None), together, strict=True):
        torch.testing.assert_close(a, b, atol=1e-14, rtol=1e-12)


def test_twice_the_same_in_fp32() -> None:
    case = drawn()
    pairs = zip(*(results(case, "softmax", None, torch.float32) for _ in range(2)), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_the_operator_keeps_torchs_rules_and_compiles() -> None:
    from dit_attn.kernels.linear.functional import linear_attention_op

    case = drawn()
    tensors = [case[x].requires_grad_() for x in "qkv"]
    given = (*tensors, case["blocks"], case["key_weight"], "softmax", case["q_block"], case["kv_block"], "torch")
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(linear_attention_op, given, test_utils=checks)
    compiled = torch.compile(linear_attention_op, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*given), linear_attention_op(*given))


@pytest.mark.parametrize(
    ("changes", "message"),
    (
        ({"feature_map": "exp"}, "unknown feature_map 'exp'"),
        ({"blocks": torch.ones(2, 2, 4, 8, dtype=torch.bool)}, r"blocks must be \(B\|1, H\|1, 4, 5\)"),
        ({"blocks": torch.ones(2, 3, 4, 5, dtype=torch.bool)}, "blocks are for batch and heads"),
        ({"key_weight": torch.ones(2, 2, 17)}, "without grouped heads"),
        ({"key_weight": torch.ones(2, 1, 18)}, "key_weight is for 18 keys"),
        ({"v": torch.ones(2, 16, 1, 6)}, "v must be"),
        ({"backend": "cuda"}, "unknown backend of linear attention 'cuda'"),
        ({"backend": "triton"}, "backend 'triton' cannot run this call"),
    ),
)
def test_bad_input_is_one_line(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(DitAttnError, match=message):
        linear_attention(**{**drawn(), **changes})
