"""Shapes of known transformers that ship with the package, for public models that cannot be fetched."""

from __future__ import annotations

from typing import NamedTuple


class BuiltInShape(NamedTuple):
    """A known transformer.

    Attributes:
        config: name of its row in ``dit_attn.models.architectures``.
        title: the model as its makers write it.
        names: of the repositories on the Hub, lower case, without ``-diffusers``.
    """

    config: str
    title: str
    names: tuple[str, ...]


SHAPES = (
    BuiltInShape("wan2.1-1.3b", "Wan 2.1 1.3B", ("wan-ai/wan2.1-t2v-1.3b",)),
    BuiltInShape("wan2.1-14b", "Wan 2.1 14B", ("wan-ai/wan2.1-t2v-14b",)),
    BuiltInShape("hunyuan-video", "HunyuanVideo", ("tencent/hunyuanvideo", "hunyuanvideo-community/hunyuanvideo")),
    BuiltInShape("cogvideox-5b", "CogVideoX 5B", ("thudm/cogvideox-5b", "zai-org/cogvideox-5b")),
    BuiltInShape("flux", "FLUX.1", ("black-forest-labs/flux.1-dev", "black-forest-labs/flux.1-schnell")),
    BuiltInShape("pixart-sigma", "PixArt-Sigma", ("pixart-alpha/pixart-sigma-xl-2-1024-ms",)),
)


def built_in_shape(name: str) -> BuiltInShape | None:
    """Return the shape of a public model by its name on the Hub, ``None`` for others."""
    wanted = name.lower().removesuffix("-diffusers")
    return next((shape for shape in SHAPES if wanted in shape.names), None)
