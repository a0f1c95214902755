"""Input images as the pipelines take them: an argument of the call, or a list of images that the prompt speaks of."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dit_attn.cli.jobs import Job
from dit_attn.errors import DitAttnError

_TAG = "<img><|image_{}|></img>"  # OmniGen's place of an image in the text
_LISTED = "input_images"
# Pipelines that take a list as several images of one prompt; others take it as one image for each of several prompts.
TAKE_SEVERAL = (
    "BriaFibo2Pipeline",
    "BriaFiboEditPipeline",
    "Flux2KleinKVPipeline",
    "Flux2KleinPipeline",
    "Flux2Pipeline",
    "GlmImagePipeline",
    "QwenImageEditPlusPipeline",
    "ZImageOmniPipeline",
)


def for_pipeline(job: Job, pipeline: Any, ranges: bool = False) -> Job:
    """Return a job whose input images are where a pipeline takes them.

    OmniGen takes a list of images, and its prompt says where they belong: in front, where the prompt does not.

    Args:
        job: its ``image`` is the path of a file, or a list of such paths.
        pipeline: the pipeline's class.
        ranges: whether pieces of the prompt are named by their characters, which text in front would shift.

    Raises:
        DitAttnError: there would be text in front of such pieces, or several images for a pipeline that takes one.
    """
    if "image" not in job.call:
        return job
    paths = [given] if isinstance(given := job.call["image"], str) else given
    if "image" in _parameters(pipeline) or _LISTED not in _parameters(pipeline):
        if len(paths) > 1 and pipeline.__name__ not in TAKE_SEVERAL:
            raise DitAttnError(f"{pipeline.__name__} takes one input image, got {len(paths)}; give one ({job.where})")
        return job
    call = {key: value for key, value in job.call.items() if key != "image"}
    absent = [number for number in range(1, len(paths) + 1) if f"<|image_{number}|>" not in job.prompt]
    tags = "".join(_TAG.format(number) for number in absent)
    if ranges and tags:
        raise DitAttnError(
            f"{pipeline.__name__} needs its image in the prompt, and pieces are given by their characters; write "
            f"{tags} where it belongs, or name pieces by their words"
        )
    return replace(job, prompt=f"{tags} {job.prompt}" if tags else job.prompt, call={**call, _LISTED: paths})


def check_images_given(jobs: Sequence[Job]) -> None:
    """Refuse items without an input image.

    Raises:
        DitAttnError: one has none.
    """
    bare = next((job for job in jobs if not job.images()), None)
    if bare is not None:
        raise DitAttnError(f"no image to change ({bare.where}); give --image FILE, or an image in every line")


def check_edits(pipeline: Any, name: str) -> None:
    """Refuse a pipeline that takes no input image.

    Args:
        pipeline: its class.
        name: of the model.

    Raises:
        DitAttnError: so it is.
    """
    if not {"image", _LISTED} & set(_parameters(pipeline)):
        raise DitAttnError(
            f"{pipeline.__name__} of {name} takes no input image, so that it cannot edit one; take an editing model, "
            "such as black-forest-labs/FLUX.1-Kontext-dev or Qwen/Qwen-Image-Edit"
        )


def _parameters(pipeline: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(pipeline.__call__).parameters)
