"""Transformers of diffusers that no method can be enabled on, each with the reason."""

from __future__ import annotations

from typing import Any

from dit_attn.processors.attach.families import Family
from dit_attn.processors.core.tokens import TokenLayout

_NO_GRID = "there is no image or video grid"
_BLOCK_MASKS = "it hands FlexAttention block masks that say which frames attend to which"
_NO_ROW = "there is no row for it yet"


def _unknown(config: Any, values: dict[str, Any]) -> TokenLayout:
    raise ValueError("a refused family has no token layout")


def _refused(name: str, models: str, reason: str, *transformers: str) -> Family:
    return Family(name, models, transformers, layers=(), forward_args=(), layout=_unknown, refused=reason)


FAMILIES = (
    _refused(
        "joyimage-edit-plus",
        "JoyImage-Edit-Plus",
        f"{_NO_ROW}: padding stands between its images and the text",
        "JoyImageEditPlusTransformer3DModel",
    ),
    _refused("anyflow-far", "AnyFlow FAR (causal)", _BLOCK_MASKS, "AnyFlowFARTransformer3DModel"),
    _refused("wan-animate-2", "Wan Animate 2", _BLOCK_MASKS, "WanAnimate2Transformer3DModel"),
    _refused(
        "sana-wm",
        "Sana-WM, its LTX-2 refiner",
        "three of four of its layers are linear attention, and its refiner attends to cached keys",
        "SanaWMTransformer3DModel",
        "SanaWMLTX2RefinerTransformer3DModel",
    ),
    _refused(
        "kandinsky-6-sr",
        "Kandinsky 6 super-resolution",
        "its attention is sparse already (NABLA)",
        "Kandinsky6SRTransformer3DModel",
    ),
    _refused(
        "latte",
        "Latte",
        "its frames are rows of the batch, so that no attention call sees the video",
        "LatteTransformer3DModel",
    ),
    _refused(
        "sound",
        "ACE-Step, Stable Audio, LongCat-Audio, MiniMax Music 3, Spectrogram Diffusion",
        f"it makes sound: {_NO_GRID}",
        "AceStepTransformer1DModel",
        "LongCatAudioDiTTransformer",
        "MiniMaxMusic3RVQDepthDecoder",
        "MiniMaxMusic3Transformer1DModel",
        "StableAudio3DiTModel",
        "StableAudioDiTModel",
        "T5FilmDecoder",
    ),
    _refused("proteina", "RFD4 Proteina", f"it makes proteins: {_NO_GRID}", "RFD4ProteinaTransformer"),
    _refused(
        "part",
        "Transformers inside UNets and priors",
        "it is a part of a UNet or of a prior, not a diffusion transformer",
        "DreamLiteTransformer2DModel",
        "PriorTransformer",
        "Transformer2DModel",
        "TransformerTemporalModel",
    ),
)
