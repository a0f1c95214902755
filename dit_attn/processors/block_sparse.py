"""Plain block-sparse attention: every block of queries reads the key blocks with the largest pooled scores.

The baseline that every other sparse method is measured against. Scores are mean-pooled queries times mean-pooled keys,
per head; the best blocks are kept by count (``density``) or by probability mass (``top_p``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels import plan_blocks
from dit_attn.processors.executor import AttentionCall, Request
from dit_attn.processors.method import Method, setting, share
from dit_attn.processors.tokens import Tokens


@dataclass(frozen=True)
class BlockSparse(Method):
    """Keep the best key blocks of every query block.

    Give ``density`` or ``top_p``. Dense exceptions: ``dense_steps`` at the start of the run, ``dense_last_steps`` at
    its end, ``dense_layers`` by index (negative counts from the end); a float is a fraction, an int a count.

    Attributes:
        density: fraction of key blocks each query block reads, in (0, 1]. 1 is bit-equal to the stock attention.
        top_p: alternatively, keep the fewest blocks whose pooled softmax mass reaches this, in (0, 1].
        q_block: tokens per query block.
        kv_block: tokens per key block.
        keep: blocks that are always kept: ``text``, ``first-frame``, ``diagonal`` (inside the budget, first).
        dense_steps: steps at the start of the run that stay dense.
        dense_last_steps: steps at its end that stay dense.
        dense_layers: layers that stay dense.

    Raises:
        DitAttnError: a value out of range, or both or neither of density and top_p.
    """

    slug: ClassVar[str] = "block-sparse"
    role: ClassVar[str] = "reader"

    density: float | None = setting(None, "fraction of key blocks kept", low=1e-6, high=1.0)
    top_p: float | None = setting(None, "pooled softmax mass kept", low=1e-6, high=1.0)
    q_block: int = setting(128, "tokens per query block", low=8, high=1024)
    kv_block: int = setting(128, "tokens per key block", low=8, high=1024)
    keep: tuple[str, ...] = setting(
        ("text", "diagonal"), "blocks that are always kept", choices=("text", "first-frame", "diagonal")
    )
    dense_steps: float | int = setting(0.1, "dense steps at the start (fraction or count)", low=0)
    dense_last_steps: float | int = setting(0.0, "dense steps at the end (fraction or count)", low=0)
    dense_layers: tuple[int, ...] = setting((), "layers that stay dense, by index")

    def __post_init__(self) -> None:
        if self.density is not None and self.top_p is not None:
            raise DitAttnError("block-sparse takes density or top_p, not both: one says how many blocks are kept")
        if self.density is None and self.top_p is None:
            object.__setattr__(self, "density", 0.25)
        super().__post_init__()

    @property
    def is_dense(self) -> bool:
        """Whether the settings keep everything."""
        return (self.density or self.top_p or 0.0) >= 1.0

    def request(self, call: AttentionCall, request: Request) -> None:
        """Supply the layout of the visual rows, or decline (dense step, dense layer, density 1)."""
        reason = self._exception(call)
        if reason:
            request.decline(reason)
            return
        tokens = call.tokens
        assert tokens is not None and tokens.visual_range is not None
        start, stop = tokens.visual_range
        request.layout = plan_blocks(
            call.q[:, start:stop],
            call.k,
            q_block=self.q_block,
            kv_block=self.kv_block,
            density=self.density,
            top_p=self.top_p,
            forced=forced_blocks(tokens, self.keep, self.q_block, self.kv_block, call.q.device),
            key_mask=request.key_mask,
            scale=call.scale,
        ).layout

    def _exception(self, call: AttentionCall) -> str | None:
        if self.is_dense:
            return "density 1"
        layers = call.site.session.layer_count
        if any(index % layers == call.site.index for index in self.dense_layers):
            return "dense layer"
        return dense_step(self.dense_steps, self.dense_last_steps, call)


def dense_step(first: float | int, last: float | int, call: AttentionCall) -> str | None:
    """``"dense step"`` when the call's step is one of the first or last steps that stay dense, else ``None``.

    With an unknown number of steps, fractions are taken of the noise range and counts at the end are ignored.
    """
    clock = call.clock
    if clock.total:
        if clock.step < share(first, clock.total) or clock.step >= clock.total - share(last, clock.total):
            return "dense step"
        return None
    early = clock.progress < first if isinstance(first, float) else clock.step < first
    late = isinstance(last, float) and last > 0 and clock.progress >= 1.0 - last
    return "dense step" if early or late else None


def forced_blocks(
    tokens: Tokens, keep: tuple[str, ...], q_block: int, kv_block: int, device: torch.device
) -> torch.Tensor | None:
    """Blocks that every selection must contain.

    Args:
        tokens: the resolved sequence; queries are its visual rows, keys all of it.
        keep: any of ``text`` (every token that is not visual), ``first-frame``, ``diagonal``.
        q_block: tokens per query block.
        kv_block: tokens per key block.
        device: where the mask is made.

    Returns:
        (1, 1, nq, nk) bool, or ``None`` when nothing is forced.
    """
    if not keep:
        return None
    assert tokens.visual_range is not None
    start, stop = tokens.visual_range
    nk = -(-tokens.seq_len // kv_block)
    nq = -(-(stop - start) // q_block)
    lows = torch.arange(nk, device=device) * kv_block
    highs = (lows + kv_block).clamp(max=tokens.seq_len)
    columns = torch.zeros(nk, dtype=torch.bool, device=device)
    if "text" in keep:
        columns |= (lows < start) | (highs > stop)
    if "first-frame" in keep:
        for span in tokens.visual:
            if span.kind == "video" and span.grid is not None:
                frame_end = span.start + span.grid[1] * span.grid[2]
                columns |= (lows < frame_end) & (highs > span.start)
    forced = columns.expand(nq, nk).clone()
    if "diagonal" in keep:
        rows = start + torch.arange(nq, device=device) * q_block
        row_ends = (rows + q_block).clamp(max=stop)
        forced |= (lows[None] < row_ends[:, None]) & (highs[None] > rows[:, None])
    return forced[None, None]
