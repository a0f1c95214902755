"""Input images as the pipelines take them: an argument of the call, or a list of images that the prompt speaks of."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from dit_attn.cli.jobs import Job
from dit_attn.errors import DitAttnError

_TAG = "<img><|image_1|></img>"  # OmniGen's place of an image in the text
_LISTED = "input_images"


def for_pipeline(job: Job, pipeline: Any, ranges: bool = False) -> Job:
    """Return a job whose input image is where a pipeline takes it.

    OmniGen takes a list of images, and its prompt says where they belong: in front, where the prompt does not.

    Args:
        job: its ``image`` is the path of a file.
        pipeline: the pipeline's class.
        ranges: whether pieces of the prompt are named by their characters, which text in front would shift.

    Raises:
        DitAttnError: there would be text in front of such pieces.
    """
    if "image" not in job.call or "image" in _parameters(pipeline) or _LISTED not in _parameters(pipeline):
        return job
    call = {key: value for key, value in job.call.items() if key != "image"}
    prompt = job.prompt if "<|image_1|>" in job.prompt else f"{_TAG} {job.prompt}"
    if ranges and prompt != job.prompt:
        raise DitAttnError(
            f"{pipeline.__name__} needs its image in the prompt, and pieces are given by their characters; write "
            f"{_TAG} where it belongs, or name pieces by their words"
        )
    return replace(job, prompt=prompt, call={**call, _LISTED: [job.call["image"]]})


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
