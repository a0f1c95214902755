"""What is measured of an attention call: the log-sum-exp of its rows, and their attention to spans of keys."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from dit_attn.processors.core.logit_bias import TokenSet, token_mask


@dataclass(frozen=True)
class Observation:
    """Attention of one call, as it was computed: with its mask, scale, biases, layout and pooled keys.

    Attributes:
        lse: (B, H, S) fp32 (fp64 for fp64 calls), log-sum-exp of the logits of every row, natural logarithm; ``-inf``
            for a row without a key.
        row_mass: (B, H, S, n) of the same type, fraction of every row's attention that n spans of keys get. In fp16 and
            bf16 it has the precision of the call.
        mass: (B, H, R, n), its mean over the rows of R regions; 0 for an empty region.
    """

    lse: torch.Tensor
    row_mass: torch.Tensor
    mass: torch.Tensor


@dataclass(frozen=True)
class Probe:
    """A request to observe one call.

    Attributes:
        callback: gets the :class:`Observation`.
        spans: spans of keys, each a slice or (Sk,) or (B, Sk) bool.
        rows: regions of rows, each a slice or (S,) or (B, S) bool.
    """

    callback: Callable[[Observation], None]
    spans: tuple[TokenSet, ...] = ()
    rows: tuple[TokenSet, ...] = (slice(None),)

    def indicators(self, k: torch.Tensor) -> torch.Tensor:
        """Return (B, Sk, n) of k's type, 1 where a key (B, Sk, Hk, D) is in a span."""
        return _columns(self.spans, k.shape[0], k.shape[1], k.device).to(k.dtype)

    def observation(self, lse: torch.Tensor, row_mass: torch.Tensor) -> Observation:
        """Return the observation of rows whose statistics are known."""
        batch, _, seq_len = lse.shape
        regions = _columns(self.rows, batch, seq_len, lse.device).to(row_mass.dtype)
        shares = regions / regions.sum(1, keepdim=True).clamp(min=1.0)
        return Observation(lse, row_mass, torch.einsum("bsr,bhsn->bhrn", shares, row_mass))


def _columns(sets: Sequence[TokenSet], batch: int, length: int, device: torch.device) -> torch.Tensor:
    """(B, length, n) bool."""
    masks = [token_mask(tokens, batch, length).to(device).expand(batch, -1) for tokens in sets]
    return torch.stack(masks, -1) if masks else torch.zeros(batch, length, 0, dtype=torch.bool, device=device)
