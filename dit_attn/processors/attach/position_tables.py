"""Positions of models that add a table of sines and cosines to their tokens: moved tokens get resampled rows of it.

A patch embedding adds a row of its table to every token, by the token's place. Between two rows the table is taken as
linear. What a model chose (size, crop, scale) need not be known: the table is what it makes of latents of zeros.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.models.embeddings import PatchEmbed

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach.rotary import maps_of, position_site
from dit_attn.processors.attach.session import Session
from dit_attn.processors.core.positions import displacement


def position_table(model: torch.nn.Module) -> PatchEmbed | None:
    """Return the patch embedding of a model that adds positions to its tokens, ``None`` where it has none."""
    found = getattr(model, "pos_embed", None)
    return found if isinstance(found, PatchEmbed) and found.pos_embed is not None and found.norm is None else None


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
    def __call__(self, module: Any, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        """Return the embedded tokens (B, N, C), the very same tensor where nothing moves.

        Raises:
            DitAttnError: the grid of the tokens is not known.
        """
        session = self.session
        if session is None or session.detached:
            return output
        layer = next(layer for layer in session.layers if layer.kind == "self")
        site = position_site(session, layer, session.layout.spans if session.layout is not None else ())
        maps = maps_of(session, site)
        if not maps:
            return output
        if site.grid is None or site.num_tokens != output.shape[1]:
            raise DitAttnError("positions cannot be moved: the grid of the image tokens is not known in this call")
        coordinates = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in site.grid)).reshape(-1, 3)
        moved = displacement(maps, coordinates)
        rows = moved.any(1)
        if not rows.any():
            return output
        layer.stats.moved.setdefault("; ".join(map(str, maps)), set()).add(session.clock.step)
        with torch.no_grad():
            table = module.forward(torch.zeros_like(args[0][:1]))[0].float()  # with the bias of the projection
        places = (coordinates + moved)[rows, 1:].to(table.device)
        at = rows.to(table.device)
        shift = resample(table.unflatten(0, site.grid[1:]), places) - table[at]
        out = output.clone()
        out[:, at] += shift.to(output.dtype)
        return out


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
