"""Positions of models that add a table of sines and cosines to their tokens: moved tokens get resampled rows of it.

A patch embedding adds a row of its table to every token, by the token's place. Between two rows the table is taken as
linear. What a model chose (size, crop, scale) need not be known: the table is what it makes of latents of zeros. An
input image that is embedded among the text has its own rows; moved tokens of it get those of the generated image.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from diffusers.models.embeddings import PatchEmbed
from diffusers.models.transformers.transformer_omnigen import OmniGenPatchEmbed

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach.rotary import maps_of, position_site
from dit_attn.processors.attach.session import Session
from dit_attn.processors.core.positions import PositionMap, displacement
from dit_attn.processors.core.tokens import EmbeddedImage, Span

Grid = tuple[int, int, int]
_EMBEDDINGS = ("pos_embed", "patch_embedding")


def position_table(model: torch.nn.Module) -> PatchEmbed | OmniGenPatchEmbed | None:
    """Return the patch embedding of a model that adds positions to its tokens, ``None`` where it has none."""
    for found in (getattr(model, name, None) for name in _EMBEDDINGS):
        if isinstance(found, OmniGenPatchEmbed):
            return found
        if isinstance(found, PatchEmbed) and found.pos_embed is not None and found.norm is None:
            return found
    return None


class TableHook:
    """Forward hook of a patch embedding: adds what the positions that the methods ask for change.

    Args:
        session: the session, ``None`` in a saved model that comes back without methods.
    """

    def __init__(self, session: Session | None) -> None:
        self.session = session

    def __deepcopy__(self, memo: dict[int, Any]) -> TableHook:
        return TableHook(copy.deepcopy(self.session, memo))

    def __reduce__(self) -> Any:
        return TableHook, (None,)

    @torch.compiler.disable
    def __call__(self, module: Any, args: tuple[Any, ...], output: Any) -> Any:
        """Return the embedded tokens (B, N, C), of a list of input images a list; the very same where nothing moves.

        Raises:
            DitAttnError: the grid of the tokens is not known.
        """
        session = self.session
        if session is None or session.detached:
            return output
        layout = session.layout
        spans = tuple(span for span in layout.spans if span.visual) if layout is not None else ()
        if isinstance(output, list):
            images = layout.embedded if layout is not None else ()
            return _moved_images(session, module, args[0], output, spans, images)
        maps, grids = _asked(session, spans)
        if not maps:
            return output
        if len(grids) != 1 or (number := _tokens_of(grids)) != output.shape[1]:
            raise DitAttnError("positions cannot be moved: the grid of the image tokens is not known in this call")
        places = _places(session, maps, grids, slice(0, number))
        return output if places is None else _resampled(module, output, args[0][:1], None, places)


def _moved_images(
    session: Session,
    module: Any,
    latents: Sequence[torch.Tensor],
    output: list[torch.Tensor],
    picture: tuple[Span, ...],
    images: Sequence[EmbeddedImage],
) -> list[torch.Tensor]:
    """The tokens of the input images, the moved ones with rows of the table of the generated image."""
    out = list(output)
    for row in sorted({image.row for image in images}):
        own = [at for at, image in enumerate(images) if image.row == row]
        spans = (*picture, *(Span("reference", images[at].stop - images[at].start, images[at].grid) for at in own))
        maps, grids = _asked(session, spans)
        start = _tokens_of(grids[:1])
        for at in own if maps else ():
            stop = start + output[at].shape[1]
            places = _places(session, maps, grids, slice(start, stop))
            if places is not None:
                _, height, width = (n * module.patch_size for n in grids[0])
                like = latents[at].new_zeros(1, latents[at].shape[1], height, width)
                out[at] = _resampled(module, output[at], latents[at], like, places)
            start = stop
    return out


def _asked(session: Session, spans: tuple[Span, ...]) -> tuple[tuple[PositionMap, ...], list[Grid]]:
    """What the methods ask for of visual tokens, and their grids; no map where one is not known."""
    layer = next(layer for layer in session.layers if layer.kind == "self")
    site = position_site(session, layer, spans)
    maps = maps_of(session, site, tables=True)
    return maps, [span.grid for span in site.visual if span.grid is not None]


def _tokens_of(grids: Sequence[Grid]) -> int:
    return sum(t * h * w for t, h, w in grids)


def _places(
    session: Session, maps: tuple[PositionMap, ...], grids: Sequence[Grid], part: slice
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Which tokens of a part of the visual ones move (N,) bool, and where to, (n, 2) h and w; ``None`` if none does."""
    axes = ([torch.arange(n, dtype=torch.float64) for n in grid] for grid in grids)
    coordinates = torch.cat([torch.cartesian_prod(*axis).reshape(-1, 3) for axis in axes])
    moved = displacement(maps, coordinates)
    rows = moved[part].any(1)
    if not rows.any():
        return None
    layer = next(layer for layer in session.layers if layer.kind == "self")
    layer.stats.moved.setdefault("; ".join(map(str, maps)), set()).add(session.clock.step)
    return rows, (coordinates + moved)[part][rows, 1:]


def _resampled(
    module: Any, output: torch.Tensor, latents: torch.Tensor, other: torch.Tensor | None, places: Any
) -> torch.Tensor:
    """Tokens of latents, the moved ones with rows of the table of other latents, or of their own."""
    rows, at = (x.to(output.device) for x in places)
    own = _table(module, latents)
    table = own if other is None else _table(module, other)
    out = output.clone()
    out[:, rows] += (resample(table, at) - own.flatten(0, 1)[rows]).to(output.dtype)
    return out


def _table(module: Any, latents: torch.Tensor) -> torch.Tensor:
    """The rows that a patch embedding adds to the tokens of latents, (H, W, C), with the bias of its projection."""
    size = latents.shape[-2] // module.patch_size
    with torch.no_grad():
        zeros = torch.zeros_like(latents)
        rows = module.forward(zeros, True) if isinstance(module, OmniGenPatchEmbed) else module.forward(zeros)
    return rows[0].float().unflatten(0, (size, -1))


def resample(table: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
    """Return rows of a table between its own, linear along both axes; places outside are at the nearest border.

    Args:
        table: (H, W, C).
        places: (n, 2), h and w in rows of the table.

    Returns:
        (n, C); at whole numbers the rows themselves.
    """
    ends = places.new_tensor([table.shape[0] - 1, table.shape[1] - 1])
    places = places.clamp(min=0.0).minimum(ends)
    low = places.floor()
    y, x = low.long().unbind(1)
    down, right = ((places - low).to(table.dtype)[:, axis, None] for axis in (0, 1))
    y_next, x_next = (y + 1).clamp(max=table.shape[0] - 1), (x + 1).clamp(max=table.shape[1] - 1)
    above = torch.lerp(table[y, x], table[y, x_next], right)
    return torch.lerp(above, torch.lerp(table[y_next, x], table[y_next, x_next], right), down)
