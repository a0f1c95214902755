"""Text encoders that give every token a mark of its own, so that a pipeline itself shows where its tokens go."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach.prompt_spans.recorded_tokenizer import TokenLog, TokenRow


class MarkedEncoder:
    """Takes the place of a text encoder: all features of a token are its mark, those of padding 0.

    Its other attributes are those of the encoder that it stands for.

    Attributes:
        results: last hidden states (B, S, C) of every call.
    """

    dtype = torch.float32

    def __init__(self, name: str, stock: Any, log: TokenLog) -> None:
        self._name, self._stock, self._log = name, stock, log
        self.results: list[torch.Tensor] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stock, name)

    def __call__(self, input_ids: torch.Tensor, *args: Any, **kwargs: Any) -> MarkedOutput:
        """Encode token ids (B, S)."""
        marks = torch.zeros(input_ids.shape, dtype=torch.float32)
        for marked, (row, shift) in zip(marks, self._rows(input_ids.tolist())):
            row.encoder = self._name
            for at, real in enumerate(row.real):
                if real and 0 <= at + shift < len(marked):
                    marked[at + shift] = row.first + at
        config = getattr(self._stock.config, "text_config", self._stock.config)
        size = next((getattr(config, key) for key in ("hidden_size", "d_model") if hasattr(config, key)), 16)
        layers = next((getattr(config, key) for key in ("num_hidden_layers", "num_layers") if hasattr(config, key)), 32)
        pooled = type(self._stock).__name__.endswith("WithProjection")
        out = MarkedOutput(marks, max(1, size // 16), layers, pooled)
        self.results.append(out.last_hidden_state)
        return out

    def _rows(self, batch: list[list[int]]) -> Iterator[tuple[TokenRow, int]]:
        """The rows of the tokenizer call that made a batch, and by how much pipelines have shifted their tokens."""
        calls = [rows for rows in reversed(self._log.calls) if len(rows) == len(batch)]
        if len(calls) == 0:  # one call per text
            flat = [row for rows in reversed(self._log.calls) for row in rows]
            calls = [[next((row for row in flat if row.ids == ids), flat[0]) for ids in batch]] if flat else []
        for rows in sorted(calls, key=lambda rows: len(rows[0].ids) != len(batch[0])):
            shifts = [_shift(row.ids, ids) for row, ids in zip(rows, batch)]
            if all(shift is not None for shift in shifts):
                for row, shift in zip(rows, shifts):
                    assert shift is not None
                    yield row, shift
                return
        raise DitAttnError(f"{self._name} is given tokens that no tokenizer of the pipeline made")


class MarkedOutput:
    """Result of a :class:`MarkedEncoder`: hidden states (B, S, C) that are all alike, pooled ones of 0."""

    def __init__(self, marks: torch.Tensor, size: int, layers: int, pooled: bool) -> None:
        self.last_hidden_state = marks[..., None].repeat(1, 1, size)
        self.hidden_states = (self.last_hidden_state,) * (layers + 1)
        self.pooler_output = self.text_embeds = torch.zeros(len(marks), size)
        self._first = self.pooler_output if pooled else self.last_hidden_state

    def __getitem__(self, key: int | str) -> Any:
        return getattr(self, key) if isinstance(key, str) else (self._first, self.last_hidden_state)[key]


def _shift(made: list[int], given: list[int]) -> int | None:
    """By how much tokens stand further right than the tokenizer put them; ``None`` where they are other tokens."""
    for shift in (0, len(given) - len(made)):
        first, last = max(0, shift), min(len(given), len(made) + shift)
        if last > first and given[first:last] == made[first - shift : last - shift]:
            return shift
    return None
