"""Load a class-to-image DiT with routed heads (MoH-DiT, arXiv 2410.11842) in the layout of its release.

The layers of these models have different numbers of heads, which stock diffusers has no configuration for: a
``DiTTransformer2DModel`` is built and the attention of its blocks replaced. The fused ``attn.qkv`` (q, k, v, then head,
then channel) becomes ``to_q``, ``to_k`` and ``to_v``; ``wg_1``, ``wg`` and ``wg_0`` become the shared, routed and
two-stage maps of the router.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dit_attn import files
from dit_attn.api import disable, enable
from dit_attn.errors import DitAttnError, cut
from dit_attn.processors.attach.session import Session
from dit_attn.processors.methods.moh import MoH

MOH_DIT = {
    "XL/2-90": ((8, 8, 0),) * 9 + ((16, 16, 0),) * 10 + ((24, 16, 3),) * 9,
    "XL/2-75": ((8, 8, 0),) * 9 + ((16, 10, 2),) * 10 + ((24, 14, 2),) * 9,
    "L/2-90": ((8, 8, 0),) * 8 + ((16, 16, 0),) * 8 + ((24, 16, 3),) * 8,
    "L/2-75": ((8, 8, 0),) * 8 + ((16, 8, 4),) * 8 + ((24, 12, 4),) * 8,
    "B/2-90": ((12, 6, 4),) * 5 + ((12, 7, 4),) * 5 + ((12, 12, 0),) * 2,
    "B/2-75": ((12, 4, 2),) * 2 + ((12, 6, 3),) * 8 + ((12, 12, 0),) * 2,
    "S/2-90": ((6, 3, 2),) * 8 + ((6, 6, 0),) * 4,
    "S/2-75": ((6, 2, 1),) * 2 + ((6, 3, 1),) * 4 + ((6, 3, 2),) * 4 + ((6, 6, 0),) * 2,
}
"""(heads, shared, active routed) of every layer of the released models, by size and percentage of active heads."""
XL_2_90 = MOH_DIT["XL/2-90"]
"""Of the model whose weights are published: 403 of 448 heads are active."""

_BLOCK = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
_OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
_EMBEDDINGS = {  # of which diffusers has a copy in every block
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
_ROUTERS = {"wg": "routed", "wg_1": "shared", "wg_0": "stage"}
_FIXED = ("pos_embed.pos_embed",)


def moh_transformer(
    layers: Sequence[tuple[int, int, int]] = XL_2_90, *, heads: int = 16, head_dim: int = 72, **config: Any
) -> Any:
    """Return a ``DiTTransformer2DModel`` whose layers have different numbers of heads, with random weights.

    Args:
        layers: (heads, shared, active routed) of every layer.
        heads, head_dim: their product is the model's width.
        config: further arguments of ``DiTTransformer2DModel``.
    """
    from diffusers import DiTTransformer2DModel

    defaults = {"out_channels": 8, "sample_size": 32}
    model: Any = DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=head_dim, num_layers=len(layers), **{**defaults, **config}
    )
    for block, (count, _, _) in zip(model.transformer_blocks, layers):
        if count != heads:
            block.attn1 = type(block.attn1)(
                query_dim=heads * head_dim, heads=count, dim_head=head_dim, bias=True, out_bias=True
            )
    return model


def load_moh_state(model: Any, file: str | Path, layers: Sequence[tuple[int, int, int]] = XL_2_90) -> Session:
    """Load a released checkpoint into a transformer of :func:`moh_transformer`, and enable its routers.

    Args:
        model: the transformer.
        file: safetensors, or a state dict without code in it; with the weights alone, or under ``"ema"`` or
            ``"model"``.
        layers: as it was made with.

    Returns:
        The session of :class:`~dit_attn.MoH`.

    Raises:
        DitAttnError: no file of weights, a tensor that is missing, unknown, of another shape or not finite; nothing is
            loaded then.
    """
    path = files.user_path(file, "the checkpoint")
    if not path.is_file():
        raise DitAttnError(f"{path}: there is no such file; check the path")
    state: dict[str, Any] = files.read_weights(path)
    state = next((state[key] for key in ("ema", "model") if isinstance(state.get(key), dict)), state)
    weights, routers = _mapped(state, len(layers))
    own = model.state_dict()
    for key in sorted({*own, *weights}):
        if key not in _FIXED:
            _check(path, key, weights.get(key), own.get(key))
    session = enable(model, MoH(layers=tuple((shared, active) for _, shared, active in layers)))
    (child,) = session.learned.methods
    learned = session.learned.get_submodule(child).state_dict()
    try:
        for key in sorted({*learned, *routers}):
            _check(path, key, routers.get(key), learned.get(key))
    except DitAttnError:
        disable(model)
        raise
    with torch.no_grad():
        for key, x in [*own.items(), *learned.items()]:
            if key not in _FIXED:
                x.copy_(weights[key] if key in own else routers[key])
    return session


def _mapped(state: dict[str, Any], count: int) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Weights by the names of diffusers, and those of the routers by layer and name; names that are unknown stay."""
    weights: dict[str, torch.Tensor] = {}
    routers: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        stem, _, ending = key.rpartition(".")
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)", stem)
        if key == "pos_embed":  # fixed, made anew
            continue
        if stem in _OUTER:
            weights[f"{_OUTER[stem]}.{ending}"] = value
        elif stem in _EMBEDDINGS:
            weights |= {f"transformer_blocks.{n}.{_EMBEDDINGS[stem]}.{ending}": value for n in range(count)}
        elif match and match[2] == "attn.qkv":
            for name, part in zip("qkv", value.chunk(3)):
                weights[f"transformer_blocks.{match[1]}.attn1.to_{name}.{ending}"] = part
        elif match and match[2] in _BLOCK:
            weights[f"transformer_blocks.{match[1]}.{_BLOCK[match[2]]}.{ending}"] = value
        elif match and match[2].removeprefix("attn.") in _ROUTERS and ending == "weight":
            routers[f"transformer_blocks.{match[1]}.attn1.{_ROUTERS[match[2].removeprefix('attn.')]}"] = value
        else:
            weights[key] = value
    return weights, routers


def _check(path: Path, key: str, given: Any, own: torch.Tensor | None) -> None:
    """Refuse a tensor that cannot become one of ours."""
    if own is None or not isinstance(given, torch.Tensor):
        what = "is missing" if own is not None else "is no tensor of this model"
    elif given.shape != own.shape:
        what = f"is {tuple(given.shape)} and must be {tuple(own.shape)}"
    elif not bool(torch.isfinite(given.float()).all()):
        what = "has values that are not finite"
    else:
        return
    raise DitAttnError(f"{path}: {cut(key, 100)} {what}; give a MoH-DiT checkpoint of these layers")
