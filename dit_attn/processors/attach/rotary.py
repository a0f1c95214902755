"""Give attention processors rotary tables at the positions that the methods ask for.

Processors get their tables as arguments, in one of a few forms. They are replaced before the processor runs, so that
stock, sparse, biased and perturbed calls all have the same positions. A table is shared by the layers of a forward;
so is the moved one, which lives no longer than the table it was made from.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import torch

from dit_attn.errors import DitAttnError
from dit_attn.processors.attach import compat
from dit_attn.processors.attach.families import Family
from dit_attn.processors.attach.session import Session
from dit_attn.processors.core.layer import Layer, layer_by_id
from dit_attn.processors.core.positions import PositionMap, PositionSite, band_weights, displacement
from dit_attn.processors.core.rotary import measure_grid, turn_tables
from dit_attn.processors.core.run_state import run_by_handle
from dit_attn.processors.core.sequence_parallel import Exchange, exchange_for
from dit_attn.processors.core.tokens import Span, TokenLayout, Tokens
from dit_attn.processors.methods.base import Method

ARGUMENTS = ("image_rotary_emb", "rotary_emb", "freqs_cis", "query_rotary_emb", "key_rotary_emb")
_KEPT = 4  # different sets of maps that one table is moved by, at a time
Parameters = tuple[tuple[str, int], ...]


def rotary_parameters(call: Callable[..., Any]) -> Parameters:
    """Return the parameters of a processor's ``__call__`` that take rotary tables, with their places after ``attn``."""
    names = list(inspect.signature(call).parameters)[2:]
    return tuple((name, names.index(name)) for name in ARGUMENTS if name in names)


def check_positions(model: Any, processors: Sequence[Any], family: Family) -> None:
    """Refuse a model whose layers get no rotary tables.

    Args:
        model: the transformer.
        processors: of its layers.
        family: its row.

    Raises:
        DitAttnError: they do not.
    """
    config = getattr(model, "config", {})
    without = [processor for processor in processors if not rotary_parameters(type(processor).__call__)]
    if without or not family.rotary or config.get("use_rotary_positional_embeddings") is False:
        raise DitAttnError(
            f"{type(model).__name__} gives {type((without or processors)[0]).__name__} no rotary tables: its positions "
            "are learned or added to the tokens and cannot be moved; remove the method or use another model"
        )


def moving_methods(session: Session) -> list[Method]:
    """Return the enabled methods of self attention that ask for positions."""
    return [method for method in cast(tuple[Method, ...], session.methods_for("self")) if method.moves_positions]


def moved_arguments(
    session: Session, layer: Layer, parameters: Parameters, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the arguments of a processor with its tables moved, the very same objects where nothing moves.

    Args:
        session: the session.
        layer: the layer.
        parameters: see :func:`rotary_parameters`.
        args, kwargs: arguments after ``attn``.

    Raises:
        DitAttnError: positions are asked for and cannot be moved in this call.
    """
    given = list(args)
    replaced = {}
    found = False
    for name, place in parameters:
        value = given[place] if place < len(given) else kwargs.get(name)
        if value is None:
            continue
        found = True
        form, leaves = _flatten(value)
        if torch.compiler.is_compiling():
            moved = torch.ops.dit_attn.move_positions(layer.handle, session.handle, leaves, form)
        else:
            moved = _move(session, layer, leaves, form)
        if moved is leaves:
            continue
        if place < len(given):
            given[place] = _rebuild(form, moved)
        else:
            replaced[name] = _rebuild(form, moved)
    if not found:
        _check_absent(session, layer)
    return tuple(given), {**kwargs, **replaced}


@torch.compiler.disable
def _check_absent(session: Session, layer: Layer) -> None:
    layout = session.layout_of(layer)
    site = position_site(session, layer, layout.spans if layout is not None else ())
    if maps_of(session, site):
        raise DitAttnError(f"positions cannot be moved: {layer.name} was given no rotary tables in this call")


def _flatten(value: Any) -> tuple[str, list[torch.Tensor]]:
    """Form and tensors of an argument.

    Forms: ``real`` (cos, sin), ``complex``, ``matrix`` (..., 2, 2) rotations, ``angles`` (..., 1, columns) in radians,
    ``halves`` (..., 2 x columns) cosines and sines in one table, ``shared`` (a complex table for queries and keys, by
    these names), ``pair`` (complex tables of the visual tokens and of the text), ``visual`` ((cos, sin) of the visual
    tokens, the same of the text or None), ``streams`` (cos and sin of the text, cos and sin of the visual tokens),
    ``axes`` (((cos, sin) per axis and coordinate), (coordinates of the tokens per axis)).
    """
    if isinstance(value, torch.Tensor):
        if value.is_complex():
            return "complex", [value]
        if value.shape[-2:] == (2, 2):
            return "matrix", [value]
        if value.is_floating_point() and value.ndim > 2 and value.shape[-2] == 1:
            return "angles", [value]
        if value.is_floating_point() and value.ndim == 3:
            return "halves", [value]
    elif isinstance(value, dict):
        if value.keys() == {"query", "key"} and value["query"] is value["key"] and value["key"].is_complex():
            return "shared", [value["key"]]
    elif isinstance(value, tuple) and len(value) == 4 and all(isinstance(part, torch.Tensor) for part in value):
        return "streams", [value[2], value[3], value[0], value[1]]
    elif isinstance(value, (tuple, list)) and len(value) == 2:
        first, second = value
        if isinstance(first, tuple) and len(first) == 2 and all(isinstance(part, torch.Tensor) for part in first):
            return "visual", [*first, *(second or ())]
        if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
            if first.is_complex() and second.is_complex():
                return "pair", [first, second]
            if first.shape == second.shape and not first.is_complex():
                return "real", [first, second]
        elif len(first) == len(second):
            return "axes", [table for pair in first for table in pair] + list(second)
    raise DitAttnError("positions cannot be moved: the rotary tables of this model have an unknown form")


def _rebuild(form: str, leaves: list[torch.Tensor]) -> Any:
    """The argument that :func:`_flatten` took apart."""
    if form in ("complex", "matrix", "angles", "halves"):
        return leaves[0]
    if form == "streams":
        return leaves[2], leaves[3], leaves[0], leaves[1]
    if form == "visual":
        return (leaves[0], leaves[1]), tuple(leaves[2:]) or None
    if form == "shared":
        return {"query": leaves[0], "key": leaves[0]}
    if form == "axes":
        count = len(leaves) // 3
        return tuple((leaves[2 * i], leaves[2 * i + 1]) for i in range(count)), tuple(leaves[2 * count :])
    return tuple(leaves)


@torch.library.custom_op("dit_attn::move_positions", mutates_args=())
def _move_positions(
    layer: torch.Tensor, run: torch.Tensor, leaves: list[torch.Tensor], form: str
) -> list[torch.Tensor]:
    """Tables of one layer of a compiled model; ``run`` orders the call after the forward hook, which writes to it."""
    moved = _move(cast(Session, run_by_handle(run)), layer_by_id(int(layer)), leaves, form)
    return [leaf.clone() for leaf in (_per_token(leaves, form) if moved is leaves else moved)]


@_move_positions.register_fake
def _(layer: torch.Tensor, run: torch.Tensor, leaves: list[torch.Tensor], form: str) -> list[torch.Tensor]:
    return [torch.empty_like(leaf) for leaf in _per_token(leaves, form)]


def _per_token(leaves: list[torch.Tensor], form: str) -> list[torch.Tensor]:
    """Tables with a row for every token: those of the form ``axes`` have one for every coordinate."""
    if form != "axes":
        return leaves
    *tables, t, h, w = leaves
    places = (t, h, w)
    rows = [table[places[i // 2].flatten()[: t.shape[-1]]] for i, table in enumerate(tables)]
    return rows + [torch.arange(t.shape[-1], device=t.device).expand_as(place).clone() for place in places]


@dataclass
class _Moved:
    """The moved tables of one table: the tensors it came with, what it was moved for, and the result, if it moved."""

    others: tuple[weakref.ref[torch.Tensor], ...]
    versions: tuple[int, ...]
    layout: TokenLayout | None
    maps: tuple[PositionMap, ...]
    leaves: list[torch.Tensor] | None


def _move(session: Session, layer: Layer, leaves: list[torch.Tensor], form: str) -> list[torch.Tensor]:
    """Return the tables at the positions that the methods ask for, ``leaves`` itself where nothing moves."""
    place = _find_tokens(session, layer, leaves, form)
    layout = session.layout_of(layer)
    known = place.tokens.spans if place.tokens is not None else layout.spans if layout is not None else ()
    maps = maps_of(session, position_site(session, layer, known))
    if not maps:
        return leaves
    if place.tokens is None:
        raise DitAttnError(
            f"positions cannot be moved in {layer.name}: {place.reason}; remove the method that asks for it"
        )
    kept = session.moved_tables.setdefault(leaves[0], [])
    versions = tuple(0 if leaf.is_inference() else leaf._version for leaf in leaves)
    for entry in kept:
        if (
            all(ref() is leaf for ref, leaf in zip(entry.others, leaves[1:]))
            and (entry.versions, entry.layout) == (versions, layout)
            and len(entry.maps) == len(maps)
            and all(a.same(b) for a, b in zip(entry.maps, maps))
        ):
            moved = entry.leaves
            break
    else:
        moved = _moved(session, leaves, form, place, place.tokens, maps)
        del kept[: max(0, len(kept) + 1 - _KEPT)]
        kept.append(_Moved(tuple(map(weakref.ref, leaves[1:])), versions, layout, maps, moved))
    if moved is None:
        return leaves
    layer.stats.moved.setdefault("; ".join(map(str, maps)), set()).add(session.clock.step)
    return moved


@dataclass
class _Place:
    """Where the tokens are in a table: their axis, the full sequence that the table has rows for, or why not known."""

    axis: int = 0
    tokens: Tokens | None = None
    exchange: Exchange | None = None
    reason: str = "its token layout is unknown"


def _find_tokens(session: Session, layer: Layer, leaves: list[torch.Tensor], form: str) -> _Place:
    """Find the axis that can be the tokens', the longest of several; some tables leave the text out."""
    layout = session.layout_of(layer)
    if layout is None:
        return _Place(reason=session.layout_error or _Place.reason)
    try:
        mesh = compat.ulysses_mesh(getattr(session.module(layer).processor, "_parallel_config", None))
    except NotImplementedError as error:
        return _Place(reason=str(error))
    layout = layout.entering
    shape = leaves[-1].shape[-1:] if form == "axes" else leaves[0].shape[: -3 if form == "matrix" else -1]
    world = 1 if mesh is None else mesh.size()
    fitting = [(length, -axis) for length, axis in zip(shape, range(len(shape))) if _has_grid(layout, length * world)]
    if not fitting:
        return _Place()
    length, axis = max(fitting)
    try:
        exchange = None if mesh is None else exchange_for(mesh, layout, length)
    except NotImplementedError as error:
        return _Place(reason=str(error))
    return _Place(-axis, layout.resolve(length * world), exchange)


def _has_grid(layout: TokenLayout, length: int) -> bool:
    tokens = layout.resolve(length)
    return tokens is not None and bool(tokens.visual)


def _moved(
    session: Session,
    leaves: list[torch.Tensor],
    form: str,
    place: _Place,
    tokens: Tokens,
    maps: tuple[PositionMap, ...],
) -> list[torch.Tensor] | None:
    """The moved tables, ``None`` where no token moves."""
    full, exchange = _per_token(leaves, form), place.exchange
    tables = [table.movedim(place.axis, 0) for table in _cos_sin(full, form)]
    shape = tables[0].shape
    cos, sin = (table.reshape(shape[0], -1) for table in tables)
    if exchange is not None:
        cos, sin = exchange.gather_tokens(cos, 0), exchange.gather_tokens(sin, 0)
    given = session.family.rotary_frequencies
    found = measure_grid(cos, sin, tokens, None if given is None else given(session.model, tokens.grid))
    delta = displacement(maps, found.coordinates)
    if not delta.any():
        return None
    weights = band_weights(maps, found.frequencies)
    if weights is not None:
        found = replace(found, frequencies=found.frequencies * weights)
    turned = turn_tables(cos, sin, found, delta)
    if exchange is not None:
        turned = exchange.own_tokens(turned[0], 0), exchange.own_tokens(turned[1], 0)
    cos, sin = (x.reshape(shape).movedim(0, place.axis).contiguous() for x in turned)
    if form == "angles":
        before, stock = full[0].cos(), full[0].sin()
        return [full[0] + torch.atan2(sin * before - cos * stock, cos * before + sin * stock)]
    if form in ("real", "visual", "streams"):
        return [cos, sin, *leaves[2:]]
    if form == "halves":
        return [torch.cat([cos, sin], -1)]
    if form == "axes":
        count = 2 * len(full) // 3
        widths = [table.shape[-1] for table in full[:count:2]]
        pairs = zip(cos.split(widths, -1), sin.split(widths, -1))
        return [part.contiguous() for pair in pairs for part in pair] + full[count:]
    if form == "matrix":
        return [torch.stack([cos, -sin, sin, cos], -1).unflatten(-1, (2, 2))]
    return [torch.complex(cos, sin), *leaves[1:]]


def _cos_sin(leaves: list[torch.Tensor], form: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of the visual tokens' table, (..., tokens, ..., columns)."""
    if form in ("real", "visual", "streams"):
        return leaves[0], leaves[1]
    if form == "halves":
        cos, sin = leaves[0].chunk(2, -1)
        return cos, sin
    if form == "matrix":
        return leaves[0][..., 0, 0], leaves[0][..., 1, 0]
    if form == "angles":
        return leaves[0].cos(), leaves[0].sin()
    if form == "axes":
        count = 2 * len(leaves) // 3
        return torch.cat(leaves[0:count:2], -1), torch.cat(leaves[1:count:2], -1)
    return leaves[0].real, leaves[0].imag


def position_site(session: Session, layer: Layer, spans: Sequence[Span]) -> PositionSite:
    """Return where positions are asked for in a layer, given the spans of its sequence."""
    visual, start = [], 0
    for span in spans:
        if span.visual:
            visual.append(Span(span.kind, span.length, span.grid, start))
            start += span.length or 0
    branches = session.rows_by_branch()
    return PositionSite(layer, tuple(visual), session.clock, branches, session.layer_count, session.pass_name)


def maps_of(session: Session, site: PositionSite, tables: bool = False) -> tuple[PositionMap, ...]:
    """Return the maps that the methods ask for, in the order in which they are enabled.

    Args:
        session: the session.
        site: where.
        tables: only those of methods that resample the tables that a model adds to its tokens.
    """
    methods = [method for method in moving_methods(session) if method.resamples_tables or not tables]
    asked = [method.positions(site) for method in methods]
    flat = [(item,) if isinstance(item, PositionMap) else item or () for item in asked]
    return tuple(item for maps in flat for item in maps if item.moves)
