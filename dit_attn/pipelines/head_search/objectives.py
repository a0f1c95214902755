"""What a search for heads tries to raise: scores of pictures or clips, higher is better.

An objective is any callable ``(images, prompts) -> scores``: images are uint8 arrays (F, H, W, 3), one frame for a
picture, and there is one score for each. The built-in ones say by whom they judge, and those of CLIP's kind can also be
differentiated, which the gradient ranking needs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_attn.errors import DitAttnError, unknown
from dit_attn.eval.shapes_world import world
from dit_attn.eval.shapes_world.world_clip import SIZE, WorldFeatures, load
from dit_attn.pipelines.compare import statistics
from dit_attn.pipelines.compare.metrics import frechet

Judge = Callable[[Sequence[np.ndarray], Sequence[str]], Sequence[float]]
Pixels = Callable[[torch.Tensor, Sequence[str]], torch.Tensor]
CLIP_DEFAULT = "openai/clip-vit-base-patch16"


@dataclass(frozen=True)
class Objective:
    """What is raised.

    Attributes:
        name: of it.
        judge: ``(images, prompts) -> scores``; with ``whole`` one score for all of them together.
        network: what judges.
        unit: of a score, in a few words.
        whole: whether it scores a set of images and not each of them.
        pixels: the same from (B, F, 3, H, W) in [0, 1], differentiable; ``None`` where there is no such thing.
    """

    name: str
    judge: Judge
    network: str = ""
    unit: str = "score"
    whole: bool = False
    pixels: Pixels | None = None


@dataclass(frozen=True)
class Weights:
    """What objectives may need, as the user gave it.

    Attributes:
        clip: a CLIP model of transformers, folder or Hub name, for ``clip`` and ``style``.
        weights: folder of the scorer (``pickscore``, ``hpsv2``), or of the CLIP model of ``aesthetic``.
        head: file of the linear or small network on top, for ``aesthetic``.
        style: words in front of the prompt, for ``style``.
        reference: uint8 (N, 3, H, W), for ``fid-world``; ``None`` draws the prompts, which must be captions then.
        device: where to judge.
    """

    clip: str | None = None
    weights: str | None = None
    head: str | None = None
    style: str | None = None
    reference: torch.Tensor | None = None
    device: Any = "cpu"


def objective(wanted: Any, given: Weights | None = None) -> Objective:
    """The objective of a name, or one made of a callable.

    Raises:
        DitAttnError: no such name, or what it needs is not there; the message says what that is.
    """
    if isinstance(wanted, Objective):
        return wanted
    if callable(wanted):
        name = getattr(wanted, "__name__", type(wanted).__name__)
        return Objective(name, wanted, pixels=getattr(wanted, "pixels", None))
    if wanted not in OBJECTIVES:
        raise unknown("objective", wanted, OBJECTIVES)
    return OBJECTIVES[wanted](given or Weights())


def judged(goal: Objective, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float | None]:
    """Scores, checked; ``None`` for images that are no pictures (NaN) and for scores that are no numbers.

    Raises:
        DitAttnError: no numbers, or another number of scores than images.
    """
    with torch.no_grad():
        given = goal.judge(images, prompts)
    try:
        found = [float(score) for score in given]
    except (TypeError, ValueError) as error:
        kind = type(given).__name__
        raise DitAttnError(
            f"the objective {goal.name} gave a {kind} that is no list of numbers; it must return one score an image"
        ) from error
    wanted = 1 if goal.whole else len(images)
    if len(found) != wanted:
        raise DitAttnError(
            f"the objective {goal.name} gave {len(found)} scores for {len(images)} images; it must return {wanted}"
        )
    return [score if np.isfinite(score) else None for score in found]


# -- of the shapes world -----------------------------------------------------------------------------------------------


def _verdicts(share: bool, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
    found = [statistics.verdict(image, prompt) for image, prompt in zip(images, prompts, strict=True)]
    wrong = next((prompt for prompt, verdict in zip(prompts, found) if verdict is None), None)
    if wrong is not None:
        raise DitAttnError(
            f"{wrong!r} cannot be verified: the verifier reads captions of the shapes world, scenes for pictures and "
            "moving shapes for clips; choose another objective or other prompts"
        )
    return [float(np.mean(list(v.values())) if share else all(v.values())) for v in found if v is not None]


def _verifier(given: Weights, share: bool) -> Objective:
    name = "verifier" if share else "verifier-whole"
    unit = "share of attributes right" if share else "share of prompts met"
    return Objective(name, partial(_verdicts, share), "verifier of the shapes world", unit)


def _clip_world(given: Weights) -> Objective:
    model, processor = load()
    return _by_cosine("clip-world", "world-clip", model.to(given.device), processor, given.device, _world_pixels)


def _fid_world(given: Weights) -> Objective:
    network = WorldFeatures().to(given.device)
    drawn: dict[tuple[str, ...], torch.Tensor] = {}

    def features(images: torch.Tensor) -> torch.Tensor:
        return torch.cat([network(part.to(given.device)).double().cpu() for part in images.split(32)])

    def judge(images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        frames = torch.cat([torch.from_numpy(image).permute(0, 3, 1, 2) for image in images])
        if len(frames) < 2:
            raise DitAttnError("fid-world compares sets of images; give at least 2 --pairs")
        key = tuple(prompts)
        if key not in drawn:
            drawn[key] = features(given.reference if given.reference is not None else _drawn(images, prompts))
        return [-frechet(features(frames), drawn[key])]

    return Objective("fid-world", judge, network.name, "- FID", whole=True)


def _drawn_world(given: Weights) -> Objective:
    network = WorldFeatures().to(given.device)

    def seen(frames: torch.Tensor) -> torch.Tensor:
        return network.vision(pixel_values=_world_pixels(frames.to(given.device, torch.float32))).pooler_output

    def pixels(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        count, _, height, width = images.shape[1:]
        blank = [np.zeros((count, height, width, 3), dtype=np.uint8)] * len(prompts)
        with torch.no_grad():
            wanted = seen(_drawn(blank, prompts, "drawn-world") / 255.0)
        return -(seen(images.flatten(0, 1)) - wanted).norm(dim=-1).unflatten(0, images.shape[:2]).mean(1)

    judge = torch.no_grad()(partial(_of_arrays, pixels))
    unit = "- distance of the features of the picture and of the drawn caption"
    return Objective("drawn-world", judge, network.name, unit, pixels=pixels)


def _drawn(images: Sequence[np.ndarray], prompts: Sequence[str], goal: str = "fid-world") -> torch.Tensor:
    """What the captions describe, uint8 (N, 3, H, W).

    Raises:
        DitAttnError: a prompt that is no caption of the world.
    """
    parts = []
    for image, prompt in zip(images, prompts, strict=True):
        try:
            item = world.parse(prompt)
        except DitAttnError as error:
            other = "; or give --reference DIR" if goal == "fid-world" else ""
            raise DitAttnError(f"{goal} draws its prompts, and {error}{other}") from error
        count, height, width = image.shape[:3]
        clip = isinstance(item, world.VideoScene)
        found = world.render_videos([item], count, height, width)[0].transpose(0, 1) if clip else (  # type: ignore
            world.render_scenes([item], height, width)  # type: ignore[list-item]
        )
        parts.append((found * 255).round().to(torch.uint8))
    return torch.cat(parts)


# -- of CLIP's kind ----------------------------------------------------------------------------------------------------


def _by_cosine(
    name: str, network: str, model: Any, processor: Any, device: Any, prepare: Callable[[torch.Tensor], torch.Tensor],
    words: str = "{}",
) -> Objective:  # fmt: skip
    """100 x cosine of picture and prompt, mean over the frames."""

    def pixels(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        texts = [words.format(prompt) for prompt in prompts]
        tokens = processor(text=texts, return_tensors="pt", padding=True, truncation=True).to(device)
        frames = images.flatten(0, 1).to(device, torch.float32)
        text = _unit(model.get_text_features(**tokens))
        seen = _unit(model.get_image_features(pixel_values=prepare(frames)))
        return 100.0 * (seen.unflatten(0, images.shape[:2]) * text[:, None]).sum(-1).mean(1)

    return Objective(name, partial(_of_arrays, pixels), network, "100 x cosine of picture and prompt", pixels=pixels)


def _of_arrays(pixels: Pixels, images: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
    stacked = torch.from_numpy(np.stack(list(images))).permute(0, 1, 4, 2, 3).float() / 255.0
    return [float(score) for score in pixels(stacked, prompts)]


def _unit(output: Any) -> torch.Tensor:
    """Features of length 1; transformers 5 wraps them."""
    features: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return features / features.norm(dim=-1, keepdim=True)


def _world_pixels(images: torch.Tensor) -> torch.Tensor:
    if images.shape[2:] != (SIZE, SIZE):
        images = _resized(images, (SIZE, SIZE))
    return images * 2 - 1


def _resized(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return torch.nn.functional.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)


def _prepared(processor: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Resizing, centre crop and normalisation of a CLIP processor, differentiable."""
    about = getattr(processor, "image_processor", processor)
    size: int = about.crop_size["height"]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (about.image_mean, about.image_std))

    def prepare(images: torch.Tensor) -> torch.Tensor:
        height, width = images.shape[2:]
        scale = size / min(height, width)
        images = _resized(images, (max(size, round(height * scale)), max(size, round(width * scale))))
        top, left = (images.shape[2] - size) // 2, (images.shape[3] - size) // 2
        images = images[:, :, top : top + size, left : left + size]
        return (images - mean.to(images.device)) / std.to(images.device)

    return prepare


def _clip_model(place: str, device: Any, why: str) -> tuple[Any, Any]:
    from transformers import CLIPModel, CLIPProcessor

    try:
        return CLIPModel.from_pretrained(place).eval().to(device), CLIPProcessor.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise DitAttnError(
            f"{why}, and {place!r} is none ({str(error).splitlines()[0]}); give a local folder with config.json, "
            "model.safetensors and the tokenizer, or use clip-world, which needs no download"
        ) from error


def _clip(given: Weights) -> Objective:
    place = given.clip or CLIP_DEFAULT
    model, processor = _clip_model(place, given.device, "clip needs a CLIP model")
    return _by_cosine("clip", place, model, processor, given.device, _prepared(processor))


def _style(given: Weights) -> Objective:
    if not given.style or not given.style.strip():
        raise DitAttnError('the objective style needs its words; give --style "golden hour, warm glow"')
    words = given.style.replace("{", "{{").replace("}", "}}") + ", {}"
    if given.clip == "clip-world":
        model, processor = load()
        return _by_cosine("style", "world-clip", model.to(given.device), processor, given.device, _world_pixels, words)
    place = given.clip or CLIP_DEFAULT
    model, processor = _clip_model(place, given.device, "style needs a CLIP model (--clip NAME, or --clip clip-world)")
    return _by_cosine("style", place, model, processor, given.device, _prepared(processor), words)


def _preference(given: Weights, name: str, what: str) -> Objective:
    """PickScore and HPSv2: CLIP models that were trained on people's choices."""
    if given.weights is None:
        raise DitAttnError(f"{name} needs its weights: give --weights DIR with {what} in the format of transformers")
    model, processor = _clip_model(given.weights, given.device, f"{name} needs {what} in the format of transformers")
    return _by_cosine(name, Path(given.weights).name, model, processor, given.device, _prepared(processor))


def _aesthetic(given: Weights) -> Objective:
    """A regression on the picture features of CLIP: a linear layer, or a stack of them without activations."""
    if given.weights is None or given.head is None:
        raise DitAttnError(
            "aesthetic needs two things: --weights DIR with the CLIP model it was trained on (ViT-L/14 for LAION's), "
            "and --weights-head FILE with the layers on top (.safetensors or .pth)"
        )
    model, processor = _clip_model(given.weights, given.device, "aesthetic needs a CLIP model")
    layers = _linear_layers(Path(given.head), model.config.projection_dim, given.device)
    prepare = _prepared(processor)

    def pixels(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        frames = images.flatten(0, 1).to(given.device, torch.float32)
        found = _unit(model.get_image_features(pixel_values=prepare(frames)))
        for weight, bias in layers:
            found = torch.nn.functional.linear(found, weight, bias)
        return found[:, 0].unflatten(0, images.shape[:2]).mean(1)

    name = Path(given.head).name
    return Objective("aesthetic", partial(_of_arrays, pixels), name, "aesthetic score", pixels=pixels)


def _linear_layers(file: Path, width: int, device: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Weights and biases of a file, in order.

    Raises:
        DitAttnError: it cannot be read, or the layers do not fit one another.
    """
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(file)
        else:
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise DitAttnError(f"--weights-head {file} cannot be read ({str(error).splitlines()[0]}); check it") from error
    names = [name.removesuffix("weight") for name in state if name == "weight" or name.endswith(".weight")]
    pairs = [(state[f"{name}weight"], state.get(f"{name}bias")) for name in names]
    layers: list[tuple[torch.Tensor, torch.Tensor]] = []
    for weight, bias in pairs:
        if weight.ndim != 2 or weight.shape[1] != width or bias is None:
            raise DitAttnError(f"--weights-head {file} is no stack of linear layers on {width} features; check it")
        width = weight.shape[0]
        layers.append((weight.float().to(device), bias.float().to(device)))
    if width != 1 or not pairs:
        raise DitAttnError(f"--weights-head {file} ends in {width} numbers instead of one score; check it")
    return layers


OBJECTIVES: dict[str, Callable[[Weights], Objective]] = {
    "clip-world": _clip_world,
    "verifier": partial(_verifier, share=True),
    "verifier-whole": partial(_verifier, share=False),
    "fid-world": _fid_world,
    "drawn-world": _drawn_world,
    "clip": _clip,
    "style": _style,
    "pickscore": partial(_preference, name="pickscore", what="the model PickScore_v1"),
    "hpsv2": partial(_preference, name="hpsv2", what="the model HPSv2 (ViT-H/14)"),
    "aesthetic": _aesthetic,
}
