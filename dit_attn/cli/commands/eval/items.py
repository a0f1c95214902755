"""Metrics of ``dit-attn eval`` that judge a file by itself: motion, and what the shapes world knows of its images."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from dit_attn.errors import DitAttnError

Figure = dict[str, Any]


def temporal(folder: Any, reference: Any) -> Figure:
    """Measure how smooth the motion of videos is: 1 is steady, below 0 is flicker.

    Raises:
        DitAttnError: a file has fewer than three frames.
    """
    from dit_attn.eval import fidelity

    short = [n for n, frames in zip(folder.names, folder.frames) if len(frames) < 3]
    if short:
        count = f"{len(short)} of {len(folder.names)} files have fewer, first {short[0]}"
        raise DitAttnError(f"temporal needs videos of at least 3 frames, {count}; leave them or the metric out")
    values = [fidelity.temporal_consistency(frames) for frames in folder.frames]
    return _figure("temporal", values, better="higher")


def judged(folder: Any) -> list[dict[str, bool] | None]:
    """Verdict of every file, ``None`` where the caption does not belong to the shapes world."""
    from dit_attn.pipelines.compare.statistics import verify_caption

    return [
        None if caption is None else verify_caption(_pixels(frames), caption)
        for frames, caption in zip(folder.frames, folder.captions)
    ]


def verifier(folder: Any, reference: Any) -> Figure:
    """Share of files that meet their caption, and of each attribute.

    Raises:
        DitAttnError: no caption is one of the shapes world.
    """
    verdicts = judged(folder)
    if not any(verdicts):
        raise DitAttnError(
            "verifier needs captions of the shapes world (dit_attn.eval.shapes_world.world); these are none"
        )
    found = [one for one in verdicts if one is not None]
    figure = _figure("prompt met", [all(one.values()) for one in found], better="higher")
    without = [name for name, one in zip(folder.names, verdicts) if one is None]
    return {**figure, "by": _by(found), **_unjudged(without, "no caption to judge by")}


def artifact_rate(folder: Any, reference: Any) -> Figure:
    """Count images (of a video, its frames) with colors, shapes or pixels that the shapes world does not have.

    Raises:
        DitAttnError: all files have captions of something else.
    """
    from dit_attn.eval.shapes_world.artifacts import artifacts
    from dit_attn.pipelines.compare.defects import is_world_caption

    ours = [caption is None or is_world_caption(caption) for caption in folder.captions]
    if not any(ours):
        raise DitAttnError("artifact-rate knows images of the shapes world only; these captions are of none")
    judged_frames = [[artifacts(frame) for frame in _pixels(frames)] for frames, our in zip(folder.frames, ours) if our]
    found = [{name: _mean([one[name] for one in frames]) for name in frames[0]} for frames in judged_frames]
    values = [_mean([any(one.values()) for one in frames]) for frames in judged_frames]
    without = [name for name, our in zip(folder.names, ours) if not our]
    label = "artifact-rate (verifier of the shapes world)"
    return {**_figure(label, values), "by": _by(found), **_unjudged(without, "captions of no world")}


def perimeter(folder: Any, reference: Any) -> Figure:
    """Length of the objects' outlines over that of the best-fitting drawings (``shapes_world.outline``): 1 is smooth.

    Raises:
        DitAttnError: all files have captions of something else, or no object was found.
    """
    return _outline("perimeter", "", folder)


def edge_width(folder: Any, reference: Any) -> Figure:
    """Width of the objects' edges in pixels (``shapes_world.outline``): drawn ones have 1.

    Raises:
        DitAttnError: all files have captions of something else, or no object was found.
    """
    return _outline("edge-width", "px, ", folder)


def _outline(name: str, unit: str, folder: Any) -> Figure:
    """One figure of :func:`mean_outline`, mean over the files that have objects of the shapes world."""
    from dit_attn.eval.shapes_world.outline import mean_outline
    from dit_attn.pipelines.compare.defects import is_world_caption

    ours = [caption is None or is_world_caption(caption) for caption in folder.captions]
    if not any(ours):
        raise DitAttnError(f"{name} knows images of the shapes world only; these captions are of none")
    values = [mean_outline(_pixels(frames))[name] if our else None for frames, our in zip(folder.frames, ours)]
    without = [one for one, value in zip(folder.names, values) if value is None]
    if len(without) == len(values):
        raise DitAttnError(f"{name} found no object on a plain background in any of {len(values)} files")
    figure = _figure(f"{name} ({unit}1 = drawn)", [value for value in values if value is not None])
    return {**figure, **_unjudged(without, "captions of no world, or no object")}


def detail(folder: Any, reference: Any) -> Figure:
    """Share of textured objects whose fill and period of 8 pixels are right (``shapes_world.fills``).

    Raises:
        DitAttnError: no caption has a fill of the shapes world.
    """
    from dit_attn.eval.shapes_world import multi, multi_verify

    scenes = [multi.parse(text) if text and multi.is_caption(text) else None for text in folder.captions]
    values = [
        None if scene is None else multi_verify.detail(_pixels(frames)[0], scene)
        for frames, scene in zip(folder.frames, scenes)
    ]
    if all(value is None for value in values):
        raise DitAttnError("detail needs captions of the shapes world with a fill, such as striped; these have none")
    without = [name for name, value in zip(folder.names, values) if value is None]
    figure = _figure("detail (fills of the shapes world)", [x for x in values if x is not None], better="higher")
    return {**figure, **_unjudged(without, "captions without a fill")}


def saturation(folder: Any, reference: Any) -> Figure:
    """Share of over-saturated pixels among the colored ones, mean over the files (``eval.artifacts.oversaturated``).

    A file whose caption is of the shapes world, and every file when there is no reference, is compared with the world's
    palette; the others against the image of their name in the reference.

    Raises:
        DitAttnError: files of another caption, and no reference that has one of their names.
    """
    from dit_attn.pipelines.compare import defects

    references = {} if reference is None else dict(zip(reference.names, reference.frames))
    values, without, palette = [], [], 0
    for name, frames, caption in zip(folder.names, folder.frames, folder.captions):
        by_palette = defects.is_world_caption(caption) or (reference is None and caption is None)
        if not by_palette and name not in references:
            without.append(name)
            continue
        palette += by_palette
        values.append(defects.saturation(_pixels(frames), None if by_palette else _pixels(references[name]), caption))
    if not values:
        raise DitAttnError(
            "saturation needs captions of the shapes world, or a --reference with files of the same names; these "
            "captions are of something else"
        )
    against = [defects.PALETTE] * (palette > 0) + ["against the reference"] * (palette < len(values))
    return {**_figure(f"saturation ({', '.join(against)})", values), **_unjudged(without, "no reference of that name")}


ITEM_METRICS: dict[str, Callable[[Any, Any], Figure]] = {
    "temporal": temporal,
    "verifier": verifier,
    "saturation": saturation,
    "artifact-rate": artifact_rate,
    "perimeter": perimeter,
    "edge-width": edge_width,
    "detail": detail,
}


def _pixels(frames: Any) -> Any:
    """(F, H, W, 3) uint8 array."""
    return frames.permute(0, 2, 3, 1).numpy()


def _mean(values: list[bool]) -> float:
    return sum(values) / len(values)


def _figure(label: str, values: list[Any], better: str = "lower") -> Figure:
    from dit_attn.pipelines.compare.statistics import mean_figure

    figure = mean_figure(values) or {}
    return {"label": label, "better": better, "samples": len(values), **figure}


def _by(found: list[dict[str, Any]]) -> dict[str, Any]:
    from dit_attn.pipelines.compare.statistics import mean_figure

    return {name: mean_figure([one.get(name) for one in found]) for name in dict.fromkeys(n for o in found for n in o)}


def _unjudged(names: list[str], need: str) -> Figure:
    return {"unjudged": names, "need": need} if names else {}


def report_skipped(skipped: list[tuple[str, str]]) -> None:
    """Name on standard error what could not be read, with their number when it takes more than a glance to count."""
    for file, why in skipped:
        print(f"dit-attn: left out {file}: {why}", file=sys.stderr)
    if len(skipped) > 1:
        print(f"dit-attn: {len(skipped)} files left out", file=sys.stderr)
