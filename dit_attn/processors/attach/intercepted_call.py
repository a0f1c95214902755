"""Dispatch an intercepted attention call, in eager mode or inside a compiled graph.

Inside ``torch.compile`` both layers and decisions hide behind one opaque operator whose layer is a 0-d tensor, so that
all layers share a graph and nothing recompiles when step or method changes.
"""

from __future__ import annotations

import functools
from typing import Any, cast

import torch
import torch.nn.functional as F

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach import compat
from dit_attn.processors.attach.session import Session
from dit_attn.processors.core.call import SDPAArgs
from dit_attn.processors.core.dispatch import dispatch_attention
from dit_attn.processors.core.layer import Layer, layer_by_id
from dit_attn.processors.core.run_state import run_by_handle

_is_exporting = getattr(torch.compiler, "is_exporting", lambda: False)  # since torch 2.7


def dispatch_backend(
    run: Session, layer: Layer, args: SDPAArgs, parallel_config: Any, named: str | None = None
) -> torch.Tensor:
    """Dispatch a call that came through diffusers' ``dispatch_attention_fn``.

    ``named`` is the backend that the processor names itself, ``""`` for the active one, ``None`` for that of its
    ``_attention_backend``.
    """
    stock = functools.partial(_stock_backend, run, layer, parallel_config, named)
    split, full_keys = parallel_config, False
    if layer.kind == "cross" and parallel_config is None:  # the rows are split and need no exchange: the keys are not
        split, full_keys = getattr(run.module(layer).processor, "_parallel_config", None), True
    return dispatch_attention(run, layer, compat.split_args(args, split, full_keys), stock)


def _stock_backend(run: Session, layer: Layer, parallel_config: Any, named: str | None, args: SDPAArgs) -> torch.Tensor:
    own = run.module(layer).processor.__dict__["_dit_dense_backend"]
    return compat.dispatch(
        args.q,
        args.k,
        args.v,
        backend=own if named is None else named or None,
        parallel_config=parallel_config,
        attn_mask=args.mask,
        dropout_p=args.dropout,
        is_causal=args.causal,
        scale=args.scale,
        enable_gqa=args.gqa,
    )


def stock_torch(function: Any, args: SDPAArgs) -> torch.Tensor:
    """Make the very call that a processor made (``function``), so that stock calls stay bit-equal on every torch."""
    extra = {"enable_gqa": True} if args.gqa else {}
    q, k, v = (x.transpose(1, 2) for x in (args.q, args.k, args.v))
    out = function(
        q, k, v, attn_mask=args.mask, dropout_p=args.dropout, is_causal=args.causal, scale=args.scale, **extra
    )
    return out.transpose(1, 2)


def session_by_handle(run: torch.Tensor) -> Session:
    """Return the session behind the 0-d tensor that names it in compiled graphs."""
    return cast(Session, run_by_handle(run))


def compiled_attention(
    layer: torch.Tensor, run: torch.Tensor, args: SDPAArgs, parallel: bool, named: str | None = None
) -> torch.Tensor:
    """Return the result of an attention call inside a compiled graph: one operator; ``named`` as elsewhere.

    Raises:
        DitAttnError: the graph is exported.
    """
    if _is_exporting():
        raise DitAttnError("torch.export would freeze the decisions of this run; call dit_attn.disable(...) first")
    q, k, v = args.q, args.k, args.v
    grad = torch.is_grad_enabled()
    training = grad and (q.requires_grad or k.requires_grad or v.requires_grad)
    if training:  # an error raised while tracing would be buried in Dynamo's own: the operator raises when it runs
        q, k, v = q.detach(), k.detach(), v.detach()
    return torch.ops.dit_attn.attend(
        layer, run, q, k, v, args.mask, args.scale, args.causal, args.gqa, parallel, grad, training, args.turn,
        named,
    )  # fmt: skip


@torch.library.custom_op("dit_attn::attend", mutates_args=())
def _attend(
    layer: torch.Tensor,
    run: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    causal: bool,
    gqa: bool,
    parallel: bool,
    grad: bool,
    training: bool,
    turn: int = 0,
    named: str | None = None,
) -> torch.Tensor:
    """One attention call of a compiled model; q, k, v and the result are (B, S, H, D).

    ``run`` also orders the call after the forward hook, which writes to it.
    """
    session, here = session_by_handle(run), layer_by_id(int(layer))
    learned = (x for module in here.learned.values() for x in module.parameters())
    if training or (grad and any(x.requires_grad for x in learned)):
        raise DitAttnError(
            "dit_attn methods cannot be trained inside torch.compile; train without compiling, disable the method, or "
            "sample under torch.no_grad()"
        )
    args = SDPAArgs(q, k, v, mask, scale, causal, 0.0, gqa, turn=turn)
    processor = session.module(here).processor
    if type(processor)._dit_tap == "dispatch":
        out = dispatch_backend(session, here, args, processor._parallel_config if parallel else None, named)
    else:
        out = dispatch_attention(session, here, args, functools.partial(stock_torch, F.scaled_dot_product_attention))
    return out.contiguous()


@_attend.register_fake
def _(
    layer: torch.Tensor,
    run: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    scale: float | None,
    causal: bool,
    gqa: bool,
    parallel: bool,
    grad: bool,
    training: bool,
    turn: int = 0,
    named: str | None = None,
) -> torch.Tensor:
    return q.new_empty(*q.shape[:-1], v.shape[-1])
