"""The decision at a tapped attention call: ask the methods, run their request, or take the stock path and count why."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import _get_current_function_mode_stack  # public wrapper does not exist
from torch.utils._device import DeviceContext

from dit_attn.errors import DitAttnError
from dit_attn.processors import executor, ulysses
from dit_attn.processors.executor import AttentionCall, Request
from dit_attn.processors.session import Site

ONLY_GUIDANCE = "stock path: only guidance is enabled"


def answer(
    site: Site,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    causal: bool,
    dropout: float,
    stock: Callable[[], torch.Tensor],
    parallel_config: Any = None,
) -> torch.Tensor:
    """The result of one attention call of ``site``.

    Args:
        site: the layer.
        q, k, v: (B, S, H, D); the local shard of the sequence under Ulysses.
        mask, scale, causal, dropout: as the model passed them.
        stock: the untouched call.
        parallel_config: diffusers' parallel settings of the call, or ``None``.

    Returns:
        (B, S, H, Dv).
    """
    site.stats.calls += 1
    site.take_rows(q.shape[0])
    request = Request()
    out = _answered(site, q, k, v, mask, scale, causal, dropout, stock, parallel_config, request)
    plan, watched = site.session.perturbed, site.session.observers and parallel_config is None
    if plan is None and not watched:
        return out
    call = _call(site, q, k, v, mask, scale, causal)
    if plan is not None:
        if parallel_config is not None and not plan.row_wise and ulysses.mesh_of(parallel_config) is not None:
            raise DitAttnError("only the plain identity can be perturbed when the sequence is split over devices")
        out = plan.apply(call, out, max(0, site.session.first_perturbed - site.rows[0]))
    if watched:
        for observer in site.session.observers:
            observer(call, request, out)
    return out


def _answered(
    site: Site,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    causal: bool,
    dropout: float,
    stock: Callable[[], torch.Tensor],
    parallel_config: Any,
    request: Request,
) -> torch.Tensor:
    """The same; what the methods asked is left in ``request``, and nothing where the stock path was taken."""
    reason = _bypass(site, mask, dropout)
    mesh = exchange = None
    if reason is None:
        try:
            mesh = ulysses.mesh_of(parallel_config)
            if mesh is not None:
                exchange = ulysses.exchange_for(mesh, site.session.layout, q.shape[1])
        except NotImplementedError as error:
            reason = str(error)
    if mesh is not None and q.shape[1] != k.shape[1]:
        reason = "cross attention"
    if reason is not None:
        return _decline(site, reason, stock)
    if exchange is not None:
        q, k, v, mask = exchange.scatter_heads(q, k, v, mask)
    call = _call(site, q, k, v, mask, scale, causal)
    started = time.perf_counter()
    reason = _ask(call, request)
    if reason is not None:
        return _decline(site, reason, stock)
    out = _run(call, request, mesh)
    if site.broken is not None:
        request.layout = request.visual = None
        return _decline(site, site.broken, stock)
    site.stats.seconds += time.perf_counter() - started
    return out if exchange is None else exchange.gather_heads(out)


def _bypass(site: Site, mask: Any, dropout: float) -> str | None:
    if not site.session.methods:
        return "no method enabled"
    if all(method.role == "guidance" for method in site.session.methods):
        return ONLY_GUIDANCE
    if site.broken:
        return site.broken
    if site.session.layout_error:
        return site.session.layout_error
    if mask is not None and not isinstance(mask, torch.Tensor):
        return f"{type(mask).__name__} attention mask"
    if dropout:
        return "attention dropout"
    if not torch.compiler.is_compiling():
        outer = [mode for mode in _get_current_function_mode_stack() if not isinstance(mode, DeviceContext)]
        if outer:
            return f"{type(outer[-1]).__name__} is active around the attention call"
    return None


def _call(
    site: Site,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    causal: bool,
) -> AttentionCall:
    session = site.session
    return AttentionCall(
        q=q,
        k=k,
        v=v,
        mask=mask,
        scale=scale,
        causal=causal,
        site=site,
        tokens=session.tokens(q.shape[1]) if q.shape[1] == k.shape[1] else None,
        clock=session.clock,
        branches=session.branches(q.shape[0], site.rows[0]),
    )


def _ask(call: AttentionCall, request: Request) -> str | None:
    """Let the methods fill the request; the reason when the call stays on the stock path."""
    reason = executor.unfit(call) or executor.read_mask(call, request, call.site.session.family.mask_rule)
    if reason is not None:
        return reason
    for method in call.site.session.methods:
        method.request(call, request)
    if request.empty:
        return request.declined[0] if request.declined else "nothing asked"
    return None


def _run(call: AttentionCall, request: Request, mesh: Any) -> torch.Tensor:
    """Carry the request out. A failure marks the layer broken: it stays dense for the rest of the session."""
    site, stats = call.site, call.site.stats
    try:
        out = executor.run(call, request, executor.dense_rows(call))
    except (RuntimeError, NotImplementedError) as error:
        if mesh is not None:  # the other ranks wait in an exchange: going dense alone would hang them
            raise
        _break(site, f"kernel failed: {type(error).__name__}: {str(error).splitlines()[0][:120]}")
        return call.q
    if site.checked_run != call.clock.run:
        site.checked_run = call.clock.run
        finite = bool(torch.isfinite(out[:, :: max(1, out.shape[1] // 64)]).all())
        if not (finite if mesh is None else ulysses.all_agree(finite, mesh)):
            _break(site, "kernel gave NaN or infinity")
            return out
    if request.max_error is not None and request.density not in stats.measured and mesh is None:
        stats.measured.add(request.density)
        found = executor.sampled_error(call, request, out)
        stats.error = found if stats.error is None or not found <= stats.error else stats.error
        if not found <= request.max_error:
            _break(site, f"error {found:.3g} is above max_error {request.max_error:g}")
            return out
    stats.engaged += 1
    stats.kept += executed_share(call, request)
    return out


def executed_share(call: AttentionCall, request: Request) -> float | torch.Tensor:
    """Share of the map that is computed, virtual keys and the rows outside the picture counted; never reads back."""
    assert call.tokens is not None and call.tokens.visual_range is not None
    start, stop = call.tokens.visual_range
    visual = (stop - start) / call.tokens.seq_len
    density: float | torch.Tensor = request.share
    if request.visual is None:
        layout = request.layout
        assert layout is not None
        on_host = layout.kv_cnt.device.type == "cpu"
        density = layout.density if on_host else layout.kv_cnt.float().mean() / layout.nk
    if request.compensation is not None:
        density = density + request.compensation.k.shape[2] / call.tokens.seq_len
    return visual * density + (1.0 - visual)


def _break(site: Site, reason: str) -> None:
    site.broken = reason
    warnings.warn(f"dit_attn: {site.name} goes back to dense attention: {reason}", stacklevel=2)


def _decline(site: Site, reason: str, stock: Callable[[], torch.Tensor]) -> torch.Tensor:
    site.stats.declined[reason] += 1
    return stock()
