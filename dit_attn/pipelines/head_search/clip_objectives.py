"""Objectives by CLIP models: image and prompt, style, human preference (PickScore, HPSv2) and aesthetics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dit_attn.errors import DitAttnError
from dit_attn.eval.shapes_world.world_clip import SIZE, load
from dit_attn.pipelines.head_search.objective import Objective, ScorerOptions, score_arrays

CLIP_DEFAULT = "openai/clip-vit-base-patch16"


def cosine_objective(
    name: str,
    network: str,
    model: Any,
    processor: Any,
    device: Any,
    prepare: Callable[[torch.Tensor], torch.Tensor],
    template: str = "{}",
) -> Objective:
    """Return 100 x cosine of image and prompt as an objective, mean over the frames.

    Args:
        name, network: of the objective and of its network.
        model, processor: a CLIP model of transformers.
        device: where to compute.
        prepare: turns (N, 3, H, W) in [0, 1] into the model's input, differentiably.
        template: text around the prompt.
    """

    def pixels(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        texts = [template.format(prompt) for prompt in prompts]
        tokens = processor(text=texts, return_tensors="pt", padding=True, truncation=True).to(device)
        frames = images.flatten(0, 1).to(device, torch.float32)
        text = _normalized(model.get_text_features(**tokens))
        image = _normalized(model.get_image_features(pixel_values=prepare(frames)))
        return 100.0 * (image.unflatten(0, images.shape[:2]) * text[:, None]).sum(-1).mean(1)

    return Objective(name, partial(score_arrays, pixels), network, "100 x cosine of image and prompt", pixels=pixels)


def clip(options: ScorerOptions) -> Objective:
    """Return 100 x cosine of image and prompt by a CLIP model."""
    place = options.clip or CLIP_DEFAULT
    model, processor = _clip_model(place, options.device, "clip needs a CLIP model")
    return cosine_objective("clip", place, model, processor, options.device, _preparation(processor))


def style(options: ScorerOptions) -> Objective:
    """Return 100 x cosine of image and ``"{style}, {prompt}"`` by a CLIP model."""
    if not options.style or not options.style.strip():
        raise DitAttnError('the objective style needs its words; give --style "golden hour, warm glow"')
    template = options.style.replace("{", "{{").replace("}", "}}") + ", {}"
    if options.clip == "clip-world":
        model, processor = load()
        return cosine_objective(
            "style", "world-clip", model.to(options.device), processor, options.device, world_clip_pixels, template
        )
    place = options.clip or CLIP_DEFAULT
    why = "style needs a CLIP model (--clip NAME, or --clip clip-world)"
    model, processor = _clip_model(place, options.device, why)
    return cosine_objective("style", place, model, processor, options.device, _preparation(processor), template)


def preference(options: ScorerOptions, name: str, what: str) -> Objective:
    """Return a CLIP model trained on human choices as an objective: PickScore (2305.01569) or HPSv2 (2306.09341).

    Args:
        options: ``weights`` is the folder of the model.
        name: of the objective.
        what: the model, for messages.

    Raises:
        DitAttnError: no weights, or not in the format of transformers.
    """
    if options.weights is None:
        raise DitAttnError(f"{name} needs its weights: give --weights DIR with {what} in the format of transformers")
    why = f"{name} needs {what} in the format of transformers"
    model, processor = _clip_model(options.weights, options.device, why)
    network = Path(options.weights).name
    return cosine_objective(name, network, model, processor, options.device, _preparation(processor))


def aesthetic(options: ScorerOptions) -> Objective:
    """Return a regression on the image features of CLIP: a linear layer, or several without activations (LAION).

    Raises:
        DitAttnError: ``options.weights`` or ``options.head`` is missing or does not fit.
    """
    if options.weights is None or options.head is None:
        raise DitAttnError(
            "aesthetic needs two things: --weights DIR with the CLIP model it was trained on (ViT-L/14 for LAION's), "
            "and --weights-head FILE with the layers on top (.safetensors or .pth)"
        )
    model, processor = _clip_model(options.weights, options.device, "aesthetic needs a CLIP model")
    layers = _linear_layers(Path(options.head), model.config.projection_dim, options.device)
    prepare = _preparation(processor)

    def pixels(images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        frames = images.flatten(0, 1).to(options.device, torch.float32)
        values = _normalized(model.get_image_features(pixel_values=prepare(frames)))
        for weight, bias in layers:
            values = torch.nn.functional.linear(values, weight, bias)
        return values[:, 0].unflatten(0, images.shape[:2]).mean(1)

    name = Path(options.head).name
    return Objective("aesthetic", partial(score_arrays, pixels), name, "aesthetic score", pixels=pixels)


def world_clip_pixels(images: torch.Tensor) -> torch.Tensor:
    """Turn (N, 3, H, W) in [0, 1] into the input of the shapes world's CLIP model, differentiably."""
    if images.shape[2:] != (SIZE, SIZE):
        images = _resized(images, (SIZE, SIZE))
    return images * 2 - 1


def _normalized(output: Any) -> torch.Tensor:
    """Features of length 1; transformers 5 wraps them."""
    features: torch.Tensor = output if isinstance(output, torch.Tensor) else output.pooler_output
    return features / features.norm(dim=-1, keepdim=True)


def _resized(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return torch.nn.functional.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)


def _preparation(processor: Any) -> Callable[[torch.Tensor], torch.Tensor]:
    """Resizing, center crop and normalization of a CLIP processor, differentiable."""
    settings = getattr(processor, "image_processor", processor)
    size: int = settings.crop_size["height"]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (settings.image_mean, settings.image_std))

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
