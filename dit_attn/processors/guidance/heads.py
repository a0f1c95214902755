"""Parse addresses of attention heads and resolve them to layers and heads of a transformer.

``"blocks.3.attn1:0,4,7"`` are three heads of one layer; ``"3:0-7"`` and ``"L3H0"`` count the layers from 0;
``"blocks.3"`` alone is the whole layer, ``"blocks.2-5.attn1"`` four of them, ``"*:0"`` head 0 of every layer;
``@0.5`` after an entry is the strength of its heads. Entries are separated by ``;``, line ends or blanks, or by a comma
before a name: ``"L14H7@0.5, L0H3"``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dit_attn import files
from dit_attn.errors import DitAttnError, shorten

Strengths = dict[str, dict[int, float]]  # layer -> head -> strength
_SHORT = re.compile(r"^L(\d+(?:-\d+)?)(?:H(\d+))?$")
_RANGE = re.compile(r"^(\d+)-(\d+)$")
_INSIDE = re.compile(r"\s*([:,@])\s*")  # blanks around these part no entries
_MOST = 99_999  # largest number accepted: a typing error must not fill the memory
_BETWEEN = re.compile(r"[;\s]+|,(?=[A-Za-z*])")
_GRAMMAR = "write 'blocks.3.attn1:0,4,7', '3:0-7', 'L3H4@0.5' or a layer alone, entries separated by ';'"


def canonical(heads: Any) -> str:
    """Return one canonical text for heads given in any form; the empty text for none.

    Args:
        heads: such a text; the number of a layer; ``{(layer, head): strength}``; pairs or triples
            ``(layer, head[, strength])``, where a head of ``None`` is the whole layer; or the path of a JSON file of
            :meth:`HeadHunter.search` or of such a list.

    Raises:
        DitAttnError: not an address of heads, or a strength is outside [0, 1].
    """
    if _is_file(heads):
        heads = _from_file(Path(heads))
    if isinstance(heads, Mapping):
        heads = [(*(key if isinstance(key, tuple) else (key, None)), u) for key, u in heads.items()]
    if isinstance(heads, int) and not isinstance(heads, bool):
        heads = str(heads)
    if isinstance(heads, str):
        entries = [entry for entry in _BETWEEN.split(_INSIDE.sub(r"\1", heads)) if entry]
        return ";".join(_text(*_entry(entry)) for entry in entries)
    if not isinstance(heads, Iterable):
        raise DitAttnError(f"heads {shorten(heads)} cannot be parsed; {_GRAMMAR}")
    return ";".join(_listed(item) for item in heads)


def resolve(heads: str, layers: Mapping[str, int | None], strength: float) -> Strengths:
    """Resolve an address on a transformer.

    Args:
        heads: canonical text.
        layers: name of every addressable layer, in order, with its number of heads (``None`` where unknown).
        strength: of entries that name none.

    Returns:
        Strength by layer and head, in the order of the layers; the last entry for a head wins, strength 0 is left out.

    Raises:
        DitAttnError: no such layer or head.
    """
    names = list(layers)
    found: Strengths = {}
    for entry in filter(None, heads.split(";")):
        layer, wanted, u = _entry(entry)
        for name in _layers(layer, names):
            count = layers[name]
            chosen = range(count or 0) if wanted is None else wanted
            if count is not None and (wrong := [head for head in chosen if head >= count]):
                raise DitAttnError(f"{name} has no head {wrong[0]}: its heads are 0 to {count - 1}; correct {entry!r}")
            if wanted is None and count is None:
                raise DitAttnError(f"the number of heads of {name} is unknown; name them, e.g. '{name}:0-7'")
            found.setdefault(name, {}).update(dict.fromkeys(chosen, strength if u is None else u))
    perturbed = {name: {h: u for h, u in sorted(found[name].items()) if u > 0} for name in names if name in found}
    return {name: values for name, values in perturbed.items() if values}


def address(strengths: Mapping[str, Mapping[int, float]]) -> str:
    """Return the canonical text of strengths by layer and head."""
    return ";".join(_text(layer, (head,), u) for layer, heads in strengths.items() for head, u in heads.items())


def _layers(wanted: str, names: list[str]) -> list[str]:
    """The layers an entry names: a number or a range of numbers, a path or a pattern of paths, or the path's start."""
    if wanted.isdecimal() or _RANGE.match(wanted):
        low, high = _bounds(wanted)
        if high >= len(names):
            raise DitAttnError(f"there is no layer {high}: this model has layers 0 to {len(names) - 1}")
        return names[low : high + 1]
    patterns = _spread(wanted)
    found = [name for name in names if any(fnmatchcase(name, p) or fnmatchcase(name, f"{p}.*") for p in patterns)]
    if not found:
        raise DitAttnError(
            f"no self or joint attention layer is called {wanted!r} (cross attention and linear attention have no "
            f"identity to blend with); this model has {names[0]} to {names[-1]}"
        )
    return found


def _spread(path: str) -> list[str]:
    """``blocks.2-4.attn`` as three paths."""
    paths = [""]
    for part in path.split("."):
        low, high = _bounds(part) if _RANGE.match(part) else (0, -1)
        parts = [str(n) for n in range(low, high + 1)] or [part]
        paths = [f"{start}.{end}" if start else end for start in paths for end in parts]
    return paths


def _entry(text: str) -> tuple[str, tuple[int, ...] | None, float | None]:
    """(layer, heads or ``None`` for all, strength or ``None``) of one entry."""
    where, _, strength = text.partition("@")
    short = _SHORT.match(where)
    layer, _, heads = where.partition(":")
    if short:
        layer, heads = short.group(1), short.group(2) or ""
    try:
        for part in filter(_RANGE.match, layer.split(".")):
            _bounds(part)
        chosen = numbers(heads)
        u = float(strength) if strength else None
    except ValueError:
        raise DitAttnError(f"heads {shorten(text)} cannot be parsed; {_GRAMMAR}") from None
    if not layer or (":" in where and not chosen) or ("@" in text and u is None):
        raise DitAttnError(f"heads {shorten(text)} cannot be parsed; {_GRAMMAR}")
    if u is not None and not 0.0 <= u <= 1.0:
        raise DitAttnError(f"a strength lies in [0, 1], got {u:g} in {text!r}; 0 leaves a head as it is, 1 replaces it")
    return layer, chosen or None, u


def numbers(text: str) -> tuple[int, ...]:
    """Return the numbers of a list such as ``"0,2-4"``.

    Raises:
        ValueError: no list of numbers and ranges.
    """
    bounds = [_bounds(part) for part in text.split(",") if part]
    return tuple(dict.fromkeys(n for low, high in bounds for n in range(low, high + 1)))


def _bounds(text: str) -> tuple[int, int]:
    match = _RANGE.match(text)
    low, high = (int(match.group(1)), int(match.group(2))) if match else (int(text), int(text))
    if not 0 <= low <= high <= _MOST:
        raise ValueError(text)
    return low, high


def _text(layer: str, heads: tuple[int, ...] | None, u: float | None) -> str:
    where = layer if heads is None else f"{layer}:{','.join(map(str, heads))}"
    return where if u is None else f"{where}@{repr(float(u)).removesuffix('.0')}"


def _listed(item: Any) -> str:
    """The text of one item of a list: a text, or a layer with a head and a strength."""
    if isinstance(item, str):
        return canonical(item)
    try:
        layer, head, strength = item if len(item) == 3 else (*item, None)
        text = _text(str(layer), None if head is None else (int(head),), None if strength is None else float(strength))
    except (TypeError, ValueError):
        raise DitAttnError(f"head {shorten(item)} cannot be parsed; {_GRAMMAR}") from None
    return canonical(text)


def origin(heads: Any) -> dict[str, Any]:
    """Return what a file of heads says of its search: ``transformer``, ``joint``, ``target``; empty without a file.

    Raises:
        DitAttnError: the file cannot be read.
    """
    if not _is_file(heads):
        return {}
    data = _read(Path(heads))
    known = ("transformer", "joint", "target")
    return {name: str(data[name]) for name in known if data.get(name)} if isinstance(data, dict) else {}


def _is_file(heads: Any) -> bool:
    return isinstance(heads, Path) or (isinstance(heads, str) and heads.strip().endswith(".json"))


def _from_file(path: Path) -> Any:
    """The list of heads in a JSON file: a list, or an object with it under ``heads``."""
    data = _read(path)
    heads = data.get("heads") if isinstance(data, dict) else data
    if not isinstance(heads, (list, str)) or not heads:
        raise DitAttnError(f"{path} holds no heads; give a file of `dit-attn search`, or a list of [layer, head] pairs")
    return heads


def _read(path: Path) -> Any:
    path = files.user_path(path, "heads")
    try:
        return files.parse_json(path.read_bytes())
    except OSError as error:
        raise DitAttnError(f"the head list {path} cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise DitAttnError(f"the head list {path} is not JSON ({error}); save it again") from error
