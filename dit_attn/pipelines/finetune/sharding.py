"""Split a model over the processes of a launch (FSDP 2), and put it together again.

Every process keeps a part of every weight. The weights of a block come together when it runs; those of the learned
modules of a method are part of the root, which is whole from its first block to its last.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor


def shard_model(model: torch.nn.Module) -> torch.nn.Module:
    """Split a model in place, and return a copy of it without weights, to put it together in.

    Args:
        model: on the device of its process; processes of one group hold the same weights.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    shell = copy_without_weights(model)
    device = next(model.parameters()).device
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for child in model.children():
        for block in child if isinstance(child, torch.nn.ModuleList) else ():
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return shell


def copy_without_weights(model: torch.nn.Module) -> torch.nn.Module:
    """Return a copy of a model, methods included, whose parameters take no memory; its buffers are copied."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = torch.nn.Parameter(empty, requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, memo)


def put_together(model: torch.nn.Module, shell: torch.nn.Module, here: bool) -> None:
    """Bring the weights of a split model to the CPU of one process; all processes call it.

    Args:
        model: the split model.
        shell: what :func:`shard_model` returned.
        here: whether this is the process; elsewhere the shell stays empty.
    """
    for name, parameter in model.named_parameters():
        value = whole(parameter.detach())
        if here:
            owner, _, last = name.rpartition(".")
            made = torch.nn.Parameter(value.cpu(), requires_grad=parameter.requires_grad)
            setattr(shell.get_submodule(owner), last, made)


def whole(value: Any) -> Any:
    """Return a tensor that is split over the processes in one piece; all processes call it. Others as they are."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def split_like(value: Any, model: torch.Tensor) -> Any:
    """Return this process's part of a tensor that is split as another one is; of others the value itself."""
    if not isinstance(model, DTensor) or not isinstance(value, torch.Tensor) or value.shape != model.shape:
        return value
    return distribute_tensor(value.to(model.device, model.dtype), model.device_mesh, model.placements)


def whole_state(optimizer: Any) -> dict[str, Any]:
    """Return the state of an optimizer as one process would have it; all processes call it."""
    state = optimizer.state_dict()
    moments = {
        number: {name: whole(value) for name, value in entry.items()} for number, entry in state["state"].items()
    }
    return {**state, "state": moments}


def load_state(optimizer: Any, state: Mapping[str, Any], parameters: Sequence[torch.Tensor]) -> None:
    """Give an optimizer of the parameters, split or not, what :func:`whole_state` returned."""
    moments = {
        number: {name: split_like(value, parameters[number]) for name, value in entry.items()}
        for number, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": moments})
