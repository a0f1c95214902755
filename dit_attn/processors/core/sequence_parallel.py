"""Sequence parallelism (Ulysses): exchange sequence shards for head shards, so that methods get full sequences.

Each of P ranks holds S / P tokens of all heads before the exchange and all S tokens of H / P heads after it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import torch

from dit_attn.processors.core.call import SDPAArgs
from dit_attn.processors.core.tokens import TokenLayout, Tokens


@dataclass(frozen=True)
class Exchange:
    """The exchange of one attention call.

    Attributes:
        mesh: the ranks.
        order: (S,) int64, positions of the model's tokens in the concatenated shards of the ranks, ``None`` for the
            identity.
    """

    mesh: Any
    order: torch.Tensor | None = None

    @property
    def shard(self) -> tuple[int, int]:
        """This rank and the number of ranks."""
        return self.mesh.get_local_rank(), self.mesh.size()

    def scatter_heads(self, args: SDPAArgs, cross: bool = False) -> SDPAArgs:
        """Exchange local (B, S/P, H, D) for (B, S, H/P, D); a key mask that is local to the rank is gathered.

        Args:
            args: the call on this rank.
            cross: whether the keys are another sequence, split evenly over the ranks or in full on each.

        Raises:
            NotImplementedError: the key heads of full keys do not split evenly.
        """
        k, v, mask, local = args.k, args.v, args.mask, args.k.shape[1]
        if args.full_keys:
            k, v = self._own_heads(k), self._own_heads(v)
            if mask is not None and mask.ndim == 4 and mask.shape[1] == args.q.shape[2]:
                mask = self._own_heads(mask, 1)
        else:
            k, v = (_to_heads(x, self.mesh) if cross else self.to_heads(x) for x in (k, v))
            if mask is not None and mask.shape[-1] == local:
                mask = self._gathered(mask, -1) if cross else self.gather_tokens(mask, -1)
        return replace(args, q=self.to_heads(args.q), k=k, v=v, mask=mask)

    def _own_heads(self, x: torch.Tensor, dim: int = 2) -> torch.Tensor:
        rank, world = self.shard
        if x.shape[dim] % world:
            raise NotImplementedError(f"{x.shape[dim]} key heads do not split evenly over {world} ranks")
        return x.chunk(world, dim)[rank]

    def gather_tokens(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Return all S tokens of a tensor of which each rank has S / P along ``dim``, in the order of the model."""
        return self._ordered(self._gathered(x, dim), dim)

    def _gathered(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.mesh.size())]
        torch.distributed.all_gather(parts, x.contiguous(), group=self.mesh.get_group())
        return torch.cat(parts, dim=dim)

    def own_tokens(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """Return this rank's S / P tokens of a tensor of all S."""
        if self.order is not None:
            x = x.index_select(dim, self.order.argsort().to(x.device))
        return x.chunk(self.mesh.size(), dim)[self.mesh.get_local_rank()]

    def to_heads(self, x: torch.Tensor) -> torch.Tensor:
        """Exchange the local (B, S/P, H, D) for (B, S, H/P, D)."""
        return self._ordered(_to_heads(x, self.mesh), 1)

    def gather_heads(self, out: torch.Tensor) -> torch.Tensor:
        """Exchange (B, S, H/P, D) for the local (B, S/P, H, D)."""
        if self.order is not None:
            out = out.index_select(1, self.order.argsort().to(out.device))
        return _to_tokens(out, self.mesh)

    def _ordered(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        return x if self.order is None else x.index_select(dim, self.order.to(x.device))


def exchange_for(mesh: Any, layout: TokenLayout | None, local: int) -> Exchange:
    """Return the exchange of a call.

    Models shard the text and the image separately before they join them, so that the concatenated shards are text,
    image, text, image; a model without text in its sequence shards it as one.

    Args:
        mesh: the ranks.
        layout: parts of the sequence.
        local: tokens on each of the P ranks.

    Raises:
        NotImplementedError: the layout is unknown, or a part does not split evenly.
    """
    world = mesh.size()
    tokens = layout.resolve(local * world) if layout is not None else None
    if tokens is None:
        raise NotImplementedError(f"unknown token layout for {local} tokens on each of {world} ranks")
    parts = split_parts(tokens)
    if any(length % world for length in parts):
        raise NotImplementedError(f"parts of {parts} tokens do not split evenly over {world} ranks")
    return Exchange(mesh, sequence_order(parts, world) if len(parts) > 1 else None)


def split_parts(tokens: Tokens) -> list[int]:
    """Return the lengths of the parts of a sequence that are sharded separately: text, and runs of everything else."""
    runs = groupby(tokens.spans, key=lambda span: span.kind == "text")
    return [sum(span.length or 0 for span in spans) for _, spans in runs]


def sequence_order(parts: list[int], world: int) -> torch.Tensor:
    """Return (S,) int64 positions of the joint sequence's tokens in ``world`` concatenated shards."""
    local = sum(parts) // world
    starts = torch.arange(world)[:, None] * local
    chunks, done = [], 0
    for length in parts:
        chunks.append((starts + done + torch.arange(length // world)).flatten())
        done += length // world
    return torch.cat(chunks)


def _to_tokens(out: torch.Tensor, mesh: Any) -> torch.Tensor:
    world = mesh.size()
    batch, seq, heads, dim = out.shape
    parts = out.reshape(batch, world, seq // world, heads, dim).permute(1, 3, 0, 2, 4).contiguous()
    parts = _exchange(parts, mesh)
    return parts.flatten(0, 1).permute(1, 2, 0, 3).contiguous()


def all_agree(here: bool, mesh: Any) -> bool:
    """Return whether ``here`` is true on every rank."""
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
