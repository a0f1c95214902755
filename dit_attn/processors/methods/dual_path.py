"""The dual path of FreeSwim (arXiv 2511.14712): attention to the text from a pass whose self attention is dense.

A twin pass through the transformer, in which every token attends to the full field, records what each layer's visual
rows took from the text; the windowed pass uses that in place of its own. With cross attention that is the layer's
output. In joint attention one softmax has both, so the row is taken apart by its log-sum-exp,

    out = (1 - g) out_image + g out_text,    g = exp(lse_text - lse),

and ``out_text`` is replaced; g, how much a row attends to the text at all, stays that of the window.
"""

from __future__ import annotations

from typing import Any

import torch

from dit_attn.kernels import BlockLayout, sparse_attention
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.executor import dense_rows
from dit_attn.processors.methods.base import TWIN
from dit_attn.processors.methods.host_tensors import HostTensors

_FP8 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_FP8).max


class Stored:
    """What one branch took from the text in one layer.

    Args:
        rows: (B, Sv, H, Dv) that nothing else holds.
        store, offload: as the settings of the method; fp8 values have an fp32 factor (B, Sv, H, 1).

    Attributes:
        shape: of the rows.
        nbytes: bytes that they take.
        host: what is in main memory, ``None`` where they stay on the device.
    """

    def __init__(self, rows: torch.Tensor, store: str, offload: bool) -> None:
        self.shape, rows = rows.shape, rows.detach()
        parts: tuple[torch.Tensor, ...] = (rows.to(torch.bfloat16) if store == "bf16" else rows,)
        if store == "fp8":
            scale = rows.float().abs().amax(-1, keepdim=True).clamp(min=1e-30) / _LARGEST
            parts = ((rows / scale).to(_FP8), scale)
        self.nbytes = sum(x.numel() * x.element_size() for x in parts)
        self.host = HostTensors(parts) if offload else None
        self._parts = () if offload else parts

    def rows(self, like: torch.Tensor) -> torch.Tensor:
        """Return the rows on the device and in the type of ``like``."""
        values, *scale = (x.to(like.device) for x in (self.host.take() if self.host else self._parts))
        return (values.float() * scale[0] if scale else values).to(like.dtype)


def stored_bytes(tokens: int, heads: int, head_dim: int, element: int, store: str) -> int:
    """Return the bytes of one layer's store for one sample and branch."""
    width = {"model": element, "bf16": 2, "fp8": 1}[store]
    return tokens * heads * (head_dim * width + (4 if store == "fp8" else 0))


def _index(call: AttentionCall, branch: str) -> list[int]:
    return [row for row, name in enumerate(call.branches) if name == branch]


def put(call: AttentionCall, rows: torch.Tensor, store: str, offload: bool) -> None:
    """Store rows (B, Sv, H, Dv) of the layer, each branch on its own; in main memory, layer after layer."""
    for branch in dict.fromkeys(call.branches):
        key, last = ("text", branch, call.layer.rows[0]), call.shared.current
        stored = call.layer.state[key] = Stored(rows[_index(call, branch)], store, offload)
        if stored.host is not None:
            before = last.get(key)
            if before is not None:
                before.following = stored.host
            last[key] = stored.host


def get(call: AttentionCall, shape: tuple[int, ...]) -> tuple[list[int], torch.Tensor] | None:
    """Return which batch rows have something stored, and that, (n, Sv, H, Dv); ``None`` where none has."""
    state: dict[Any, Any] = call.layer.state_of(TWIN)
    index: list[int] = []
    parts = []
    for branch in dict.fromkeys(call.branches):
        mine, found = _index(call, branch), state.get(("text", branch, call.layer.rows[0]))
        if isinstance(found, Stored) and found.shape == (len(mine), *shape[1:]):
            index += mine
            parts.append(found.rows(call.q))
    return (index, torch.cat(parts)) if index else None


def replace_cross(call: AttentionCall, request: Request) -> None:
    """Replace cross attention to the text by what is stored; rows without anything stored are computed."""
    shape = (*call.q.shape[:-1], call.v.shape[-1])
    found = get(call, shape)
    if found is None:
        request.decline("no full-field attention to the text is stored")
        return
    index, rows = found
    out = rows
    if index != list(range(shape[0])):
        others = sorted({*range(shape[0])} - {*index})
        out = rows.new_empty(shape)
        out[index] = rows
        if others:
            out[others] = _dense(call, others)
    request.replace_output(out)


def _dense(call: AttentionCall, index: list[int]) -> torch.Tensor:
    mask = call.mask if call.mask is None or call.mask.shape[0] == 1 else call.mask[index]
    return dense_rows(call)(call.q[index], call.k[index], call.v[index], mask)


def has_text(call: AttentionCall) -> bool:
    """Whether the sequence of a self-attention call has more than its visual tokens."""
    return call.visual.stop - call.visual.start < call.k.shape[1]


def text_part(call: AttentionCall, request: Request, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return what the visual rows take from the other tokens alone: (B, Sv, H, Dv), and its LSE (B, H, Sv)."""
    first, last = call.visual.start, call.visual.stop
    k, v = (torch.cat([x[:, :first], x[:, last:]], 1) for x in (call.k, call.v))
    mask, bias = (
        None if x is None else torch.cat([x[..., :first], x[..., last:]], -1)
        for x in (request.key_mask, request.key_bias)
    )
    layout = BlockLayout.dense(last - first, k.shape[1], device=call.q.device)
    found = sparse_attention(
        call.q[:, call.visual], k, v, layout, scale=scale, key_mask=mask if bias is None else None, key_bias=bias,
        return_lse=True,
    )  # fmt: skip
    assert isinstance(found, tuple)
    return found


def replace_joint(call: AttentionCall, request: Request) -> None:
    """Replace the text's part of windowed joint attention by what is stored, where something is."""
    rows, layout = request.permuted, request.layout
    assert rows is not None and layout is not None
    found = get(call, (call.q.shape[0], call.visual.stop - call.visual.start, call.q.shape[2], call.v.shape[-1]))
    if found is None:
        return
    index, stored = found
    pooled = request.compensation

    def compute() -> torch.Tensor:
        mask, bias = rows.key_mask, rows.key_bias
        result = sparse_attention(
            rows.q, rows.k, rows.v, layout, scale=call.scale, key_mask=mask if bias is None else None, key_bias=bias,
            compensation=pooled, return_lse=True,
        )  # fmt: skip
        assert isinstance(result, tuple)
        out = rows.unpermute(result[0])
        lse = rows.unpermute(result[1].transpose(1, 2))
        text, text_lse = text_part(call, request, call.softmax_scale)
        share = (text_lse.transpose(1, 2) - lse).exp()[index, ..., None]
        moved = out[index].to(share.dtype) + share * (stored - text[index]).to(share.dtype)
        if len(index) == len(out) and index == sorted(index):
            return moved.to(out.dtype)
        out = out.clone()
        out[index] = moved.to(out.dtype)
        return out

    on_host = layout.kv_num_blocks.device.type == "cpu"  # elsewhere nothing is read back
    request.visual_density = layout.density if on_host else layout.kv_num_blocks.float().mean() / layout.nk
    request.compute_visual = compute
