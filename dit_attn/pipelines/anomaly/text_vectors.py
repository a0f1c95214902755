"""Learned vectors that follow a prompt's own: where they start, and how they are appended."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dit_attn.pipelines.anomaly.backbone import Text


def prompt_vectors(text: Text, masked: str) -> torch.Tensor:
    """Return the vectors of one prompt's tokens, (tokens, width) in fp32 on the CPU.

    Args:
        text: of one prompt.
        masked: name of the text's mask, ``""`` for none.
    """
    vectors = text["prompt_embeds"][0].float().cpu()
    return vectors[text[masked][0].bool().cpu()] if masked else vectors


def first_vectors(
    rows: Sequence[torch.Tensor], tokens: int, mean: torch.Tensor, deviation: torch.Tensor, generator: torch.Generator
) -> torch.Tensor:
    """Repeat the vectors of every prompt to a number of tokens, normalized, each slightly different.

    Args:
        rows: what :func:`prompt_vectors` gave, by prompt.
        tokens: vectors wanted of each.
        mean, deviation: (width,), which the vectors are normalized by.
        generator: of the differences.

    Returns:
        (prompts, tokens, width).
    """
    out = []
    for vectors in rows:
        start = (vectors[torch.arange(tokens) % len(vectors)] - mean) / deviation
        out.append(start + 0.02 * torch.randn(start.shape, generator=generator))
    return torch.stack(out)


def appended(text: Text, masked: str, vectors: torch.Tensor) -> Text:
    """Append vectors (B, tokens, width) to the text of every sample.

    Args:
        text: of the samples.
        masked: name of the text's mask, ``""`` for none.
        vectors: to follow the prompt's own.
    """
    words = text["prompt_embeds"]
    out = {**text, "prompt_embeds": torch.cat([words, vectors.to(words)], 1)}
    if masked:
        exists = text[masked]
        out[masked] = torch.cat([exists, exists.new_ones(len(exists), vectors.shape[1])], 1)
    return out
