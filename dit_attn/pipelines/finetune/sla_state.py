"""Load the projections of SLA checkpoints of other projects, TurboDiffusion's among them, into an enabled pipeline.

There a self-attention module of block N has a linear layer ``proj_l``, under names such as
``blocks.N.self_attn.attn_op.local_attn.proj_l.weight``. Weights of the transformer itself are not read here: convert
them as the checkpoint's own project says, and load them as any other transformer.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from dit_attn import files
from dit_attn.errors import DitAttnError, cut
from dit_attn.processors.attach.session import Session

_NAME = re.compile(r"(?:.*\.)?(?:transformer_)?blocks\.(\d+)\.(?:.*\.)?proj_l\.(weight|bias)")


def load_sla_state(session: Session, file: str | Path) -> int:
    """Copy the projections of a checkpoint into those of the enabled ``SLA``.

    These checkpoints were tuned with ``linear_domain="all"`` and 128 x 64 tokens per block; enable the method so.

    Args:
        session: what ``enable(pipe, SLA(...))`` returned.
        file: safetensors, or a state dict without code in it.

    Returns:
        Number of layers.

    Raises:
        DitAttnError: no file of weights, no projections, not those of as many layers, or of another shape; nothing is
            copied then.
    """
    path = files.user_path(file, "the checkpoint")
    if not path.is_file():
        raise DitAttnError(f"{path}: there is no such file; check the path")
    modules = _projections(session)
    found = _mapped(files.read_weights(path), path)
    if sorted(found) != list(range(len(modules))):
        raise DitAttnError(
            f"{path} has projections of {len(found)} layers and the transformer has {len(modules)}; give the "
            "checkpoint of this model"
        )
    for index, module in enumerate(modules):
        for name, own in module.named_parameters():
            given = found[index].get(name)
            if given is None or given.shape != own.shape:
                what = "is missing" if given is None else f"is {tuple(given.shape)} and must be {tuple(own.shape)}"
                raise DitAttnError(f"{path}: the {name} of block {index} {what}; give the checkpoint of this model")
            if not bool(torch.isfinite(given.float()).all()):
                raise DitAttnError(f"{path}: the {name} of block {index} is not finite; download it again")
    with torch.no_grad():
        for index, module in enumerate(modules):
            for name, own in module.named_parameters():
                own.copy_(found[index][name])
    return len(modules)


def _projections(session: Session) -> list[Any]:
    """The projection of every layer, in order."""
    learned = next((m for m in session.methods if m.slug == "sla" and m.learns), None)
    layers = [layer.learned.get(id(learned)) for layer in session.layers if layer.kind == "self"]
    if learned is None or not layers or None in layers:
        raise DitAttnError("the projections are those of SLA with combine='projection'; enable it first")
    return layers


def _mapped(state: dict[str, Any], path: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Projections by block and name."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for key, value in state.items():
        match = _NAME.fullmatch(str(key))
        if match and isinstance(value, torch.Tensor):
            found.setdefault(int(match[1]), {})[match[2]] = value
    if not found:
        first = cut(str(next(iter(state), "nothing")), 60)
        raise DitAttnError(
            f"{path} has no projections (blocks.N. ... .proj_l.weight), it has {first}; give a checkpoint tuned with "
            "SLA"
        )
    return found
