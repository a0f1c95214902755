"""The embedded models: what there is, how to load one, and how to call it."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_attn.errors import DitAttnError, require_torchvision, unknown

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class ModelInfo:
    """What `available` says about an embedded model.

    Args:
        name: what `load` takes.
        pipeline: the stock diffusers class.
        description: one line.
        tokens: image or video tokens per sample at the default size.
        call_defaults: keyword arguments that every call needs (size, steps, guidance, text length).
        example: a caption that works.
        world: what it was trained on: ``"shapes"``, ``"objects"`` (several different ones), ``"edits"`` (of those) or
            ``"inspection"``, all of `dit_attn.eval`.
    """

    name: str
    pipeline: str
    description: str
    tokens: int
    call_defaults: dict[str, Any]
    example: str
    world: str = "shapes"

    @property
    def folder(self) -> Path:
        """Path of the diffusers folder inside the package."""
        return WEIGHTS / self.name

    @property
    def size_bytes(self) -> int:
        """Size of the folder on disk in bytes; 0 when it is missing."""
        return sum(p.stat().st_size for p in self.folder.rglob("*") if p.is_file())

    @property
    def training(self) -> dict[str, Any]:
        """Content of `training.json`: recipe, seed, steps, hardware and figures of the weights; empty when missing."""
        path = self.folder / "training.json"
        return json.loads(path.read_text()) if path.is_file() else {}

    @property
    def steps_trained(self) -> int | None:
        """Optimizer steps behind the weights, those that a tail went on from included; `None` when not recorded."""
        record: dict[str, Any] | None = self.training
        if not record:
            return None
        steps = 0
        while record:
            steps += record["steps_done"]
            record = record.get("went_on_from")
        return steps


MODELS: dict[str, ModelInfo] = {
    "tiny-image": ModelInfo(
        name="tiny-image",
        pipeline="PixArtSigmaPipeline",
        description="text to image, 128 x 128 pixels, scenes of colored shapes",
        tokens=1024,
        call_defaults={
            "height": 128,
            "width": 128,
            "num_inference_steps": 20,
            "guidance_scale": 2.0,
            "use_resolution_binning": False,
            "clean_caption": False,
            "max_sequence_length": 16,
        },
        example="a large red circle at the left on white",
    ),
    "tiny-video": ModelInfo(
        name="tiny-video",
        pipeline="WanPipeline",
        description="text to video, 9 frames of 48 x 48 pixels, one moving colored shape",
        tokens=1296,
        call_defaults={
            "height": 48,
            "width": 48,
            "num_frames": 8,
            "num_inference_steps": 20,
            "guidance_scale": 2.0,
            "max_sequence_length": 16,
        },
        example="a large purple circle moving left fast on black",
    ),
    "tiny-joint": ModelInfo(
        name="tiny-joint",
        pipeline="StableDiffusion3Pipeline",
        description="text to image, 128 x 128 pixels, scenes of colored shapes, text and image in one attention",
        tokens=1024,
        call_defaults={
            "height": 128,
            "width": 128,
            "num_inference_steps": 20,
            "guidance_scale": 2.0,
            "max_sequence_length": 16,
        },
        example="a large red circle at the left on white",
    ),
    "tiny-inspect": ModelInfo(
        name="tiny-inspect",
        pipeline="PixArtSigmaPipeline",
        description="text to image, 64 x 64 pixels, products with defects",
        tokens=256,
        call_defaults={
            "height": 64,
            "width": 64,
            "num_inference_steps": 20,
            "guidance_scale": 2.0,
            "use_resolution_binning": False,
            "clean_caption": False,
            "max_sequence_length": 16,
        },
        example="metal with a scratch",
        world="inspection",
    ),
    "tiny-multi": ModelInfo(
        name="tiny-multi",
        pipeline="StableDiffusion3Pipeline",
        description="text to image, 128 x 128 pixels, scenes of one to four different objects",
        tokens=1024,
        call_defaults={
            "height": 128,
            "width": 128,
            "num_inference_steps": 20,
            "guidance_scale": 2.0,
            "max_sequence_length": 40,
        },
        example="a large red circle at the left and a small green cross at the right on white",
        world="objects",
    ),
    "tiny-edit": ModelInfo(
        name="tiny-edit",
        pipeline="OmniGenPipeline",
        description="image and instruction to image, 128 x 128 pixels, scenes of one to four different objects",
        tokens=64,
        call_defaults={
            "height": 128,
            "width": 128,
            "num_inference_steps": 20,
            "guidance_scale": 1.5,
            "img_guidance_scale": 1.0,
        },
        example="<img><|image_1|></img> make the circle red, remove the cross",
        world="edits",
    ),
}


def info(name: str) -> ModelInfo:
    """Return the entry of `name`.

    Raises:
        DitAttnError: no such embedded model.
    """
    if name not in MODELS:
        raise unknown("embedded model", name, MODELS)
    return MODELS[name]


def available() -> dict[str, ModelInfo]:
    """List every embedded model by name."""
    return dict(MODELS)


def call_defaults(name: str) -> dict[str, Any]:
    """Return the keyword arguments for a call of the pipeline `name`; override what you like and pass them on.

    `tiny-video` requests 8 frames and returns 9: `WanPipeline` adds one when the autoencoder keeps every frame.

    Raises:
        DitAttnError: no such embedded model.
    """
    return dict(info(name).call_defaults)


def load(name: str, dtype: Any = None) -> Any:
    """Load the embedded model `name` as a plain stock pipeline, on the CPU.

    Args:
        name: a key of `available()`.
        dtype: torch dtype of the weights; float32 when None (the files hold float16).

    Raises:
        DitAttnError: no such embedded model, a library that it needs, or its folder is missing or damaged.
    """
    import diffusers
    import torch

    entry = info(name)
    if not (entry.folder / "model_index.json").is_file():
        raise DitAttnError(
            f"the weights of {name!r} are missing from {entry.folder}; reinstall dit-attn, "
            f"or train them with `dit-attn train {name} --output {entry.folder}`"
        )
    require_torchvision(entry.pipeline)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning)
        pipeline_class = getattr(diffusers, entry.pipeline)
        try:
            pipeline = pipeline_class.from_pretrained(
                entry.folder, torch_dtype=dtype or torch.float32, local_files_only=True
            )
        except (OSError, ValueError, RuntimeError, KeyError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise DitAttnError(
                f"the weights of {name!r} in {entry.folder} cannot be read ({reason}); reinstall dit-attn"
            ) from error
    return pipeline
