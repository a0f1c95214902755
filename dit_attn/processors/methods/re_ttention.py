"""Re-ttention (arXiv 2505.22918): ultra-sparse attention whose rows are reshaped by the softmax history.

A sparse softmax divides by too little. The fraction of the denominator that a fixed mask covers, rho, changes slowly
from step to step even where the denominators themselves do not. So every few steps a *refresh* computes dense attention
F and sparse attention W, and stores for every row rho = exp(lse_W - lse_F) and the contribution of the skipped keys,
R = F - rho W. The steps between compute W alone and return ``rho_n W + R``.

rho_n is rho, or rises a little every sparse step (``ramp``). The paper leaves R as it is, so that rows sum to more
than 1; ``conserving`` lets R fall as rho rises. Everything is stored before the output projection.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch

from dit_attn.errors import DitAttnError
from dit_attn.kernels import BlockLayout, plan_scores, sparse_attention
from dit_attn.kernels.dense import dense_with_lse
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.token_permute import PermutedTokens
from dit_attn.processors.methods.base import Grid, Phase, setting
from dit_attn.processors.methods.head_budget import budget_of_call, is_full, mean_budget
from dit_attn.processors.methods.pooled_scores import ordered_scores
from dit_attn.processors.methods.re_ttention_masks import MASKS, band_layout, window_layout
from dit_attn.processors.methods.refresh import RefreshSchedule
from dit_attn.processors.methods.sparse import SparseMethod

RAMPS = ("conserving", "paper", "none")
DTYPES = {"model": None, "bf16": torch.bfloat16, "fp8": torch.float8_e4m3fn}
FP8_MAX = 448.0


@dataclass(frozen=True, kw_only=True)
class ReTtention(SparseMethod):
    """Run dense steps first, then periods of one refresh and a few steps with a thin fixed mask.

    Attributes:
        density: fraction of the visual keys that each visual row attends to on sparse steps, in (0, 1]: a number, or
            one for each head; text is always attended to. 1 is bit-equal to stock attention.
        mask: ``band`` (the paper's: tokens near in row-major order of their frame, in all frames), ``window`` (the
            blocks nearest on the grid, a box that is shifted inward at the borders) or ``selected`` (blocks selected at
            the refresh, for each head, and fixed for the period).
        window: (t, h, w), proportions of the box of ``window``; ``None`` for those of the grid.
        period: steps from one refresh to the next.
        ramp: how rho grows over the sparse steps of a period: ``none``, ``paper`` or ``conserving``.
        ramp_rate: growth of rho per step (the paper's 0.04); the first sparse step uses rho as it is.
        clamp: whether rho is clamped to 1.
        stagger: whether the layers refresh at different steps of the period, which spreads the cost over the steps.
        cache: dtype of the stored R: ``model`` (that of activations), ``bf16`` or ``fp8`` (a scale per row and head).
        offload: store R in main memory between its uses.

    Raises:
        DitAttnError: a value out of range, or a window that is not three positive sizes.
    """

    slug: ClassVar[str] = "re-ttention"
    by_step: ClassVar[bool] = False

    density: float | tuple[float, ...] = setting(
        0.0625, "fraction of the visual keys attended to on sparse steps, of all heads or of each", low=1e-6, high=1.0,
        example=0.125,
    )  # fmt: skip
    dense_steps: float | int = setting(0.25, "dense steps at the start (fraction or count)", low=0)
    mask: str = setting("window", "keys a sparse step attends to", choices=tuple(MASKS))
    window: tuple[int, ...] | None = setting(None, "proportions (t, h, w) of the box of the mask `window`")
    period: int = setting(5, "steps from one refresh to the next", low=1)
    ramp: str = setting("none", "how rho grows within a period", choices=RAMPS)
    ramp_rate: float = setting(0.04, "growth of rho per step", low=0.0, high=1.0)
    clamp: bool = setting(True, "clamp rho to 1")
    stagger: bool = setting(True, "refresh the layers at different steps of a period")
    cache: str = setting("model", "dtype of the stored residual", choices=tuple(DTYPES))
    offload: bool = setting(False, "store the residual in main memory")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.window is not None and (len(self.window) != 3 or min(self.window) < 1):
            raise DitAttnError(f"{self.slug}.window must be three positive sizes (t, h, w), got {self.window}")

    @property
    def is_dense(self) -> bool:
        """Whether the settings are dense attention."""
        return is_full(self.density)

    @property
    def executed(self) -> float | None:
        """Mean over a period: a refresh costs a dense and a sparse call."""
        return (1.0 + self.period * mean_budget(self.density)) / self.period

    def relative_time(self, ratio: Callable[[float], float], grid: Grid) -> float:
        """Return the mean over a period; a refresh costs a dense and a sparse call. Arguments as in the base class."""
        return (1.0 + self.period * ratio(mean_budget(self.density))) / self.period

    def cache_bytes(self, tokens: int, heads: int, head_dim: int, element: int) -> int:
        """Return the bytes stored from a refresh to the next: rho in fp32, and R. Arguments as in the base class."""
        dtype = DTYPES[self.cache]
        each = element if dtype is None else dtype.itemsize
        scales = 4 * tokens * heads if self.cache == "fp8" else 0
        return tokens * heads * (4 + each * head_dim) + scales

    @property
    def cache_on_host(self) -> bool:
        """Whether R is stored in main memory."""
        return self.offload

    def phases(self, steps: int) -> tuple[Phase, ...]:
        """Return the first refresh and the sparse step after it, none where no sparse step follows a refresh."""
        first, last = self.sparse_range(steps)
        if last - first < 2:
            return ()
        return (Phase("refresh", first), Phase("sparse", first + 1, self.period - 1))[: self.period]

    def synchronized(self) -> ReTtention:
        """Return the method with ``stagger`` off: all layers refresh at the same steps."""
        return replace(self, stagger=False)

    def request(self, call: AttentionCall, request: Request) -> None:
        """Refresh, or compute from the last refresh, or decline (dense step, dense layer).

        Raises:
            DitAttnError: the call is differentiated.
        """
        mine = self.at(call)
        if mine is not self:
            mine.request(call, request)
            return
        if torch.is_grad_enabled() and call.q.requires_grad:
            raise DitAttnError(
                f"{self.slug} cannot be trained: its statistics are of earlier steps of one run; disable it, train "
                "with block-sparse or rectified, or sample under torch.no_grad()"
            )
        states, key = call.layer.state, (call.branches, call.layer.rows, call.q.shape)
        state: State | None = states.get(key)
        reason = call.layer.stateless or self.exception(call)
        schedule = self._schedule
        due, last = schedule.due(call, None if state is None else state.step), schedule.ends(call)
        early = reason == "dense step" and state is None and schedule.early(call)
        if early or (reason is None and due and not last):
            self._refresh(call, request, states, key)
        elif reason is not None or state is None or due:
            request.decline(reason or "dense step")
        else:
            request.max_error = self.max_error
            self._reshape(call, request, state)
        if last:  # no later step needs it
            states.pop(key, None)

    @property
    def _schedule(self) -> RefreshSchedule:
        return RefreshSchedule(self.period, self.stagger, self.dense_steps, self.dense_last_steps)

    # -- steps -------------------------------------------------------------------------------------------------------

    def _refresh(self, call: AttentionCall, request: Request, states: dict[Any, Any], key: Any) -> None:
        rows = request.permute(call, MASKS[self.mask])
        layout = self._layout(call, rows)
        request.visual_density = 1.0 + layout.density

        def visual() -> torch.Tensor:
            options: dict[str, Any] = {"scale": call.scale, "key_mask": rows.key_mask, "key_bias": rows.key_bias}
            exact, lse = dense_with_lse(rows.q, rows.k, rows.v, **options)
            sparse, lse_sparse = self._sparse(call, rows, layout)
            rho = torch.exp((lse_sparse - lse).float()).clamp(max=1.0)  # (B, H, Sv)
            rest = exact.float() - rho.transpose(1, 2)[..., None] * sparse.float()
            states[key] = State(call.clock.step, layout, rho, self._stored(rest.to(exact.dtype)))
            return rows.unpermute(exact)

        request.compute_visual = visual

    def _reshape(self, call: AttentionCall, request: Request, state: State) -> None:
        rows = request.permute(call, MASKS[self.mask])
        request.visual_density = state.density
        growth: float | torch.Tensor = 0.0 if self.ramp == "none" else self.ramp_rate * state.used
        grows = bool(growth)
        density = budget_of_call(self.density, call)
        if grows and isinstance(density, tuple):  # a dense head skips nothing
            growth = growth * state.rho.new_tensor([float(each < 1.0) for each in density])[:, None]
        state.used += 1

        def visual() -> torch.Tensor:
            sparse, _ = self._sparse(call, rows, state.layout)
            rho = state.rho + growth
            rho = rho.clamp(max=1.0) if self.clamp else rho
            rest = state.rest.load(sparse)
            if self.ramp == "conserving" and grows:
                left = (1.0 - rho) / (1.0 - state.rho).clamp(min=1e-6)
                rest = rest * left.clamp(min=0.0).transpose(1, 2)[..., None].to(rest.dtype)
            out = torch.addcmul(rest, rho.transpose(1, 2)[..., None].to(sparse.dtype), sparse)
            return rows.unpermute(out)

        request.compute_visual = visual

    def _sparse(
        self, call: AttentionCall, rows: PermutedTokens, layout: BlockLayout
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """W (B, Sv, H, D) and its LSE (B, H, Sv)."""
        found = sparse_attention(
            rows.q, rows.k, rows.v, layout, scale=call.scale,
            key_mask=rows.key_mask if rows.key_bias is None else None, key_bias=rows.key_bias, return_lse=True,
        )  # fmt: skip
        assert isinstance(found, tuple)
        return found

    def _layout(self, call: AttentionCall, rows: PermutedTokens) -> BlockLayout:
        assert call.tokens is not None
        density = budget_of_call(self.density, call)
        if self.mask == "selected":
            scores = ordered_scores(rows, self.q_block, self.kv_block, call.softmax_scale)
            forced = rows.order.forced(("diagonal",), rows.k.shape[1], self.q_block, self.kv_block)
            return plan_scores(
                scores, density=density, forced=forced, q_len=rows.q.shape[1], kv_len=rows.k.shape[1],
                q_block=self.q_block, kv_block=self.kv_block,
            ).layout  # fmt: skip
        blocks = (self.q_block, self.kv_block, call.q.device)
        if self.mask == "band":
            return band_layout(call.tokens, density, *blocks)
        window = None if self.window is None else (self.window[0], self.window[1], self.window[2])
        return window_layout(call.tokens, density, window, *blocks)

    def _stored(self, rest: torch.Tensor) -> Stored:
        dtype, scale = DTYPES[self.cache], None
        if dtype == torch.float8_e4m3fn:
            scale = rest.abs().amax(-1, keepdim=True).float().clamp(min=1e-12) / FP8_MAX
            rest = rest / scale.to(rest.dtype)
        rest = rest if dtype is None else rest.to(dtype)
        return Stored(rest.to("cpu") if self.offload else rest, scale)


@dataclass
class Stored:
    """A stored residual R.

    Attributes:
        values: (B, Sv, H, D).
        scale: (B, Sv, H, 1) fp32 factor, or ``None``.
    """

    values: torch.Tensor
    scale: torch.Tensor | None

    def load(self, like: torch.Tensor) -> torch.Tensor:
        """Return (B, Sv, H, D) on the device and in the dtype of ``like``."""
        values = self.values.to(like.device).to(like.dtype)
        return values if self.scale is None else values * self.scale.to(like.dtype)


@dataclass
class State:
    """What a refresh stores for the steps after it, in the permuted order.

    Attributes:
        step: step of the refresh.
        layout: the mask.
        rho: (B, H, Sv) fp32, fraction of the softmax denominator that the mask covers.
        rest: R, the contribution of the skipped keys.
        used: sparse steps computed from it.
        density: of the layout, read from the device once.
    """

    step: int
    layout: BlockLayout
    rho: torch.Tensor
    rest: Stored
    used: int = 0
    density: float = field(init=False)

    def __post_init__(self) -> None:
        self.density = self.layout.density
