"""Muon is torch's, in fp32 where a device multiplies bf16 slowly, and so is the network."""

from __future__ import annotations

import copy

import pytest
import torch

from dit_attn.models import loop, optimizers
from dit_attn.models.recipe import recipe

SHAPES = [(24, 24), (24, 80), (80, 24)]


def _updated(optimizer_of, shape, steps=3):
    """A matrix after some steps along the same gradients."""
    generator = torch.Generator().manual_seed(0)
    matrix = torch.nn.Parameter(torch.randn(shape, generator=generator))
    optimizer = optimizer_of([matrix])
    for _ in range(steps):
        matrix.grad = torch.randn(shape, generator=generator)
        optimizer.step()
    return matrix.detach(), optimizer


def _of_torch(parameters):
    return torch.optim.Muon(parameters, lr=1e-2, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")


def _ours(parameters):
    return optimizers.Muon(parameters, lr=1e-2)


needs_muon = pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")


@needs_muon
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_in_bf16_are_those_of_torch(shape, monkeypatch):
    monkeypatch.setattr(optimizers, "multiplies_bf16", lambda device: True)
    ours, optimizer = _updated(_ours, shape)
    theirs, other = _updated(_of_torch, shape)
    assert torch.equal(ours, theirs)
    (state,), (expected,) = optimizer.state.values(), other.state.values()
    assert torch.equal(state["momentum_buffer"], expected["momentum_buffer"])


@needs_muon
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_steps_in_fp32_differ_by_the_rounding_of_bf16_alone(shape, monkeypatch):
    monkeypatch.setattr(optimizers, "multiplies_bf16", lambda device: False)
    ours, _ = _updated(_ours, shape)
    theirs, _ = _updated(_of_torch, shape)
    moved = (theirs - _updated(_of_torch, shape, 0)[0]).norm()
    assert 0 < (ours - theirs).norm() < 0.02 * moved


@needs_muon
def test_a_checkpoint_of_torchs_muon_is_continued(monkeypatch):
    monkeypatch.setattr(optimizers, "multiplies_bf16", lambda device: True)
    matrix, other = _updated(_of_torch, (24, 80))
    parameter = torch.nn.Parameter(matrix.clone())
    ours = _ours([parameter])
    ours.load_state_dict(copy.deepcopy(other.state_dict()))
    parameter.grad = torch.ones(24, 80)
    (theirs,) = other.param_groups[0]["params"]
    theirs.grad = torch.ones(24, 80)
    ours.step()
    other.step()
    assert torch.equal(parameter, theirs)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_orthogonalized_singular_values_are_near_one(shape):
    generator = torch.Generator().manual_seed(1)
    matrix = torch.randn(shape, generator=generator)
    values = torch.linalg.svdvals(optimizers.orthogonalize(matrix).float())
    assert values.min() > 0.3 and values.max() < 1.4
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    cosine = torch.cosine_similarity(
        optimizers.orthogonalize(matrix).float().flatten(), (left @ right).flatten(), dim=0
    )
    assert cosine > 0.95


def test_a_matrix_without_a_gradient_stays():
    matrix = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = _ours([matrix])
    assert optimizer.step(lambda: 7.0) == 7.0
    assert torch.equal(matrix, torch.ones(4, 4))


@pytest.mark.parametrize("native", [True, False])
def test_a_network_runs_in_bf16_where_the_device_multiplies_it(native, monkeypatch):
    monkeypatch.setattr(loop, "multiplies_bf16", lambda device: native)
    run = loop.Run(recipe("tiny-image"), 0, torch.device("cpu"))
    linear = torch.nn.Linear(4, 4)
    predicted = loop._in_precision(linear, run)(torch.ones(2, 4))
    assert predicted.dtype == (torch.bfloat16 if native else torch.float32)
