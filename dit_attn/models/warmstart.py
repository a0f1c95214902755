"""A start from an embedded model: from itself, or what a joint transformer can copy from a cross-attention one.

`tiny-joint` and `tiny-image` have the same width, depth, patch and objective. Whatever acts on image tokens alone has
a counterpart: patch embedding, time embedding, modulation, feed-forward and self-attention. Text reaches the image
another way (joint attention instead of cross attention), so those weights start fresh, with text values of zero.

Heads are split: each wide head of the source becomes several narrow ones. The logits of a wide head are a bilinear
form of its input; its singular directions are shared out: each narrow head has the leading ones and some of its own.
"""

from __future__ import annotations

from typing import Any

import torch

from dit_attn.errors import DitAttnError

SHARED = 0.5  # of a narrow head's directions: the leading ones of the wide head, the same in all its parts


@torch.no_grad()
def warm_start(model: Any, source: str) -> None:
    """Start a `Trainee` from the embedded model `source`, in place.

    Of the same family, every weight is taken; family "joint" takes what it can from a `PixArtSigmaPipeline`.

    Raises:
        DitAttnError: width or depth differ.
    """
    from dit_attn.models.registry import load

    pipeline = load(source)
    if type(pipeline.transformer) is type(model.transformer):
        for name, part in model.parts.items():
            part.load_state_dict(getattr(pipeline, name).state_dict())
    else:
        _take_joint(model, pipeline, source)


def _take_joint(model: Any, pipeline: Any, source: str) -> None:
    """What a joint transformer can copy from a cross-attention one."""
    old, new = pipeline.transformer, model.transformer
    if old.inner_dim != new.inner_dim or len(old.transformer_blocks) != len(new.transformer_blocks):
        raise DitAttnError(
            f"{source!r} has {len(old.transformer_blocks)} layers of width {old.inner_dim}, the new model "
            f"{len(new.transformer_blocks)} of {new.inner_dim}; a warm start needs the same"
        )
    model.text_encoder_3.load_state_dict(pipeline.text_encoder.state_dict())
    new.pos_embed.proj.load_state_dict(old.pos_embed.proj.state_dict())
    new.proj_out.load_state_dict(old.proj_out.state_dict())
    _take_time(old, new)
    for theirs, ours in zip(old.transformer_blocks, new.transformer_blocks, strict=True):
        _take_block(theirs, ours, old.adaln_single.linear)


def _take_time(old: Any, new: Any) -> None:
    """Time embedding and last modulation; the pooled text starts without influence."""
    new.time_text_embed.timestep_embedder.load_state_dict(old.adaln_single.emb.timestep_embedder.state_dict())
    torch.nn.init.zeros_(new.time_text_embed.text_embedder.linear_2.weight)
    torch.nn.init.zeros_(new.time_text_embed.text_embedder.linear_2.bias)
    steps = torch.linspace(0, 1000, 2001)
    time = old.adaln_single.emb.timestep_embedder(old.adaln_single.emb.time_proj(steps))
    inputs = torch.cat([torch.nn.functional.silu(time), torch.ones(len(time), 1)], 1)
    fit = torch.linalg.lstsq(inputs.double(), time.double(), driver="gelsd").solution.float()  # silu(time) -> time
    shift, scale = old.scale_shift_table
    new.norm_out.linear.weight.copy_(torch.cat([fit[:-1].T, fit[:-1].T]))
    new.norm_out.linear.bias.copy_(torch.cat([fit[-1] + scale, fit[-1] + shift]))


def _take_block(old: Any, new: Any, modulation: Any) -> None:
    """Modulation, feed-forward and self-attention of one block; values of text start at zero."""
    new.norm1.linear.weight.copy_(modulation.weight)
    new.norm1.linear.bias.copy_(modulation.bias + old.scale_shift_table.flatten())
    new.ff.load_state_dict(old.ff.state_dict())
    ours, theirs = new.attn, old.attn1
    for name in ("to_v", "to_out"):
        getattr(ours, name).load_state_dict(getattr(theirs, name).state_dict())
    query, key = split_heads(theirs.to_q, theirs.to_k, theirs.heads, ours.heads)
    for layer, (weight, bias) in ((ours.to_q, query), (ours.to_k, key)):
        layer.weight.copy_(weight)
        layer.bias.copy_(bias)
    torch.nn.init.zeros_(ours.add_v_proj.weight)
    torch.nn.init.zeros_(ours.add_v_proj.bias)


def split_heads(
    query: torch.nn.Linear, key: torch.nn.Linear, wide: int, narrow: int
) -> tuple[tuple[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    """Split `wide` heads into `narrow` ones whose logits approximate theirs: ((query weight, bias), (key ...)).

    Weights are (width, input) and biases (width,), as in the layers. With `narrow == wide` the logits stay as they are.
    """
    width = query.out_features
    old_size, size, parts = width // wide, width // narrow, narrow // wide
    columns: list[torch.Tensor] = []
    rows: list[torch.Tensor] = []
    for head in range(wide):
        part = slice(head * old_size, (head + 1) * old_size)
        q = torch.cat([query.weight[part], query.bias[part, None]], 1).double()
        k = torch.cat([key.weight[part], key.bias[part, None]], 1).double()
        left, values, right = torch.linalg.svd(q.T @ k * (size / old_size) ** 0.5)
        for index in range(parts):
            chosen = _directions(index, parts, size, old_size)
            root = values[chosen].sqrt()
            columns.append((left[:, chosen] * root).T)
            rows.append(right[chosen] * root[:, None])
    q, k = torch.cat(columns).float(), torch.cat(rows).float()
    return (q[:, :-1], q[:, -1]), (k[:, :-1], k[:, -1])


def _directions(index: int, parts: int, size: int, total: int) -> list[int]:
    """The `size` singular directions of part `index`: the leading ones, then every `parts`-th of the rest."""
    if parts == 1:
        return list(range(total))
    shared = int(size * SHARED)
    return [*range(shared), *range(shared + index, total, parts)][:size]
