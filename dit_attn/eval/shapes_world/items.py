"""Items of every kind of the shapes world: image scenes, videos, and scenes of several different objects.

A caption that two kinds can draw, such as "a large red circle at the left on white", is an image scene.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dit_attn.errors import DitAttnError
from dit_attn.eval.shapes_world import multi, world
from dit_attn.eval.shapes_world.multi_verify import verify_scene
from dit_attn.eval.shapes_world.verify import verify_image, verify_video

Item = world.Item | multi.MultiScene


def caption(item: Item) -> str:
    """Write `item` as one sentence; :func:`parse` inverts it."""
    return multi.caption(item) if isinstance(item, multi.MultiScene) else world.caption(item)


def parse(text: str) -> Item:
    """Return the item that `text` describes.

    Raises:
        DitAttnError: the text is no caption of any kind, or its objects do not fit together.
    """
    try:
        return world.parse(text)
    except DitAttnError:
        if not multi.is_caption(text):
            raise
    return multi.parse(text)


def never_seen(item: Item) -> bool:
    """Tell whether a (color, shape) pair of `item` is absent from all training captions."""
    return multi.never_seen(item) if isinstance(item, multi.MultiScene) else world.never_seen(item)


def held_out_sample(kind: str, count: int, seed: int = 0) -> Sequence[Item]:
    """Draw `count` different held-out items of `kind`, "image", "video" or "multi", in a seeded random order.

    Raises:
        DitAttnError: fewer exist.
    """
    return multi.held_out_sample(count, seed) if kind == "multi" else world.held_out_sample(kind, count, seed)


def verify(frames: Any, item: Item) -> dict[str, bool]:
    """Check which attributes of `item` a sequence of frames shows; one frame is an image.

    Raises:
        DitAttnError: no images.
    """
    if isinstance(item, world.VideoScene):
        return verify_video(frames, item)
    return verify_scene(frames[0], item) if isinstance(item, multi.MultiScene) else verify_image(frames[0], item)
