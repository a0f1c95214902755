"""Sequence parallelism: trade sequence shards for head shards, so that a method sees whole rows of its heads.

Each of P ranks holds S / P tokens of all heads before the exchange and all S tokens of H / P heads after it.
"""

from __future__ import annotations

from typing import Any

import torch

from dit_attn.processors import compat


def mesh_of(parallel_config: Any) -> Any | None:
    """The Ulysses mesh of an attention call, ``None`` when it is not parallel.

    Raises:
        NotImplementedError: ring attention.
    """
    return None if parallel_config is None else compat.ulysses_mesh(parallel_config)


def scatter_heads(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, mesh: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Local (B, S/P, H, D) to (B, S, H/P, D); a key mask that is local to the rank is gathered to its full length."""
    local = k.shape[1]
    q, k, v = (_to_heads(x, mesh) for x in (q, k, v))
    if mask is not None and mask.shape[-1] == local:
        parts = [torch.empty_like(mask) for _ in range(mesh.size())]
        torch.distributed.all_gather(parts, mask.contiguous(), group=mesh.get_group())
        mask = torch.cat(parts, dim=-1)
    return q, k, v, mask


def gather_heads(out: torch.Tensor, mesh: Any) -> torch.Tensor:
    """(B, S, H/P, D) back to the local (B, S/P, H, D)."""
    world = mesh.size()
    batch, seq, heads, dim = out.shape
    parts = out.reshape(batch, world, seq // world, heads, dim).permute(1, 3, 0, 2, 4).contiguous()
    parts = _exchange(parts, mesh)
    return parts.flatten(0, 1).permute(1, 2, 0, 3).contiguous()


def all_agree(here: bool, mesh: Any) -> bool:
    """Whether ``here`` holds on every rank."""
    votes = torch.tensor(int(here))
    if torch.distributed.get_backend(mesh.get_group()) == "nccl":
        votes = votes.cuda()
    torch.distributed.all_reduce(votes, op=torch.distributed.ReduceOp.MIN, group=mesh.get_group())
    return bool(votes)


def _to_heads(x: torch.Tensor, mesh: Any) -> torch.Tensor:
    world = mesh.size()
    batch, local, heads, dim = x.shape
    parts = x.reshape(batch, local, world, heads // world, dim).permute(2, 1, 0, 3, 4).contiguous()
    parts = _exchange(parts, mesh)
    return parts.flatten(0, 1).permute(1, 0, 2, 3).contiguous()


def _exchange(x: torch.Tensor, mesh: Any) -> torch.Tensor:
    out = torch.empty_like(x)
    torch.distributed.all_to_all_single(out.view(-1), x.view(-1), group=mesh.get_group())
    return out
