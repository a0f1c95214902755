"""A text encoder in which every token stays by itself, so that a changed word changes the rows of that word alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.clip.modeling_clip import CLIPTextModelOutput


class WordEncoder(torch.nn.Module):
    """Looks token ids up in a table; pooled results are 0, so that they carry no word."""

    def __init__(self, size: int, layers: int = 2, length: int = 1024) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(7)
        self.table = torch.nn.Parameter(torch.randn(1200, size, generator=generator), requires_grad=False)
        self.config = SimpleNamespace(
            hidden_size=size, d_model=size, num_hidden_layers=layers, max_position_embeddings=length
        )

    @property
    def dtype(self) -> torch.dtype:
        return self.table.dtype

    @property
    def device(self) -> torch.device:
        return self.table.device

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        hidden = self.table[input_ids]
        layers = (hidden,) * (self.config.num_hidden_layers + 1)
        return BaseModelOutputWithPooling(
            last_hidden_state=hidden, pooler_output=torch.zeros_like(hidden[:, 0]), hidden_states=layers
        )


class WordEncoderWithProjection(WordEncoder):
    """The same with pooled results first, as CLIP's with a projection."""

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        out = super().forward(input_ids)
        return CLIPTextModelOutput(
            text_embeds=out.pooler_output, last_hidden_state=out.last_hidden_state, hidden_states=out.hidden_states
        )
