"""Attention to pieces of the prompt: where their words are, and maps of what they get, layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.core.call import AttentionCall, Request
from dit_attn.processors.core.observation import Observation
from dit_attn.processors.core.tokens import Span


@dataclass(frozen=True)
class Spoken:
    """The pieces in the keys of a call.

    Attributes:
        rows: pieces of the prompt of every batch row.
        words: (B, Sk) bool, keys of every piece; no key is of two pieces of a row.
    """

    rows: tuple[tuple[str, ...], ...]
    words: dict[str, torch.Tensor]


@dataclass
class PieceMaps:
    """What is known of the pieces of one sample.

    Attributes:
        pieces: pieces of its prompt, n.
        grid: (T, H, W), N tokens.
        logs: (n,) logarithms of the factors that act at this step; ``None`` for none.
        masks: (n, N) bool, their regions.
        mass: (n, N) attention to every piece, heads averaged, summed over the layers of this step.
        rival: (N,) the same for the reference.
        layers: how many layers.
        counts: (n,) number of tokens of every piece.
    """

    pieces: tuple[str, ...]
    grid: tuple[int, int, int]
    logs: torch.Tensor | None = None
    masks: torch.Tensor | None = None
    mass: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    rival: torch.Tensor | None = None
    layers: int = 0
    counts: torch.Tensor = field(default_factory=lambda: torch.ones(1))

    def clear(self) -> None:
        """Begin another step."""
        self.mass, self.rival, self.layers = torch.zeros(0), None, 0

    def add(self, mass: torch.Tensor, counts: Sequence[int], unscale: bool, rival: bool) -> None:
        """Add one layer.

        Args:
            mass: (H, N, n or n + 1) shares of the attention, that of the reference last.
            counts: tokens of every piece.
            unscale: whether the factors that act are taken out of it.
            rival: whether there is a reference.
        """
        n = len(self.pieces)
        if unscale and self.logs is not None and self.masks is not None:
            mass = unscaled(mass, (self.logs[:, None] * self.masks).T.to(mass))
        mean = mass.mean(0).T.cpu()
        self.mass = mean[:n] + self.mass if self.layers else mean[:n]
        if rival:
            self.rival = mean[n] if self.rival is None else self.rival + mean[n]
        self.counts = torch.tensor([float(max(1, count)) for count in counts])
        self.layers += 1


def unscaled(mass: torch.Tensor, logs: torch.Tensor) -> torch.Tensor:
    """Return shares of the attention as they would be without factors on some of them.

    Args:
        mass: (H, N, m) shares of groups of keys; what is left of 1 is a group without a factor.
        logs: (N, n) logarithms of the factors of the first n groups.
    """
    logs = torch.nn.functional.pad(logs, (0, mass.shape[-1] - logs.shape[-1]))
    plain = mass * torch.exp(-logs)
    rest = (1.0 - mass.sum(-1, keepdim=True)).clamp(min=0.0)
    return plain / (plain.sum(-1, keepdim=True) + rest).clamp(min=1e-30)


def find_pieces(
    call: AttentionCall, rows: Sequence[tuple[str, ...]], on_lost: Callable[[str], None] | None = None
) -> Spoken:
    """Return where the pieces of every batch row are among the keys of a call.

    Args:
        call: the call.
        rows: pieces of every row; a token that two of them share is of the first.
        on_lost: called with a piece that has no tokens, which is an error without it.

    Raises:
        DitAttnError: as for :meth:`AttentionCall.prompt_tokens`, without ``on_lost``.
    """
    found: dict[str, torch.Tensor] = {}
    taken = torch.zeros(call.k.shape[:2], dtype=torch.bool)
    for piece in dict.fromkeys(piece for row in rows for piece in row):
        try:
            words = call.prompt_tokens(piece).cpu() & ~taken
        except DitAttnError:
            if on_lost is None:
                raise
            on_lost(piece)  # cut off by the length of the text, most often
            continue
        words[[at for at, row in enumerate(rows) if piece not in row]] = False
        taken |= words
        found[piece] = words
    spoken = tuple(
        tuple(piece for piece in row if piece in found and bool(found[piece][at].any())) for at, row in enumerate(rows)
    )
    return Spoken(spoken, {piece: words.to(call.k.device) for piece, words in found.items()})


def observe_pieces(
    call: AttentionCall,
    request: Request,
    spoken: Spoken,
    maps_of: Callable[[int, tuple[str, ...]], PieceMaps],
    unscale: bool = False,
    rival: torch.Tensor | None = None,
) -> None:
    """Add a call's attention to the pieces, in the rows of the conditional branch, to the maps of their samples.

    Args:
        call: the call; the grid of its image or video is known.
        request: its request.
        spoken: the pieces.
        maps_of: returns the maps of a sample, given its number and its pieces.
        unscale: see :meth:`PieceMaps.add`.
        rival: (B, Sk) bool, keys whose share is added too, in the rows that have some.
    """
    assert call.tokens is not None
    names, picture = list(spoken.words), generated_span(call)
    spans = [*spoken.words.values(), *([rival] if rival is not None else ())]
    against = [False] * len(call.branches) if rival is None else rival.any(1).tolist()

    def add(found: Observation) -> None:
        mass = found.row_mass[:, :, picture.start : picture.stop]  # (B, H, N, n)
        for row, (branch, number) in enumerate(zip(call.branches, call.samples)):
            pieces = spoken.rows[row]
            if branch == "cond" and pieces:
                chosen = [names.index(piece) for piece in pieces] + [len(names)] * against[row]
                counts = [int(spoken.words[piece][row].sum()) for piece in pieces]
                maps_of(number, pieces).add(mass[row][..., chosen].float(), counts, unscale, against[row])

    request.observe(add, spans, ())


def reference_keys(call: AttentionCall, number: int = 1) -> torch.Tensor | None:
    """Return which keys are tokens of a reference image, (B, Sk) bool; ``None`` where no row has any.

    Args:
        call: the call; the parts of its sequence are known.
        number: of the image, from 1; 0 for all of them.
    """
    assert call.tokens is not None
    if call.kind != "self":
        return None
    chosen = slice(None) if number == 0 else slice(number - 1, number)
    out = torch.zeros(call.k.shape[:2], dtype=torch.bool, device=call.k.device)
    for at, row in enumerate(out):
        for span in call.tokens.references(call.layer.rows[0] + at)[chosen]:
            row[span.start : span.stop] = True
    return out if bool(out.any()) else None


def generated_span(call: AttentionCall) -> Span:
    """Return the span of the generated image or video of a call that has one."""
    assert call.tokens is not None
    return next(span for span in call.tokens.visual if span.kind != "reference")
