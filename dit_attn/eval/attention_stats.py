"""Statistics of attention from a few query rows: where the softmax mass of a row lies, what a block selection finds.

Every function takes rows x keys, never queries x keys. Logits are fp32 or fp64, ``-inf`` at masked keys; a row whose
keys are all masked gives NaN. Spans, grids and positions are plain numbers: nothing here knows a model or a method.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

MASS = 0.9
BEST = (0.05, 0.1, 0.25)  # shares of the key blocks whose best mass is measured
SELECTED = (0.1, 0.25, 0.5)  # shares of the key blocks that a selection by block means selects
_SLACK = 1e-6  # of a sum in fp32


@dataclass(frozen=True)
class Statistic:
    """What a number means.

    Attributes:
        title: a few words.
        unit: of the value.
        reading: one sentence on how to interpret it.
        scale: ends of the color scale, ``None`` for those of the values.
    """

    title: str
    unit: str
    reading: str
    scale: tuple[float, float] | None = None


STATISTICS: dict[str, Statistic] = {
    "keys_90": Statistic(
        "Density for mass 0.9",
        "share of the keys",
        "The smallest share of the keys that holds 90 % of a row's softmax mass: small means that few keys matter and "
        "sparse attention has much to gain; 0.9 is uniform attention.",
        (0.0, 1.0),
    ),
    "blocks_90": Statistic(
        "Block density for mass 0.9",
        "share of the key blocks",
        "The same in full key blocks, chosen for every row by its exact mass: a block-sparse method cannot cover 90 % "
        "of the mass below this density; the gap to the value above is what blocks cost.",
        (0.0, 1.0),
    ),
    **{
        f"best_{share:.0%}".rstrip("%"): Statistic(
            f"Mass in the best {share:.0%} of the key blocks",
            "share of the mass",
            f"What {share:.0%} of the key blocks hold when every row chooses them by their exact mass: the upper bound "
            "of any selection of blocks at this density; bright layers can be sparse.",
            (0.0, 1.0),
        )
        for share in BEST
    },
    **{
        f"recall_{share:.0%}".rstrip("%"): Statistic(
            f"Recall of block means at density {share:.0%}",
            "share of the mass",
            f"What a top-k selection by the means of query and key blocks covers of a row's mass at density "
            f"{share:.0%}, as BlockSparse selects without forced or reordered tokens: dark layers lose most.",
            (0.0, 1.0),
        )
        for share in SELECTED
    },
    "entropy": Statistic(
        "Entropy",
        "nats",
        "0 is one key that takes everything, the logarithm of the number of keys is uniform attention: dark is "
        "focused, bright is spread.",
    ),
    "dt": Statistic(
        "Distance in time",
        "frames",
        "Expected |dt| between a row and the keys it attends to, in latent frames: dark layers attend to their own "
        "frame and its neighbors.",
    ),
    "dh": Statistic(
        "Distance in height",
        "token rows",
        "Expected |dh| between a row and the keys it attends to: dark layers attend along their line.",
    ),
    "dw": Statistic(
        "Distance in width",
        "token columns",
        "Expected |dw| between a row and the keys it attends to: dark layers attend along their column.",
    ),
    "same_frame": Statistic(
        "Mass within the same frame",
        "share of the mass on the video",
        "Of a row's mass on the video, the share in its own frame: 1 is attention that ignores time.",
        (0.0, 1.0),
    ),
    "lse": Statistic(
        "Log-sum-exp of the logits",
        "natural logarithm",
        "The logarithm of the softmax denominator, mean over the rows: jumps between layers or steps show where logits "
        "grow and low precision is at risk.",
    ),
    "lse_spread": Statistic(
        "Spread of the log-sum-exp",
        "natural logarithm",
        "Standard deviation of the same over the rows of a call: bright heads treat their rows very differently.",
    ),
}


def span_statistic(span: str) -> Statistic:
    """Return the meaning of ``mass.SPAN``."""
    about = "what the prompt weighs in joint attention" if span.startswith("text") else "how much a row attends to it"
    return Statistic(
        f"Mass on {span}", "share of the mass", f"Share of a row's mass on the {span} tokens: {about}.", (0.0, 1.0)
    )


def describe(name: str) -> Statistic:
    """Return the meaning of a statistic by its name."""
    return span_statistic(name.removeprefix("mass.")) if name.startswith("mass.") else STATISTICS[name]


def ordered(names: Iterable[str]) -> list[str]:
    """Sort names as in :data:`STATISTICS`, the masses of spans after them."""
    given = list(names)
    return [name for name in STATISTICS if name in given] + sorted(name for name in given if name not in STATISTICS)


# -- rows --------------------------------------------------------------------------------------------------------------


def sample_rows(start: int, stop: int, rows: int, seed: int) -> torch.Tensor:
    """Sample at most ``rows`` positions in [start, stop), sorted: (R,), the same for the same seed.

    The global generator is not used.
    """
    order = torch.randperm(stop - start, generator=torch.Generator().manual_seed(seed))
    return order[:rows].sort().values + start


def row_logits(
    q: torch.Tensor, k: torch.Tensor, scale: float | None = None, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute the logits of sampled rows: (B, H, R, S) fp32, fp64 for fp64 inputs.

    Args:
        q: (B, R, H, D), the sampled rows.
        k: (B, S, Hk, D); ``H % Hk == 0``.
        scale: default ``D ** -0.5``.
        mask: broadcastable to (B, H, R, S); boolean (True = attend) or additive.
    """
    kind = torch.float64 if q.dtype == torch.float64 else torch.float32
    batch, rows, heads, dim = q.shape
    groups = q.to(kind).reshape(batch, rows, k.shape[2], -1, dim)
    logits = torch.einsum("brkgd,bskd->bkgrs", groups * (dim**-0.5 if scale is None else scale), k.to(kind))
    logits = logits.reshape(batch, heads, rows, k.shape[1])
    if mask is None:
        return logits
    if mask.is_floating_point():
        return logits + mask.to(kind).masked_fill(mask <= torch.finfo(mask.dtype).min / 2, -math.inf)
    return logits.masked_fill(~mask, -math.inf)


# -- statistics, (B, H, R) or (B, H) -----------------------------------------------------------------------------------


def entropy(logits: torch.Tensor) -> torch.Tensor:
    """Compute the entropy in nats, (B, H, R), of the softmax of (B, H, R, S) logits."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p.masked_fill(log_p == -math.inf, 0.0)).sum(-1)


def share_for_mass(mass: torch.Tensor, count: torch.Tensor | int, target: float = MASS) -> torch.Tensor:
    """Compute the smallest share of the entries whose sum reaches ``target``.

    Args:
        mass: (..., N), at least 0, sums to 1.
        count: entries that exist, broadcastable to (...); at least 1.
        target: in (0, 1].
    """
    running = mass.sort(-1, descending=True).values.cumsum(-1)
    exist = torch.as_tensor(count, device=mass.device)
    needed = torch.minimum((running < target - _SLACK).sum(-1) + 1, exist).to(mass.dtype)
    return (needed / exist).masked_fill(mass.isnan().any(-1), math.nan)


def block_mass(p: torch.Tensor, block: int) -> torch.Tensor:
    """Sum (..., S) over key blocks: (..., ceil(S / block)); the last one may be short."""
    return F.pad(p, (0, -p.shape[-1] % block)).unflatten(-1, (-1, block)).sum(-1)


def best_mass(mass: torch.Tensor, count: torch.Tensor | int, share: float) -> torch.Tensor:
    """Sum the ``ceil(share * count)`` largest of (..., N) blocks, ``count`` (...) of which exist: (...)."""
    return selected_mass(mass, mass, count, share)


def selected_mass(mass: torch.Tensor, scores: torch.Tensor, count: torch.Tensor | int, share: float) -> torch.Tensor:
    """Sum the ``ceil(share * count)`` blocks with the best (..., N) scores, the recall of a selection: (...)."""
    order = scores.nan_to_num(-math.inf).argsort(-1, descending=True)
    running = mass.gather(-1, order).cumsum(-1)
    taken = torch.as_tensor(count, device=mass.device).mul(share).sub(_SLACK).ceil().long().clamp(min=1)
    return running.gather(-1, taken.expand(running.shape[:-1])[..., None] - 1)[..., 0]


def mean_scores(q_blocks: torch.Tensor, k: torch.Tensor, block: int, allowed: torch.Tensor) -> torch.Tensor:
    """Score key blocks by their mean key, as pooled selections do: (B, H, R, ceil(S / block)).

    Args:
        q_blocks: (B, R, H, D), the mean query of the block that each sampled row lies in.
        k: (B, S, Hk, D).
        block: keys per block.
        allowed: (B, S) bool; masked keys are no part of a mean, and a block without any other is never selected.
    """
    weight = F.pad(allowed.to(k.dtype), (0, -k.shape[1] % block)).unflatten(1, (-1, block))
    padded = F.pad(k, (0, 0, 0, 0, 0, -k.shape[1] % block)).unflatten(1, (-1, block))
    means = torch.einsum("bnm,bnmkd->bnkd", weight, padded) / weight.sum(-1).clamp(min=1)[..., None, None]
    scores = row_logits(q_blocks, means)
    return scores.masked_fill(weight.sum(-1)[:, None, None] == 0, -math.inf)


def locality(p: torch.Tensor, grid: Sequence[int], at: torch.Tensor) -> dict[str, torch.Tensor]:
    """Compute expected |dt|, |dh|, |dw| and mass within the same frame, given that the key lies in the grid.

    Each is (B, H, R).

    Args:
        p: (B, H, R, T * H * W) mass of the keys of the grid, row-major; it need not sum to 1.
        grid: (T, H, W); sizes of 1 give no distance, and one frame no ``same_frame``.
        at: (R,) positions of the rows in the grid.
    """
    on_grid = p.unflatten(-1, tuple(grid))
    total = p.sum(-1).clamp(min=torch.finfo(p.dtype).tiny)
    places = (at // (grid[1] * grid[2]), at // grid[2] % grid[1], at % grid[2])
    found = {}
    for axis, (name, size, place) in enumerate(zip(("dt", "dh", "dw"), grid, places, strict=True)):
        if size == 1:
            continue
        others = [dim - 3 for dim in range(3) if dim != axis]
        along = on_grid.sum(others) / total[..., None]  # (B, H, R, size)
        place = place.to(p.device)[:, None]
        found[name] = (along * (place - torch.arange(size, device=p.device)).abs()).sum(-1)
        if name == "dt":
            found["same_frame"] = along.gather(-1, place.expand(*along.shape[:-1], 1))[..., 0]
    return found


def uniform_distance(size: int) -> float:
    """Compute the expected distance of two independent uniform positions among ``size``: (n^2 - 1) / (3 n)."""
    return (size * size - 1) / (3 * size)


def row_statistics(
    logits: torch.Tensor,
    spans: Sequence[tuple[str, int, int]] = (),
    grid: tuple[int, Sequence[int], torch.Tensor] | None = None,
    block: int = 64,
    scores: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Compute every statistic of a set of rows, mean over the rows with any unmasked key: (B, H) each.

    Args:
        logits: (B, H, R, S), ``-inf`` at masked keys.
        spans: (name, start, stop) of the parts of the keys.
        grid: (first key, (T, H, W), (R,) positions of the rows in it) of the visual tokens.
        block: keys per block.
        scores: (B, H, R, blocks) of a selection whose recall is wanted.
    """
    lse = logits.logsumexp(-1)
    p = (logits - lse[..., None]).exp()
    exists = logits > -math.inf
    keys, blocks = (kind.sum(-1).clamp(min=1) for kind in (exists, block_mass(exists.float(), block) > 0))
    by_block = block_mass(p, block)
    found = {
        "keys_90": share_for_mass(p, keys),
        "blocks_90": share_for_mass(by_block, blocks),
        **{f"best_{share:.0%}".rstrip("%"): best_mass(by_block, blocks, share) for share in BEST},
        "entropy": entropy(logits),
        "lse": lse.masked_fill(lse == -math.inf, math.nan),
    }
    if scores is not None:
        shares = {f"recall_{share:.0%}".rstrip("%"): share for share in SELECTED}
        found |= {name: selected_mass(by_block, scores, blocks, share) for name, share in shares.items()}
    found |= {f"mass.{name}": p[..., start:stop].sum(-1) for name, start, stop in spans}
    if grid is not None:
        first, size, at = grid
        found |= locality(p[..., first : first + math.prod(size)], size, at)
    means = {name: values.nanmean(-1) for name, values in found.items()}
    return means | {"lse_spread": _spread(found["lse"])}


def _spread(values: torch.Tensor) -> torch.Tensor:
    """Standard deviation (of the population) over the last dimension, NaN left out."""
    return (values - values.nanmean(-1, keepdim=True)).square().nanmean(-1).sqrt()
