"""The table of model families: attention layers, token layout and guidance of each transformer, as data.

A row names the attention layers that can be wrapped, the forward arguments that determine the token layout, the order
of the parts of the sequence, and how the family's pipelines do guidance. ``docs/extend/add_a_family.md`` shows how to
write one.
"""

from __future__ import annotations

import fnmatch
import importlib
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.core.cfg import SEPARATE, CFGRule
from dit_attn.processors.core.tokens import TokenLayout

LayoutFunction = Callable[[Any, dict[str, Any]], TokenLayout]
Axis = int | Literal["list"] | None
_TABLES = ("video", "conditioned_video", "packed_image", "image", "fewer_queries", "refused")


@dataclass(frozen=True)
class Family:
    """One row of the table.

    Attributes:
        name: short name, e.g. ``"wan"``.
        models: names users know, for the printed table.
        transformers: class names of the transformers (exact).
        layers: shell patterns of the module paths of self and joint attention layers that can be wrapped.
        side_layers: the same of self attention in a branch next to the stack of blocks; methods apply there, guidance
            and twin passes do not change it. They are numbered after the layers of the stack.
        cross_layers: the same of the layers whose keys are the text.
        added_calls: kinds of the attention calls of a cross-attention layer, in order, where it attends to more than
            the text: by the name of the layer's attribute that is not ``None`` then.
        forward_args: names of the transformer's forward arguments the layout needs (``timestep`` is always taken).
        layout: ``layout(config, values) -> TokenLayout``; the only code of a row.
        cfg: how its pipelines do classifier-free guidance.
        timestep: name of the forward argument with the time step.
        latents: name of the forward argument with the latents.
        single: whether a call is of one sample, without a batch axis: no rows can be added to it.
        time_grows: whether that argument rises during a run.
        mask_rule: ``"key"``: masks are per key; ``"visual-row"``: a square mask whose visual rows are all alike.
        cached_keys: number of tokens in a cache of keys, by the forward argument that is one; a layout gets the number.
        between_steps: the reason why a call with some arguments is no step of the run, or ``None``; stock then.
        batch_axes: forward arguments whose batch is not the first axis, with that axis; ``None`` for arguments all rows
            share, ``"list"`` for lists with an entry per row, whatever their size.
        block_chain: whether a block depends on earlier ones by its inputs alone (no long skips).
        rotary: whether its layers get rotary tables, where their processors could take some.
        rotary_frequencies: ``rotary_frequencies(model, (T, H, W))`` gives the (3, K) radians per token along t, h, w of
            the columns of its rotary tables, where each turns along several axes; ``None`` where they are measured.
        packing: side of the square of latents that its pipelines pack into one vector before the transformer.
        latent_pixels: side in pixels of a latent, where no pipeline says it.
        latent_frames: frames that a latent frame stands for, after the first, likewise.
        chunk_frames: frames after which one stands for itself again; 0: only the first does.
        pads: whether a size that is no multiple of a token's is padded up.
        refused_methods: reasons why single methods cannot be enabled, by slug.
        refused: reason why no method can be enabled on the family's self attention, or ``None``.
    """

    name: str
    models: str
    transformers: tuple[str, ...]
    layers: tuple[str, ...]
    forward_args: tuple[str, ...]
    layout: LayoutFunction = field(repr=False)
    cross_layers: tuple[str, ...] = ()
    side_layers: tuple[str, ...] = ()
    added_calls: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    cfg: CFGRule = SEPARATE
    timestep: str = "timestep"
    latents: str = "hidden_states"
    single: bool = False
    time_grows: bool = False
    mask_rule: str = "key"
    cached_keys: Mapping[str, Callable[[Any], int]] = field(default_factory=dict)
    between_steps: Callable[[dict[str, Any]], str | None] = lambda values: None
    batch_axes: Mapping[str, Axis] = field(default_factory=dict)
    block_chain: bool = True
    rotary: bool = True
    rotary_frequencies: Callable[[Any, Any], torch.Tensor] | None = None
    packing: int = 1
    latent_pixels: int = 8
    latent_frames: int = 4
    chunk_frames: int = 0
    pads: bool = False
    refused_methods: Mapping[str, str] = field(default_factory=dict)
    refused: str | None = None

    @property
    def text_kind(self) -> str:
        """Kind of the attention calls whose keys are or contain the text."""
        return "cross" if self.cross_layers else "self"

    def shown(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return forward arguments with the number of tokens in the place of every cache of keys."""
        sizes = {name: arguments.get(name) for name in self.cached_keys}
        return arguments | {name: None if c is None else self.cached_keys[name](c) for name, c in sizes.items()}

    def is_side(self, layer: str) -> bool:
        """Return whether a layer, by its module path, is in a branch next to the stack of blocks."""
        return any(fnmatch.fnmatchcase(layer, pattern) for pattern in self.side_layers)

    def calls_of(self, layer: Any) -> tuple[str, ...]:
        """Return the kinds of the attention calls of a cross-attention layer, in order."""
        found = (calls for name, calls in self.added_calls.items() if getattr(layer, name, None) is not None)
        return next(found, ("cross",))


def families() -> tuple[Family, ...]:
    """Return every row, video families first and those that are refused altogether last."""
    tables = (importlib.import_module(f"{__name__}.{table}") for table in _TABLES)
    return tuple(row for table in tables for row in table.FAMILIES)


def family_of(model: Any, kinds: Collection[str] = ("self",)) -> Family:
    """Return the row of a transformer, by the exact name of its class or of a base class.

    Args:
        model: the transformer.
        kinds: kinds of attention calls that are wanted.

    Raises:
        DitAttnError: no row, or a row that is refused; the message says why.
    """
    rows = {name: row for row in families() for name in row.transformers}
    row = next((rows[base.__name__] for base in type(model).__mro__ if base.__name__ in rows), None)
    if row is None:
        raise DitAttnError(
            f"{type(model).__name__} is not a supported transformer; supported families: "
            f"{', '.join(sorted({row.name for row in rows.values() if not row.refused}))}. "
            "docs/extend/add_a_family.md shows how to add one"
        )
    if row.refused and ("self" in kinds or not row.cross_layers):
        raise DitAttnError(f"{type(model).__name__} cannot take attention methods: {row.refused}")
    return row
