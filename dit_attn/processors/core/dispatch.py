"""Dispatch one attention call: run the enabled methods, or fall back to stock attention and record the reason."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import _get_current_function_mode_stack  # public wrapper does not exist
from torch.utils._device import DeviceContext

from dit_attn.errors import DitAttnError
from dit_attn.processors.core import executor, sequence_parallel
from dit_attn.processors.core.call import AttentionCall, CallMethod, Request, SDPAArgs
from dit_attn.processors.core.kernel_choice import count_kernel
from dit_attn.processors.core.layer import KINDS, Layer
from dit_attn.processors.core.remedies import failure_reason, with_remedy
from dit_attn.processors.core.run_state import RunState

ONLY_GUIDANCE = "stock path: only guidance is enabled"
_NOT_FINITE = "kernel gave NaN or infinity"

Stock = Callable[[SDPAArgs], torch.Tensor]
"""Computes stock attention of a call."""


def dispatch_attention(run: RunState, layer: Layer, args: SDPAArgs, stock: Stock) -> torch.Tensor:
    """Return the result of one attention call.

    Args:
        run: the run the call belongs to.
        layer: the layer.
        args: the call; the local shard of the sequence under Ulysses.
        stock: computes stock attention.

    Returns:
        (B, S, H, Dv).

    Raises:
        DitAttnError: a perturbation that needs the full sequence, which is split over devices.
    """
    if isinstance(args.mask, torch.Tensor) and (mask := _unexpanded(args.mask)) is not args.mask:
        args = replace(args, mask=mask)
    if layer.kept_heads is not None:
        return _dispatch_heads(run, layer, args, stock, layer.kept_heads)
    return _dispatch_rows(run, layer, args, stock)


def _unexpanded(mask: torch.Tensor) -> torch.Tensor:
    """The mask, if it is (B, H, S, S), with one head and one row where all of them are the same memory."""
    for dim in (1, 2) if mask.ndim == 4 else ():
        if mask.shape[dim] > 1 and mask.stride(dim) == 0:
            mask = mask.narrow(dim, 0, 1)
    return mask


def _dispatch_heads(run: RunState, layer: Layer, args: SDPAArgs, stock: Stock, kept: tuple[int, ...]) -> torch.Tensor:
    """The result for some heads, 0 for the others."""
    found = _dispatch_rows(run, layer, args.of_heads(kept), stock)
    out = found.new_zeros(*args.q.shape[:3], found.shape[-1])
    return out.index_copy(2, torch.tensor(kept, device=out.device), found)


def _dispatch_rows(run: RunState, layer: Layer, args: SDPAArgs, stock: Stock) -> torch.Tensor:
    """The result of a call in which some tokens may be keys alone: queries of zeros, whose rows are dropped."""
    if is_among_keys(run, layer, args):
        return stock(args)
    runs = _queried_runs(run, layer, args)
    if runs is None:
        return _dispatch_call(run, layer, args, stock)
    length = args.k.shape[1]

    def stock_rows(given: SDPAArgs) -> torch.Tensor:
        return _spread(stock(replace(given, q=_gathered(given.q, runs))), runs, length)

    out = _dispatch_call(run, layer, replace(args, q=_spread(args.q, runs, length)), stock_rows)
    return _gathered(out, runs)


def is_among_keys(run: RunState, layer: Layer, args: SDPAArgs) -> bool:
    """Return whether a call is one of tokens that are keys alone in the call of the sequence; none is counted."""
    layout = run.layout_of(layer)
    return layer.kind == "self" and layout is not None and layout.is_among_keys(args.k.shape[1])


def _queried_runs(run: RunState, layer: Layer, args: SDPAArgs) -> tuple[tuple[int, int], ...] | None:
    """The places of the queries among the keys, ``None`` where all keys are queries or nothing says."""
    count, length = args.q.shape[1], args.k.shape[1]
    if layer.kind != "self" or count >= length or args.split:
        return None
    if isinstance(args.mask, torch.Tensor) and args.mask.ndim == 4 and args.mask.shape[2] != 1:
        return None
    tokens = run.tokens(length, layer)
    return tokens.queries if tokens is not None and tokens.query_count == count else None


def _spread(rows: torch.Tensor, runs: Sequence[tuple[int, int]], length: int) -> torch.Tensor:
    """(B, length, H, D): rows at their places in the sequence, 0 elsewhere."""
    if len(runs) == 1:
        return F.pad(rows, (0, 0, 0, 0, runs[0][0], length - runs[0][1]))
    parts = rows.split([stop - start for start, stop in runs], 1)
    gaps = [after - before for before, after in pairwise((0, *(edge for run in runs for edge in run), length))][::2]
    zeros = [rows.new_zeros(rows.shape[0], gap, *rows.shape[2:]) for gap in gaps]
    return torch.cat([zeros[0], *(x for pair in zip(parts, zeros[1:]) for x in pair)], 1)


def _gathered(rows: torch.Tensor, runs: Sequence[tuple[int, int]]) -> torch.Tensor:
    """The rows of the queries, of those of all tokens."""
    parts = [rows[:, start:stop] for start, stop in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def _dispatch_call(run: RunState, layer: Layer, args: SDPAArgs, stock: Stock) -> torch.Tensor:
    layer.stats.calls += 1
    layer.advance_rows(args.q.shape[0], args.turn)
    request = Request()
    out = _dispatch(run, layer, args, stock, request)
    perturbed, observed = run.perturbed, run.observers and not args.split
    if perturbed is None and not observed:
        return out
    args = args.with_inputs(request.inputs)
    call = _new_call(run, layer, args.rescaled(request.scale_factor))
    if perturbed is not None:
        if args.split and not perturbed.row_wise:
            raise DitAttnError("only the plain identity can be perturbed when the sequence is split over devices")
        out = perturbed.apply(call, out, max(0, run.first_perturbed - layer.rows[0]))
    if observed:
        for observer in run.observers:
            observer(call, request, out)
    return out


def _dispatch(run: RunState, layer: Layer, args: SDPAArgs, stock: Stock, request: Request) -> torch.Tensor:
    """Return the result and fill ``request``, whose layout stays ``None`` where stock attention ran."""
    methods = run.methods_for(layer.call_kind)
    reason = _unsupported_reason(run, methods, layer, args)
    exchange = None
    here = args
    if reason is None and args.mesh is not None:
        if layer.kind == "self" and args.q.shape[1] != args.k.shape[1]:
            return _fallback(layer, "cross attention", stock, args)
        try:
            exchange = sequence_parallel.exchange_for(args.mesh, run.layout_of(layer), args.q.shape[1])
            here = exchange.scatter_heads(args, layer.kind == "cross")
        except NotImplementedError as error:
            reason = str(error)
    if reason is not None:
        return _fallback(layer, reason, stock, args)
    call = _new_call(run, layer, here, (0, 1) if exchange is None else exchange.shard)
    reason = executor.unsupported_reason_call(call)
    if reason is not None:
        return _fallback(layer, reason, stock, args)
    started, usable = time.perf_counter(), layer.disabled is None
    _collect_requests(methods, call, request)
    args = args.with_inputs(request.inputs)
    out = _carry_out(call, request, args.mesh)
    layer.stats.scaled_calls += request.scale_factor != 1.0
    if out is None:
        started = time.perf_counter()
        local = stock(args.rescaled(request.scale_factor))
        if request.declined and args.q.device.type == "cpu":
            layer.stats.dense_calls += 1
            layer.stats.dense_seconds += time.perf_counter() - started
        out = local if exchange is None or not request.recorders else exchange.to_heads(local)
    else:
        local = out if exchange is None else exchange.gather_heads(out)
        layer.stats.seconds += time.perf_counter() - started
    for gain in request.key_gains if request.replacement is None else ():
        part = executor.gained(call, request, gain)
        local = local + (part if exchange is None else exchange.gather_heads(part))
        out = local
    for gate in request.gates if request.replacement is None else ():
        local = local * gate[..., None].to(local.dtype)
        out = local
    for change in request.changes if request.replacement is None else ():
        local = out = change(local)
    if usable and layer.disabled == _NOT_FINITE:  # in this very call: later ones read nothing back
        layer.disabled_run |= not _is_finite(local, args.mesh)  # the input is to blame
    for record in request.recorders:
        record(out)
    for probe in request.probes if request.replacement is None else ():
        probe.callback(executor.observe(call, request, probe))
    return local


def _unsupported_reason(run: RunState, methods: Sequence[CallMethod], layer: Layer, args: SDPAArgs) -> str | None:
    """Return the reason this call must use stock attention whatever the methods would ask for, or ``None``."""
    if not methods:
        return f"no method for {KINDS[layer.call_kind]}" if run.methods else "no method enabled"
    if run.only_guidance(layer.call_kind):
        return ONLY_GUIDANCE
    if layer.disabled and {method.role for method in methods} <= {"sparse", "guidance"}:
        return layer.disabled
    if run.layout_error:
        return run.layout_error
    if args.mask is not None and not isinstance(args.mask, torch.Tensor):
        return f"{type(args.mask).__name__} attention mask"
    if args.dropout:
        return "attention dropout"
    if not torch.compiler.is_compiling() and (modes := _get_current_function_mode_stack()):
        outer = [mode for mode in modes if not isinstance(mode, DeviceContext)]
        if outer:
            return f"{type(outer[-1]).__name__} is active around the attention call"
    return args.unsupported


def _new_call(run: RunState, layer: Layer, args: SDPAArgs, shard: tuple[int, int] = (0, 1)) -> AttentionCall:
    cross = layer.kind == "cross"
    return AttentionCall(
        q=args.q,
        k=args.k,
        v=args.v,
        mask=args.mask,
        scale=args.scale,
        causal=args.causal,
        layer=layer,
        tokens=run.tokens(args.q.shape[1], layer) if cross or args.q.shape[1] == args.k.shape[1] else None,
        clock=run.clock,
        branches=run.branches(args.q.shape[0], layer.rows[0]),
        samples=run.samples(args.q.shape[0], layer.rows[0]),
        layer_count=run.count(layer.kind),
        mask_rule=run.mask_rule,
        kind=layer.call_kind,
        shard=shard,
        pass_name=run.pass_name,
        shared=run.shared,
        reports=run.reports,
        find_piece=run.find_piece,
        find_prompts=run.find_prompts,
        given=run.given,
    )


def _collect_requests(methods: Sequence[CallMethod], call: AttentionCall, request: Request) -> None:
    """Let the methods fill the request of a call that methods can compute.

    Sparse methods come last: they know the biases and the scale of the others.
    """
    no_layout = call.layer.disabled or executor.unsupported_reason_layout(call)
    scale = call.softmax_scale
    for method in sorted(methods, key=lambda method: method.role == "sparse"):
        reason = executor.too_short(call, method.min_tokens)
        if method.role == "sparse":
            if request.replacement is not None:
                continue
            reason = no_layout or reason or executor.read_mask(call, request)
        if reason is None:
            method.request(call, request)
        else:
            request.decline(reason)
        if request.scale_factor != 1.0:
            call.scale = scale * request.scale_factor
    if request.compute_visual is not None and request.bias(call.visual) is not None:
        request.go_dense()
        request.decline("it computes its rows itself, without the logit bias of another method")


def _carry_out(call: AttentionCall, request: Request, mesh: Any) -> torch.Tensor | None:
    """Return the result of a request, ``None`` where stock attention is to compute it; what was done is counted."""
    layer, stats = call.layer, call.layer.stats
    if request.replacement is not None:
        stats.replaced_calls += 1
        return _replacement(call, request.replacement)
    if request.active is not None and request.layout is not None and request.permuted is None:
        request.layout = executor.without_rows(request.layout, request.active[:, call.visual])
    if request.sparse:
        out = _execute(call, request, mesh)
        if layer.disabled is None:
            stats.biased_calls += bool(request.biases)
            return out
        request.go_dense()
        request.declined = [layer.disabled]
    if not request.declined and (found := executor.run_active(call, request)) is not None:
        stats.sparse_calls += 1
        stats.computed += found[1]
        return found[0]
    if request.empty and not request.declined:
        request.declined = ["only observed" if request.recorders or request.probes else "nothing requested"]
    for reason in request.declined[:1]:
        stats.fallbacks[reason] += 1
    if not request.biases:
        return None
    stats.biased_calls += 1
    return executor.run(call, request, executor.dense_rows(call))


def _replacement(call: AttentionCall, value: torch.Tensor) -> torch.Tensor:
    shape = (*call.q.shape[:-1], call.v.shape[-1])
    if value.shape != shape:
        raise DitAttnError(
            f"the output that replaces {call.layer.name} must be (B, S, H, Dv) = {shape}, got {tuple(value.shape)}"
        )
    return value.to(call.q.device, call.q.dtype)


def _execute(call: AttentionCall, request: Request, mesh: Any) -> torch.Tensor:
    """Carry the request out.

    After a failure the layer is disabled: it stays dense for the rest of the session, or of the run where memory ran
    out.
    """
    layer, stats = call.layer, call.layer.stats
    try:
        out = executor.run(call, request, executor.dense_rows(call))
    except (RuntimeError, NotImplementedError) as error:
        if mesh is not None:  # the other ranks wait in an exchange: going dense alone would hang them
            raise
        _disable_layer(layer, failure_reason(error))
        layer.disabled_run = isinstance(error, torch.OutOfMemoryError)
        return call.q
    if layer.checked_run != call.clock.run:
        layer.checked_run = call.clock.run
        if not _is_finite(out, mesh):
            _disable_layer(layer, _NOT_FINITE)
            return out
    if request.max_error is not None and request.density not in stats.measured and mesh is None:
        stats.measured.add(request.density)
        with torch.no_grad():
            found = executor.sampled_error(call, request, out)
        stats.note_error(found)
        if not found <= request.max_error:
            _disable_layer(layer, f"error {found:.3g} is above max_error {request.max_error:g}")
            return out
    stats.sparse_calls += 1
    stats.computed += computed_fraction(call, request)
    count_kernel(call, request)
    return out


def _is_finite(out: torch.Tensor, mesh: Any) -> bool:
    """Whether a sample of the rows is finite, on every rank."""
    finite = bool(torch.isfinite(out.detach()[:, :: max(1, out.shape[1] // 64)]).all())
    return finite if mesh is None else sequence_parallel.all_agree(finite, mesh)


def computed_fraction(call: AttentionCall, request: Request) -> float | torch.Tensor:
    """Return the attention computed as a fraction of dense.

    With the rows that are not visual, what stands for skipped keys, and the ranking of blocks that looks into them.

    On an accelerator the result is a tensor: nothing is read back to the host.
    """
    seq_len, rows = call.q.shape[1], call.visual
    assert call.tokens is not None
    visual = (rows.stop - rows.start) / (seq_len if call.kind == "cross" else call.tokens.query_count)
    density: float | torch.Tensor = request.visual_density
    if request.compute_visual is None:
        layout = request.layout
        assert layout is not None
        on_host = layout.kv_num_blocks.device.type == "cpu"
        density = layout.density if on_host else layout.kv_num_blocks.float().mean() / layout.nk
    pooled = request.compensation
    if pooled is not None:
        share = pooled.k.shape[2] / seq_len
        density = density + share * (1.0 if pooled.variance is None else 1.5)  # one more product than two
        if pooled.first_order is not None:  # made of all keys, and one product a row
            density = density + pooled.first_order.shape[-1] / seq_len
    if request.fine is not None:
        density = density + request.fine.cost
    density = density + request.selection_cost
    return visual * density + (1.0 - visual)


def _disable_layer(layer: Layer, reason: str) -> None:
    layer.disabled = reason
    warnings.warn(f"dit_attn: {layer.name} goes back to dense attention: {with_remedy(reason)}", stacklevel=2)


def _fallback(layer: Layer, reason: str, stock: Stock, args: SDPAArgs) -> torch.Tensor:
    layer.stats.fallbacks[reason] += 1
    return stock(args)
