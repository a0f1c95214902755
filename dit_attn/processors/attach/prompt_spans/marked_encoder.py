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
        for marked, (row, places) in zip(marks, self._rows(input_ids.tolist())):
            row.encoder = self._name
            for at, (real, place) in enumerate(zip(row.real, places)):
                if real and 0 <= place < len(marked):
                    marked[place] = row.first + at
        config = getattr(self._stock.config, "text_config", self._stock.config)
        size = next((getattr(config, key) for key in ("hidden_size", "d_model") if hasattr(config, key)), 16)
        layers = next((getattr(config, key) for key in ("num_hidden_layers", "num_layers") if hasattr(config, key)), 32)
        pooled = type(self._stock).__name__.endswith("WithProjection")
        out = MarkedOutput(marks, max(1, size // 16), layers, pooled)
        self.results.append(out.last_hidden_state)
        return out

    def _rows(self, batch: list[list[int]]) -> Iterator[tuple[TokenRow, range | list[int]]]:
        """The rows of the tokenizer call that made a batch, and the places of their tokens in it."""
        calls = [rows for rows in reversed(self._log.calls) if len(rows) == len(batch)]
        if len(calls) == 0:  # one call per text
            flat = [row for rows in reversed(self._log.calls) for row in rows]
            calls = [[next((row for row in flat if row.ids == ids), flat[0]) for ids in batch]] if flat else []
        for rows in sorted(calls, key=lambda rows: len(rows[0].ids) != len(batch[0])):
            found = [(row, _places(row.ids, ids)) for row, ids in zip(rows, batch)]
            if all(places is not None for _, places in found):
                yield from ((row, places) for row, places in found if places is not None)
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


def _places(made: list[int], given: list[int]) -> list[int] | None:
    """Where tokens stand after a pipeline has cut some off, or put others at one place among them (padding, images).

    Returns:
        A place for every token, outside of the given ones for those that are cut off; ``None`` where these are others.
    """
    more = len(given) - len(made)
    if more < 0:
        shift = next((shift for shift in (0, more) if made[-shift : len(given) - shift] == given), None)
        return None if shift is None else [at + shift for at in range(len(made))]
    same = next((at for at, (a, b) in enumerate(zip(made, given)) if a != b), len(made))
    return [*range(same), *range(same + more, len(given))] if made[same:] == given[same + more :] else None
