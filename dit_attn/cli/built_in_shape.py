"""Shapes of known transformers that ship with the package, for public models that cannot be fetched."""

from __future__ import annotations

from typing import NamedTuple


class BuiltInShape(NamedTuple):
    """A known transformer.

    Attributes:
        config: name of its row in ``dit_attn.models.architectures``.
        title: the model as its makers write it.
        names: of the repositories on the Hub; the first is the one to name.
    """

    config: str
    title: str
    names: tuple[str, ...]

    @property
    def example(self) -> str:
        """A repository with this transformer."""
        return self.names[0]


SHAPES = (
    BuiltInShape("wan2.1-1.3b", "Wan 2.1 1.3B", ("Wan-AI/Wan2.1-T2V-1.3B-Diffusers", "Wan-AI/Wan2.1-T2V-1.3B")),
    BuiltInShape("wan2.1-14b", "Wan 2.1 14B", ("Wan-AI/Wan2.1-T2V-14B-Diffusers", "Wan-AI/Wan2.1-T2V-14B")),
    BuiltInShape("hunyuan-video", "HunyuanVideo", ("hunyuanvideo-community/HunyuanVideo", "tencent/HunyuanVideo")),
    BuiltInShape("cogvideox-5b", "CogVideoX 5B", ("zai-org/CogVideoX-5b", "THUDM/CogVideoX-5b")),
    BuiltInShape("flux", "FLUX.1", ("black-forest-labs/FLUX.1-dev", "black-forest-labs/FLUX.1-schnell")),
    BuiltInShape("pixart-sigma", "PixArt-Sigma", ("PixArt-alpha/PixArt-Sigma-XL-2-1024-MS",)),
    BuiltInShape("ltx-video", "LTX-Video", ("Lightricks/LTX-Video",)),
    BuiltInShape("qwen-image-2.1", "Qwen-Image 2.1", ("Qwen/Qwen-Image-2.1",)),
    BuiltInShape("krea-2", "Krea 2", ("krea/Krea-2-Raw", "krea/Krea-2-Turbo")),
    BuiltInShape("minimax-h3", "MiniMax-H3", ("MiniMaxAI/MiniMax-H3",)),
    BuiltInShape("cosmos-3", "Cosmos 3 Nano", ("nvidia/Cosmos3-Nano",)),
)


def built_in_shape(name: str) -> BuiltInShape | None:
    """Return the shape of a public model by its name on the Hub, or by that of its row; ``None`` for others."""
    wanted = name.lower()
    return next((one for one in SHAPES if wanted in (one.config, *map(str.lower, one.names))), None)
