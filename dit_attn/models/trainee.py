"""What is trained: a transformer and its text encoders, called as the stock pipelines call them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from dit_attn.models import nets
from dit_attn.models.recipe import NetSize


class Trainee(torch.nn.Module):
    """Transformer and text encoders, trained jointly.

    Args:
        family: "image" (PixArt, masked text), "video" (Wan, text zeroed where there is none), "joint" (SD3, text
            tokens in one sequence with the image's, no mask) or "edit" (OmniGen, which embeds text itself).
        tokenizer: its number of words is that of the text encoders.
        size: of the networks.
    """

    def __init__(self, family: str, tokenizer: Any, size: NetSize):
        super().__init__()
        self.family = family
        self.names = tuple(parts := nets.build_parts(family, len(tokenizer), size))
        for name, part in parts.items():
            self.add_module(name, part)

    @property
    def parts(self) -> dict[str, Any]:
        """Trained parts by their names in the pipeline."""
        return {name: getattr(self, name) for name in self.names}

    def forward(
        self,
        noisy: torch.Tensor,
        level: torch.Tensor,
        ids: torch.Tensor,
        mask: torch.Tensor,
        rest: dict[str, Any] | None = None,
    ) -> torch.Tensor:
        """Predict the clean sample, shaped like `noisy`, as the stock pipelines call the stock parts.

        Args:
            noisy, level, ids, mask: of a `dit_attn.models.data.Batch`.
            rest: other arguments of the transformer.
        """
        condition = {**CONDITIONS[self.family](self, ids, mask), **(rest or {})}
        transformer: Any = self.transformer
        return transformer(noisy, timestep=level * 1000, return_dict=False, **condition)[0]


def _image_condition(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    text = model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    sizes = {"resolution": None, "aspect_ratio": None}
    return {"encoder_hidden_states": text, "encoder_attention_mask": mask, "added_cond_kwargs": sizes}


def _video_condition(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    text = model.text_encoder(input_ids=ids, attention_mask=mask).last_hidden_state
    return {"encoder_hidden_states": text * mask[..., None]}


def _joint_condition(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    clip = model.text_encoder(ids, output_hidden_states=True)
    hidden, pooled = clip.hidden_states[-2], clip.text_embeds
    text = model.text_encoder_3(ids)[0]
    tokens = torch.cat([torch.cat([hidden, hidden], -1), text], 1)
    return {"encoder_hidden_states": tokens, "pooled_projections": torch.cat([pooled, pooled], -1)}


def _edit_condition(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
    return {"input_ids": ids, "attention_mask": mask}


CONDITIONS: dict[str, Callable[..., dict[str, Any]]] = {
    "image": _image_condition,
    "video": _video_condition,
    "joint": _joint_condition,
    "edit": _edit_condition,
}
