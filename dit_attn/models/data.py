"""Training batches, drawn on the fly from a seeded generator."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from dit_attn.eval.inspection_world import world as inspection_world
from dit_attn.eval.shapes_world import edit_samples, edits, multi, world
from dit_attn.eval.shapes_world import items as world_items
from dit_attn.models import omnigen
from dit_attn.models.autoencoders import space_to_depth
from dit_attn.models.recipe import VIDEO_FRAMES, Recipe, Stage

MIN_MASK = 0.01  # of the image: the error inside a smaller mask weighs less


@dataclass(frozen=True)
class Batch:
    """One step's data.

    Args:
        clean: latents in [-1, 1], (B, 3, H, W) for images and (B, 12, F, H / 2, W / 2) for videos.
        noise: Gaussian noise of the same shape.
        level: (B,) noise level s in (0, 1); the model sees `(1 - s) clean + s noise`.
        ids: (B, text length) int64 token ids.
        mask: (B, text length) int64, 1 on tokens.
        weight: (B, 1, H, W) weight of the error of every pixel; ``None`` for equal ones.
        rest: other arguments of the transformer, where ids and mask are those of `omnigen.Sequences`.
    """

    clean: torch.Tensor
    noise: torch.Tensor
    level: torch.Tensor
    ids: torch.Tensor
    mask: torch.Tensor
    weight: torch.Tensor | None = None
    rest: dict[str, Any] | None = None

    @property
    def noisy(self) -> torch.Tensor:
        """Mix `clean` and `noise` at `level`: the network's input, shaped like `clean`."""
        s = self.level.view(-1, *[1] * (self.clean.ndim - 1))
        return torch.lerp(self.clean, self.noise, s)


def draw(recipe: Recipe, stage: Stage, tokenizer: Any, generator: torch.Generator, device: torch.device) -> Batch:
    """Draw a training batch of `stage` from `generator`, a CPU generator."""
    if recipe.kind == "inspect":
        return _draw_pieces(recipe, stage, tokenizer, generator, device)
    if recipe.kind == "edit":
        return _draw_edits(recipe, stage, tokenizer, generator, device)
    items: list[Any]
    if recipe.kind == "image":
        items = list(world.sample_scenes(stage.batch, generator, stage.single))
    elif recipe.kind == "multi":
        items = list(multi.sample_scenes(stage.batch, generator, stage.objects, stage.filled))
    else:
        items = list(world.sample_videos(stage.batch, generator))
    clean = render(items, stage, generator, device)
    texts = _drop([world_items.caption(item) for item in items], recipe, generator)
    return corrupt(clean, texts, stage, tokenizer, generator)


def _drop(texts: list[str], recipe: Recipe, generator: torch.Generator) -> list[str]:
    """Replace some captions by the empty one."""
    drop = (torch.rand(len(texts), generator=generator) < recipe.caption_drop).tolist()
    return ["" if gone else text for gone, text in zip(drop, texts, strict=True)]


def _draw_pieces(
    recipe: Recipe, stage: Stage, tokenizer: Any, generator: torch.Generator, device: torch.device
) -> Batch:
    """Draw products, most of them with a defect; the error inside the mask counts as much as that of the image."""
    pieces = inspection_world.sample_pieces(stage.batch, generator, stage.defective)
    drawn = [inspection_world.draw(piece, stage.size) for piece in pieces]
    clean = torch.from_numpy(np.stack([one.image for one in drawn])).permute(0, 3, 1, 2).to(device) * 2 - 1
    inside = torch.from_numpy(np.stack([one.mask for one in drawn])).float()[:, None].to(device)
    share = inside.mean((1, 2, 3), keepdim=True).clamp(min=MIN_MASK)
    texts = _drop([inspection_world.caption(piece) for piece in pieces], recipe, generator)
    batch = corrupt(clean, texts, stage, tokenizer, generator)
    return replace(batch, weight=1 + recipe.mask_weight * inside / share)


def _draw_edits(
    recipe: Recipe, stage: Stage, tokenizer: Any, generator: torch.Generator, device: torch.device
) -> Batch:
    """Draw edits; some prompts are the input image alone, and some are empty, as those of the guidance's branches."""
    drawn = edit_samples.sample_edits(stage.batch, generator, stage.objects, stage.pieces)
    before, after = edit_samples.render_pairs(drawn, stage.size, generator=generator, device=device)
    prompts = _drop([omnigen.prompt_of(edits.instruction(edit.pieces)) for edit in drawn], recipe, generator)
    bare = (torch.rand(len(drawn), generator=generator) < recipe.image_drop).tolist()
    prompts = ["" if gone else text or omnigen.TAG for gone, text in zip(bare, prompts, strict=True)]
    condition = omnigen.sequences(tokenizer, prompts, before * 2 - 1, stage.size)
    clean = (after * 2 - 1)[condition.order.to(device)]
    level, noise = _noise(clean, stage, generator)
    return Batch(clean, noise, level, condition.ids, condition.mask, rest=condition.rest)


def render(items: list[Any], stage: Stage, generator: torch.Generator | None, device: torch.device) -> torch.Tensor:
    """Draw `items` as latents in [-1, 1] at the size of `stage`."""
    if isinstance(items[0], multi.MultiScene):
        return multi.render_scenes(items, stage.size, generator=generator, device=device) * 2 - 1
    if isinstance(items[0], world.Scene):
        return world.render_scenes(items, stage.size, generator=generator, device=device) * 2 - 1
    shown: Any = {"first": stage.frames, "generator": generator, "device": device}
    pixels = world.render_videos(items, VIDEO_FRAMES, stage.size, **shown)
    return space_to_depth(pixels * 2 - 1, 2)


def corrupt(clean: torch.Tensor, texts: list[str], stage: Stage, tokenizer: Any, generator: torch.Generator) -> Batch:
    """Add seeded noise to `clean` at logit-normal levels, shifted as `stage` says."""
    level, noise = _noise(clean, stage, generator)
    tokens = tokenizer(texts, padding="max_length", max_length=tokenizer.model_max_length, return_tensors="pt")
    device = clean.device
    ids, mask = tokens.input_ids.to(device), tokens.attention_mask.to(device)
    return Batch(clean, noise, level, ids, mask)


def _noise(clean: torch.Tensor, stage: Stage, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Logit-normal noise levels (B,), shifted as `stage` says, and Gaussian noise shaped like `clean`."""
    level = torch.sigmoid(torch.randn(len(clean), generator=generator))
    level = stage.shift * level / (1 + (stage.shift - 1) * level)
    noise = torch.randn(clean.shape, generator=generator)
    return level.to(clean.device), noise.to(clean.device)
