"""MoH: gates as the release has them, the balance loss, the identity at the start, training, and bad counts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import dit_attn
from dit_attn import DitAttnError, MoH
from dit_attn.processors.core.call import Request
from dit_attn.processors.methods.head_choice import TokenGroups
from dit_attn.processors.methods.moh import HeadRouter
from tests._support.compose import SPARSE, forward, same, tiny
from tests._support.recorded_calls import watching


def router(shared: int = 3, routed: int = 5, two_stage: bool = True, seed: int = 0) -> HeadRouter:
    torch.manual_seed(seed)
    made = HeadRouter(16, shared, routed, two_stage)
    with torch.no_grad():
        for value in made.parameters():
            value.normal_()
    return made


def drawn(model: Any) -> None:
    """Give every router values of its own."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, value in model.named_parameters():
            if name.startswith("dit_attn."):
                value.normal_(std=0.3)


X = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0))


# -- gates -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shared", "routed"), ((3, 5), (0, 8), (8, 0)))
def test_untrained_routers_with_all_heads_give_ones(shared: int, routed: int) -> None:
    gates = HeadRouter(16, shared, routed, True)(X, routed)
    torch.testing.assert_close(gates, torch.ones(2, 7, 8), atol=1e-6, rtol=0)


@pytest.mark.parametrize("top_k", (1, 2, 5))
def test_sums_and_zeros_are_those_of_the_release(top_k: int) -> None:
    gates = router(two_stage=False)(X, top_k)
    torch.testing.assert_close(gates[..., :3].sum(-1), torch.full((2, 7), 3.0))
    torch.testing.assert_close(gates[..., 3:].sum(-1), torch.full((2, 7), float(top_k)))
    assert ((gates != 0).sum(-1) == 3 + top_k).all()
    made = router()
    balanced = made(X, top_k)
    weights = torch.softmax(X @ made.stage.T, -1) * 2  # type: ignore[union-attr]
    torch.testing.assert_close(balanced[..., :3], gates[..., :3] * weights[..., :1])
    torch.testing.assert_close(balanced[..., 3:], gates[..., 3:] * weights[..., 1:])


def test_the_papers_gates_differ_by_the_stated_factors() -> None:
    made = router()
    release, paper = made(X, 2), made(X, 2, "paper")
    torch.testing.assert_close(paper[..., :3] * 3 * 2, release[..., :3])
    p = torch.softmax(X @ made.routed.T, -1)  # type: ignore[union-attr]
    kept = (p * (release[..., 3:] != 0)).sum(-1, keepdim=True)
    torch.testing.assert_close(paper[..., 3:] * 2 / kept * 2, release[..., 3:])


def test_ties_go_to_the_first_heads_and_16_bit_inputs_stay_finite() -> None:
    gates = HeadRouter(16, 0, 5, False)(X, 2)
    assert (gates[..., :2] == 1.0).all() and not gates[..., 2:].any()
    assert torch.isfinite(router()(X.half() * 1e3, 2)).all()


def test_the_balance_loss_is_k_where_heads_are_used_alike_and_pushes_an_overused_one_down() -> None:
    made = HeadRouter(16, 0, 5, False)
    made(X, 5)
    torch.testing.assert_close(made.balance, torch.tensor(5.0))
    with torch.no_grad():
        made.routed[2] = 50.0  # type: ignore[index]
    made(torch.ones(1, 4, 16), 1)
    torch.testing.assert_close(made.balance, torch.tensor(5.0))  # h_r where all choose one head with p = 1
    other = router(0, 5)
    other(X, 2)
    assert other.balance is not None and other.balance.requires_grad
    before = other.balance
    (slope,) = torch.autograd.grad(before, [other.routed])  # type: ignore[list-item]
    with torch.no_grad():
        other.routed -= 0.1 * slope  # type: ignore[operator]
    other(X, 2)
    assert other.balance < before
    other.eval()(X, 2)
    assert other.balance is None


def test_the_gradient_of_the_balance_loss_goes_past_the_choice() -> None:
    made = router(0, 5)
    made(X, 2)
    (found,) = torch.autograd.grad(made.balance, [made.routed])  # type: ignore[arg-type]
    weight = made.routed.detach().clone().requires_grad_()  # type: ignore[union-attr]
    p = torch.softmax(X @ weight.T, -1).flatten(0, 1)
    used = torch.zeros_like(p).scatter(-1, p.topk(2).indices, 1.0).mean(0)
    (expected,) = torch.autograd.grad(5 * (p.mean(0) * used).sum(), [weight])
    torch.testing.assert_close(found, expected)


# -- on models ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ("wan", "sd3", "pixart"))
def test_gates_multiply_the_heads_of_the_rows_that_the_input_has(name: str) -> None:
    model, args = tiny(name)
    stock = forward(model, args)
    session = dit_attn.enable(model, MoH())
    torch.testing.assert_close(forward(model, args), stock, atol=1e-5, rtol=1e-4)
    drawn(model)
    inputs: list[torch.Tensor] = []
    layer = session.layers[0]
    handle = model.get_submodule(layer.name).register_forward_pre_hook(
        lambda module, given, kwargs: inputs.append(given[0] if given else kwargs["hidden_states"]), with_kwargs=True
    )
    with watching() as seen:
        assert not same(forward(model, args), stock)
    handle.remove()
    call = next(one for one in seen if one.layer == layer.name)
    made: Any = layer.learned[id(session.methods[0])]
    scores = call.q.transpose(1, 2) @ call.k.transpose(1, 2).mT * (call.scale or call.q.shape[-1] ** -0.5)
    scores = scores if call.mask is None else scores + call.mask
    out = (torch.softmax(scores, -1) @ call.v.transpose(1, 2)).transpose(1, 2)
    assert call.tokens is not None and call.tokens.visual_range is not None
    rows = slice(*call.tokens.visual_range)
    gates = made(inputs[0], call.q.shape[2])
    assert gates.shape[1] == rows.stop - rows.start and layer.inputs is None
    expected = out.clone()
    expected[:, rows] = out[:, rows] * gates[..., None]
    torch.testing.assert_close(call.out, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", (MoH(), MoH(shared=1.0), MoH(route="query")))
def test_untrained_routers_are_the_identity_in_double_precision(method: MoH) -> None:
    model, args = tiny("pixart")
    model.double()
    args = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in args.items()}
    stock = forward(model, args)
    dit_attn.enable(model, method)
    torch.testing.assert_close(forward(model, args), stock, atol=1e-12, rtol=1e-12)


def test_a_layer_is_the_weighted_sum_of_its_heads_contributions() -> None:
    model, args = tiny("pixart")
    with dit_attn.enabled(model) as session:
        attention: Any = model.get_submodule(session.layers[0].name)
    given: list[tuple[torch.Tensor, torch.Tensor]] = []
    inputs: list[torch.Tensor] = []
    attention.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    attention.to_out[0].register_forward_hook(lambda module, args, out: given.append((args[0], out)))
    forward(model, args)
    session = dit_attn.enable(model, MoH(top_k=1))
    drawn(model)
    forward(model, args)
    gates = session.layers[0].learned[id(session.methods[0])](inputs[0], 1).detach()
    z = given[0][0].unflatten(-1, (attention.heads, -1))
    weight = attention.to_out[0].weight.detach().unflatten(1, z.shape[2:])
    parts = [gates[..., h : h + 1] * (z[..., h, :] @ weight[:, h].T) for h in range(attention.heads)]
    expected = torch.stack(parts).sum(0) + attention.to_out[0].bias.detach()
    torch.testing.assert_close(given[1][1], expected, atol=1e-5, rtol=1e-4)


def test_a_sparse_method_goes_with_it() -> None:
    model, args = tiny("wan")
    dit_attn.enable(model, SPARSE)
    sparse = forward(model, args)
    dit_attn.enable(model, MoH(), SPARSE)
    torch.testing.assert_close(forward(model, args), sparse, atol=1e-5, rtol=1e-4)
    assert dit_attn.summary(model).sparse_calls
    drawn(model)
    assert not torch.allclose(forward(model, args), sparse, atol=1e-3)


ROUTES = (MoH(top_k=1), MoH(top_k=1, block=64), MoH(top_k=1, route="query", block=32))


@pytest.mark.parametrize("method", ROUTES, ids=str)
@pytest.mark.parametrize("sparse", [False, True], ids=["gathered rows", "skipped blocks"])
def test_rows_of_heads_that_are_left_out_are_not_computed(
    method: MoH, sparse: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sparse execution is the dense gated result, in double precision, and the share that was computed is reported."""
    model, args = tiny("wan")
    model.double()
    args = {name: x.double() if torch.is_tensor(x) and x.is_floating_point() else x for name, x in args.items()}
    others = [dit_attn.BlockSparse(density=0.5, q_block=32, kv_block=32, dense_steps=0)] if sparse else []
    results = []
    for _ in range(2):
        dit_attn.enable(model, method, *others)
        drawn(model)
        results.append((forward(model, args), dit_attn.summary(model).layers[0].density))
        monkeypatch.setattr(Request, "skip_heads", lambda self, active: None)
    (found, share), (dense, whole) = results
    torch.testing.assert_close(found, dense, atol=1e-12, rtol=1e-10)
    assert share is not None and share < 1.0
    if not sparse:
        assert whole is None
    elif method.block > 1:
        assert whole is not None and share < 0.75 * whole


def test_tokens_of_a_group_choose_together_and_groups_end_where_the_picture_does() -> None:
    x = torch.randn(1, 11, 3, dtype=torch.float64)
    found = TokenGroups(4, (2, 9)).mean(x)
    parts = [(0, 2), (2, 6), (6, 9), (9, 11)]
    expected = torch.cat([x[:, a:b].mean(1, keepdim=True).expand(-1, b - a, -1) for a, b in parts], 1)
    torch.testing.assert_close(found, expected)
    assert torch.equal(TokenGroups(1).mean(x), x)
    router = HeadRouter(3, 0, 4, False).double()
    torch.nn.init.normal_(router.routed)  # type: ignore[arg-type]
    assert torch.equal(router(x, 2, groups=TokenGroups(1)), router(x, 2))
    chosen = router(x, 2, groups=TokenGroups(4, (2, 9))) != 0
    assert all(bool((chosen[:, a:b] == chosen[:, a : a + 1]).all()) for a, b in parts)


def test_routers_learn_in_training_and_two_models_do_not_mix_their_losses() -> None:
    method = MoH(top_k=1)
    models = [tiny("wan") for _ in range(2)]
    sessions = [dit_attn.enable(model, method) for model, _ in models]
    for model, args in models:
        drawn(model)
        model.train()
        model(**args, return_dict=False)[0].square().mean().backward()
    for (model, _), session in zip(models, sessions, strict=True):
        routers = [module for module in session.learned.modules() if isinstance(module, HeadRouter)]
        assert all(module.routed is not None and module.routed.grad.abs().sum() > 0 for module in routers)
        loss = method.auxiliary_loss(session.learned.modules())
        mean = torch.stack([module.balance for module in routers]).mean()  # type: ignore[misc]
        torch.testing.assert_close(loss, 0.01 * mean)
        assert model.training
    model, args = models[0]
    model.eval()
    forward(model, args)
    assert method.auxiliary_loss(sessions[0].learned.modules()) is None


def test_fewer_active_heads_keep_the_routers_and_they_are_saved(tmp_path: Path) -> None:
    model, args = tiny("wan")
    dit_attn.enable(model, MoH())
    drawn(model)
    before = {name: x for name, x in model.named_parameters() if name.startswith("dit_attn.")}
    session = dit_attn.enable(model, MoH(top_k=1))
    assert all(x is before[name] for name, x in model.named_parameters() if name in before)
    expected = forward(model, args)
    session.save_pretrained(tmp_path / "moh")
    again, _ = tiny("wan")
    dit_attn.enable(again, str(tmp_path / "moh"))
    assert same(forward(again, args), expected)
    dit_attn.disable(model)
    assert not any(name.startswith("dit_attn.") for name, _ in model.named_parameters())


def test_it_is_trained_by_the_loop_of_the_fine_tuning(tmp_path: Path) -> None:
    from types import SimpleNamespace

    from dit_attn.pipelines.finetune import Example, Finetune, FinetuneConfig, write_example

    model, args = tiny("wan")
    write_example(Example(args, forward(model, args)), tmp_path / "0.safetensors")
    pipe = SimpleNamespace(transformer=model, scheduler=SimpleNamespace(config={"use_flow_sigmas": True}))
    config = FinetuneConfig(MoH(top_k=1), stage="proj", steps=2, batch=1, lr=1e-2, held_out=0.0)
    job = Finetune(pipe, config, [tmp_path / "0.safetensors"])
    job.fit(tmp_path)
    assert job.trained and all(name.startswith("dit_attn.moh.") for name in job.trained)
    assert any(value.abs().sum() > 0 for value in job.trained.values())


@pytest.mark.parametrize(
    ("method", "message"),
    (
        (MoH(shared=1), "one shared head of 2 gives it no router"),
        (MoH(shared=3), "shared is 3, and a layer has 2 heads"),
        (MoH(top_k=3), "top_k is 3, and 2 of 2 heads are routed"),
        (MoH(top_k=0), "leaves none of 2 routed heads"),
    ),
)
def test_counts_that_do_not_fit_are_refused_before_anything_changes(method: MoH, message: str) -> None:
    model, args = tiny("wan")
    stock = forward(model, args)
    with pytest.raises(DitAttnError, match=message):
        dit_attn.enable(model, method)
    assert same(stock, forward(model, args))
    with pytest.raises(DitAttnError, match="normalize"):
        replace(method, normalize="none")
