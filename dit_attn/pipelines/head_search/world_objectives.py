"""Objectives for captions of the shapes world: its verifier, its CLIP model, and distances to the drawn caption."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import torch

from dit_attn.errors import DitAttnError
from dit_attn.eval.shapes_world import world
from dit_attn.eval.shapes_world.world_clip import WorldFeatures, load
from dit_attn.pipelines.compare import statistics
from dit_attn.pipelines.compare.set_distances import frechet_distance
from dit_attn.pipelines.head_search.clip_objectives import cosine_objective, world_clip_pixels
from dit_attn.pipelines.head_search.objective import Objective, ScorerOptions, score_arrays


def verifier(options: ScorerOptions, by_attribute: bool) -> Objective:
    """Return the verifier of the shapes world as an objective.

    Args:
        options: not used.
        by_attribute: score the fraction of attributes that are right; otherwise 1 where the full prompt is followed.
    """
    name = "verifier" if by_attribute else "verifier-whole"
    unit = "share of attributes right" if by_attribute else "share of prompts followed"
    return Objective(name, partial(_verify, by_attribute), "verifier of the shapes world", unit)


def _verify(by_attribute: bool, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
    verdicts = [statistics.verify_caption(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    wrong = next((prompt for prompt, verdict in zip(prompts, verdicts) if verdict is None), None)
    if wrong is not None:
        raise DitAttnError(
            f"{wrong!r} cannot be verified: the verifier reads captions of the shapes world, scenes for images and "
            "moving shapes for videos; choose another objective or other prompts"
        )
    return [
        float(np.mean(list(verdict.values())) if by_attribute else all(verdict.values()))
        for verdict in verdicts
        if verdict is not None
    ]


def clip_world(options: ScorerOptions) -> Objective:
    """Return 100 x cosine of image and caption by the CLIP model of the shapes world."""
    model, processor = load()
    return cosine_objective(
        "clip-world", "world-clip", model.to(options.device), processor, options.device, world_clip_pixels
    )


def fid_world(options: ScorerOptions) -> Objective:
    """Return minus the FID of all images together, in features of the shapes world's CLIP model.

    The reference is ``options.reference``, or the captions, drawn.
    """
    network = WorldFeatures().to(options.device)
    drawn: dict[tuple[str, ...], torch.Tensor] = {}

    def features(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([network(part.to(options.device)).double().cpu() for part in images.split(32)])

    def score(images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        frames = torch.cat([torch.from_numpy(image).permute(0, 3, 1, 2) for image in images])
        if len(frames) < 2:
            raise DitAttnError("fid-world compares sets of images; give at least 2 --pairs")
        key = tuple(prompts)
        if key not in drawn:
            reference = options.reference
            drawn[key] = features(reference if reference is not None else draw_captions(images, prompts, "fid-world"))
        return [-frechet_distance(features(frames), drawn[key])]

    return Objective("fid-world", score, network.name, "- FID", of_set=True)


def drawn_world(options: ScorerOptions) -> Objective:
    """Return minus the distance of the image and of its drawn caption, in features of the shapes world's CLIP model."""
    network = WorldFeatures().to(options.device)

    def features(frames: torch.Tensor) -> torch.Tensor:
        values = world_clip_pixels(frames.to(options.device, torch.float32))
        return network.vision(pixel_values=values).pooler_output

    def pixels(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        count, _, height, width = images.shape[1:]
        blank = [np.zeros((count, height, width, 3), dtype=np.uint8)] * len(prompts)
        with torch.no_grad():
            wanted = features(draw_captions(blank, prompts, "drawn-world") / 255.0)
        return -(features(images.flatten(0, 1)) - wanted).norm(dim=-1).unflatten(0, images.shape[:2]).mean(1)

    score = torch.no_grad()(partial(score_arrays, pixels))
    unit = "- distance of the features of the image and of the drawn caption"
    return Objective("drawn-world", score, network.name, unit, pixels=pixels)


def draw_captions(images: Sequence[np.ndarray], prompts: Sequence[str], objective: str) -> torch.Tensor:
    """Draw captions of the shapes world at the sizes of images, uint8 (N, 3, H, W), N the number of all frames.

    Args:
        images: (F, H, W, 3) each.
        prompts: captions.
        objective: name for the error.

    Raises:
        DitAttnError: a prompt is no caption of the shapes world.
    """
    parts = []
    for image, prompt in zip(images, prompts, strict=True):
        try:
            item = world.parse(prompt)
        except DitAttnError as error:
            other = "; or give --reference DIR" if objective == "fid-world" else ""
            raise DitAttnError(f"{objective} draws its prompts, and {error}{other}") from error
        count, height, width = image.shape[:3]
        if isinstance(item, world.VideoScene):
            frames = world.render_videos([item], count, height, width)[0].transpose(0, 1)
        else:
            frames = world.render_scenes([item], height, width)
        parts.append((frames * 255).round().to(torch.uint8))
    return torch.cat(parts)
