"""How ``world-clip`` is trained: images of the world against their captions, and against one another.

The loss is CLIP's over batches of distinct scenes, plus the attributes of the scene predicted from the image's features
by linear heads that are thrown away afterwards.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import nn

from dit_attn import files
from dit_attn.errors import DitAttnError
from dit_attn.eval.shapes_world import world
from dit_attn.eval.shapes_world.world_clip import SIZE

NAME = "world-clip"
CHECKPOINT = "checkpoint.pt"
HIDDEN, LAYERS, HEADS, PROJECTION, LENGTH = 96, 4, 4, 64, 24
VOCABULARY = 320  # rows of the token table; the tokenizer needs a few less
ATTRIBUTES = ("shape", "color", "size", "place", "count", "background")


@dataclass(frozen=True)
class Recipe:
    """Steps, distinct scenes per batch, peak learning rate, share of warm-up."""

    steps: int = 1200
    batch: int = 96
    rate: float = 1.5e-3
    warmup: float = 0.05


class Training:
    """A run: a function of recipe, seed and step."""

    def __init__(self, recipe: Recipe, seed: int, device: torch.device) -> None:
        from transformers import CLIPConfig, CLIPModel

        torch.manual_seed(seed)
        self.recipe, self.seed, self.device, self.step, self.seconds = recipe, seed, device, 0, 0.0
        self.tokenizer = build_tokenizer()
        size = {"hidden_size": HIDDEN, "intermediate_size": 3 * HIDDEN, "num_hidden_layers": LAYERS,
                "num_attention_heads": HEADS}  # fmt: skip
        ends = {
            "bos_token_id": self.tokenizer.bos_token_id,
            "eos_token_id": self.tokenizer.eos_token_id,
            "pad_token_id": self.tokenizer.pad_token_id,
        }
        config = CLIPConfig(
            text_config={**size, **ends, "vocab_size": VOCABULARY, "max_position_embeddings": LENGTH},
            vision_config={**size, "image_size": SIZE, "patch_size": 8},
            projection_dim=PROJECTION,
        )
        self.model: Any = CLIPModel(config)
        cast(nn.Module, self.model).to(device)
        scenes = world.all_scenes()
        self.values = {name: sorted({getattr(s, name) for s in scenes}, key=str) for name in ATTRIBUTES}
        self.heads = nn.ModuleDict({name: nn.Linear(HIDDEN, len(self.values[name])) for name in ATTRIBUTES}).to(device)
        parameters = [*self.model.parameters(), *self.heads.parameters()]
        self.optimizer = torch.optim.AdamW(parameters, lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.05)

    def rate(self) -> float:
        """The learning rate of the step: warm-up, then a cosine to zero."""
        done = self.step / self.recipe.steps
        if done < self.recipe.warmup:
            return self.recipe.rate * done / self.recipe.warmup
        rest = (done - self.recipe.warmup) / (1 - self.recipe.warmup)
        return self.recipe.rate * 0.5 * (1 + float(torch.cos(torch.tensor(rest * torch.pi))))

    def advance(self) -> float:
        """One step; its loss."""
        rng = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        drawn = dict.fromkeys(world.sample_scenes(2 * self.recipe.batch, rng))
        scenes = list(drawn)[: self.recipe.batch]
        images = world.render_scenes(scenes, SIZE, generator=rng)
        noise = torch.randn(images.shape, generator=rng) * 0.05 * torch.rand(len(scenes), 1, 1, 1, generator=rng)
        images = ((images + noise).clamp(0, 1) * 2 - 1).to(self.device)
        tokens = self.tokenizer([world.caption(s) for s in scenes], return_tensors="pt", padding=True).to(self.device)
        out = self.model(pixel_values=images, **tokens)
        target = torch.arange(len(scenes), device=self.device)
        loss = (F.cross_entropy(out.logits_per_image, target) + F.cross_entropy(out.logits_per_text, target)) / 2
        vision = self.model.vision_model
        features = vision.post_layernorm(out.vision_model_output.last_hidden_state[:, 0])
        for name, head in self.heads.items():
            wanted = [self.values[name].index(getattr(scene, name)) for scene in scenes]
            loss = loss + 0.3 * F.cross_entropy(head(features), torch.tensor(wanted, device=self.device))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=4.6)
        self.step += 1
        return float(loss.detach())

    def save(self, folder: Path) -> None:
        """Write the checkpoint, atomically.

        Raises:
            DitAttnError: the disk is full or the folder cannot be written; the previous checkpoint stays.
        """
        state = {
            "step": self.step, "seed": self.seed, "seconds": self.seconds, "model": self.model.state_dict(),
            "heads": self.heads.state_dict(), "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        files.write_checkpoint(folder / CHECKPOINT, state)

    def restore(self, folder: Path) -> None:
        """Go on from a checkpoint.

        Raises:
            DitAttnError: there is none.
        """
        if not (folder / CHECKPOINT).is_file():
            raise DitAttnError(f"{folder} holds no run to resume; leave --resume out to start one")
        state = torch.load(folder / CHECKPOINT, map_location=self.device, weights_only=True)
        self.step, self.seed, self.seconds = state["step"], state["seed"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.optimizer.load_state_dict(state["optimizer"])


def build_tokenizer() -> Any:
    """CLIP's tokenizer over the words of the world: a byte-pair vocabulary in which every word is one token.

    The trainer breaks ties at random, so the numbers are given here: words first, in order, then the ends of a text,
    then the pieces that no caption leaves over.
    """
    import tempfile

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    ends = ["<|startoftext|>", "<|endoftext|>"]
    pairs = Tokenizer(models.BPE(end_of_word_suffix="</w>", unk_token=ends[1]))
    pairs.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(vocab_size=1000, special_tokens=ends, end_of_word_suffix="</w>", show_progress=False)
    pairs.train_from_iterator(world.vocabulary(), trainer)
    first = [f"{word}</w>" for word in world.vocabulary()] + ends
    numbers = first + sorted(set(pairs.get_vocab()) - set(first))
    with tempfile.TemporaryDirectory() as folder:
        pairs.model.save(folder)
        vocabulary = Path(folder) / "vocab.json"
        vocabulary.write_text(json.dumps({token: number for number, token in enumerate(numbers)}))
        return CLIPTokenizer(str(vocabulary), f"{folder}/merges.txt", model_max_length=LENGTH)


@torch.no_grad()
def held_out_accuracy(training: Training, count: int = 200) -> dict[str, float]:
    """Measure how often a held-out image finds its caption among ``count`` held-out ones, and the other way round."""
    scenes = [item for item in world.held_out_sample("image", count) if isinstance(item, world.Scene)]
    images = world.render_scenes(scenes, SIZE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    tokens = training.tokenizer([world.caption(s) for s in scenes], return_tensors="pt", padding=True)
    model = training.model.eval()
    logits = model(pixel_values=images.to(training.device), **tokens.to(training.device)).logits_per_image
    model.train()
    target = torch.arange(len(scenes), device=training.device)
    return {
        "image_to_caption": float((logits.argmax(1) == target).float().mean()),
        "caption_to_image": float((logits.argmax(0) == target).float().mean()),
        "of": float(len(scenes)),
    }


def fit(training: Training, folder: Path, minutes: float | None = None, checkpoint_minutes: float = 5.0) -> None:
    """Train to the end of the recipe, or until the time is up; Ctrl-C leaves a checkpoint too."""
    from tqdm import tqdm

    started, saved, before = time.monotonic(), time.monotonic(), training.seconds
    bar = tqdm(total=training.recipe.steps, initial=training.step, desc=NAME, unit="step", disable=None)
    try:
        while training.step < training.recipe.steps:
            loss = training.advance()
            bar.update()
            training.seconds = before + time.monotonic() - started
            if training.step % 50 == 0:
                bar.set_postfix(loss=f"{loss:.3f}")
            if time.monotonic() - saved > 60 * checkpoint_minutes:
                training.save(folder)
                saved = time.monotonic()
            if minutes is not None and time.monotonic() - started > 60 * minutes:
                break
    finally:
        bar.close()
        training.save(folder)


def export(training: Training, folder: Path) -> dict[str, Any]:
    """Write the transformers folder with its ``training.json``, and return what that holds."""
    from dataclasses import asdict

    from transformers import CLIPImageProcessorPil, CLIPProcessor

    from dit_attn.models.export import environment

    square = {"height": SIZE, "width": SIZE}
    processor = CLIPImageProcessorPil(
        size=square, crop_size=square, do_center_crop=False, image_mean=[0.5] * 3, image_std=[0.5] * 3
    )
    training.model.eval().save_pretrained(folder)
    CLIPProcessor(processor, training.tokenizer).save_pretrained(folder)
    record = {
        "name": NAME, "seed": training.seed, "steps_done": training.step,
        "training_seconds": round(training.seconds, 1), "recipe": asdict(training.recipe),
        "environment": environment(), "held_out": held_out_accuracy(training),
    }  # fmt: skip
    files.write_json(folder / "training.json", record)
    return record
