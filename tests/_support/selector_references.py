"""The rules that rank key blocks, block by block in float64, for one batch row and head."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests._support.rectified_reference import Setup, pools

Blocks = tuple[list[torch.Tensor], list[torch.Tensor]]
"""Places of the queries of every query block, and of the keys of every key block that exist."""


def blocks_of(setup: Setup, q_block: int, kv_block: int) -> Blocks:
    queries = list(torch.arange(len(setup.q)).split(q_block))
    keys = [part[setup.exists[part]] for part in torch.arange(len(setup.k)).split(kv_block)]
    return queries, keys


def by_pair(setup: Setup, size: int, score: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """(nq, nk) of a score of (query places, key places); ``-inf`` for blocks without a key."""
    queries, keys = blocks_of(setup, size, size)
    none = torch.tensor(float("-inf"), dtype=torch.float64)
    return torch.stack([torch.stack([score(q, k) if len(k) else none for k in keys]) for q in queries])


def sol(setup: Setup, size: int) -> torch.Tensor:
    """Standardized logits by the moments of the visual key means, as the paper has them."""
    means, _, counts = pools(setup.k, size, setup.exists)
    last = len(means) if len(setup.k) == setup.visual else setup.visual // size
    visual = means[:last][counts[:last] > 0]
    center, covariance = visual.mean(0), torch.cov(visual.T, correction=0)

    def score(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        query = setup.q[q].mean(0)
        spread = (setup.scale**2 * query @ covariance @ query + 1e-6).sqrt()
        return (setup.scale * query @ setup.k[k].mean(0) - setup.scale * query @ center) / spread

    return by_pair(setup, size, score)


def sub_block(setup: Setup, size: int, part: int) -> torch.Tensor:
    """Log-sum-exp over the logits of sub-block means, each weighted by its keys; text token by token."""

    def score(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        means = [setup.q[q[i : i + part]].mean(0) for i in range(0, len(q), part)]
        first = int(k[0]) // size * size
        terms = []
        for low in range(first, first + size, part):
            inside = k[(k >= low) & (k < low + part)]
            if not len(inside):
                continue
            texts = low + part > setup.visual and len(setup.k) > setup.visual
            for mean in means:
                if texts:
                    terms += list(setup.scale * setup.k[inside] @ mean)
                else:
                    terms.append(setup.scale * mean @ setup.k[inside].mean(0) + torch.tensor(float(len(inside))).log())
        return torch.stack(terms).logsumexp(0)

    return by_pair(setup, size, score)


def dfs(setup: Setup, size: int, tile: int) -> torch.Tensor:
    """Logarithm of the mass that the tiles of a query block expect a block to have."""
    total = sub_block_rows(setup, tile)
    k_tiles = torch.arange(total.shape[1]) // (size // tile)
    q_tiles = torch.arange(total.shape[0]) // (size // tile)
    found = torch.zeros(int(q_tiles.max()) + 1, int(k_tiles.max()) + 1, dtype=torch.float64)
    for i, row in enumerate(total):
        found[q_tiles[i]].index_add_(0, k_tiles, row)
    return found.log()


def sub_block_rows(setup: Setup, tile: int) -> torch.Tensor:
    """(query tiles, key tiles) softmax over tiles."""
    return torch.softmax(sub_block(setup, tile, tile), -1)


def pisa(setup: Setup, size: int) -> torch.Tensor:
    """Pooled logit plus the logarithm of the trace of the keys' covariance."""
    pooled = sub_block(setup, size, size)
    spread = by_pair(setup, size, lambda q, k: (setup.k[k] - setup.k[k].mean(0)).square().sum(-1).mean().log())
    return pooled + spread


def ear(setup: Setup, size: int, probe: int) -> torch.Tensor:
    """Half the logarithm of the value form by the block's keys, summed over probes."""

    def score(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for low in range(0, len(q), probe):
            query = setup.q[q[low : low + probe]].mean(0)
            logits = setup.scale * setup.k @ query + setup.added
            lse = logits.logsumexp(0)
            weights, at_mean = (logits[k] - lse).exp(), (setup.scale * query @ setup.k[k].mean(0) - lse).exp()
            total = total + (weights[:, None] * setup.v[k] - at_mean * setup.v[k].mean(0)).square().sum()
        return 0.5 * (total / len(k)).log()

    return by_pair(setup, size, score)


def block_error(setup: Setup, size: int, queries: torch.Tensor, rows: int, pooled: int | None) -> torch.Tensor:
    """(query blocks, key blocks) summed squared first-order errors of ``queries`` (n, D), ``rows`` to a block.

    With ``pooled`` the means of so many keys stand for a skipped block, else nothing does.
    """
    columns = [part[setup.exists[part]] for part in torch.arange(len(setup.k)).split(size)]
    found = torch.zeros(-(-len(queries) // rows), len(columns), dtype=torch.float64)
    for i, query in enumerate(queries):
        logits = setup.scale * setup.k @ query + setup.added
        lse = logits.logsumexp(0)
        weights = (logits - lse).exp()
        out = weights @ setup.v
        for j, keys in enumerate(columns):
            change = (weights[keys, None] * (setup.v[keys] - out)).sum(0)
            for low in range(j * size, (j + 1) * size, pooled or size):
                inside = keys[(keys >= low) & (keys < low + (pooled or size))]
                if pooled is None or not len(inside):
                    continue
                weight = len(inside) * (setup.scale * query @ setup.k[inside].mean(0) - lse).exp()
                change = change - weight * (setup.v[inside].mean(0) - out)
            found[i // rows, j] += change.square().sum()
    return found
