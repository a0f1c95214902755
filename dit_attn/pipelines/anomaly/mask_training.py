"""Learn the masks of the shots as images: an embedding per (product, defect) and a LoRA, by the diffusion loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from dit_attn import files
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.anomaly.backbone import Backbone, Text, joined
from dit_attn.pipelines.anomaly.concept import Concept, add_lora, check_peft, lora_state, remove_lora
from dit_attn.pipelines.anomaly.mask_drawer import MaskDrawer
from dit_attn.pipelines.anomaly.mask_model import MaskModel, MaskModelSettings, canvas_side, on_canvas
from dit_attn.pipelines.anomaly.orders import seed_of
from dit_attn.pipelines.anomaly.text_vectors import first_vectors, prompt_vectors
from dit_attn.pipelines.anomaly.training import filled, rate_scale
from dit_attn.pipelines.anomaly.views import flipped

CHECKPOINT = "mask_checkpoint.pt"


@dataclass(frozen=True)
class MaskTrainConfig:
    """How masks are learned.

    Attributes:
        tokens, lora_rank: sizes, see :class:`~dit_attn.pipelines.anomaly.mask_model.MaskModelSettings`.
        steps: optimizer steps.
        batch: masks per step.
        lr, lora_lr: learning rates of the vectors and of the LoRA.
        flips: mirror masks, ``"both"``, ``"horizontal"`` or ``"none"``.
        seed: of everything random.
        trials: masks drawn of every pair at the end, to see how many can be used.
        save_every: steps between checkpoints.
    """

    tokens: int = 4
    lora_rank: int = 8
    steps: int = 600
    batch: int = 4
    lr: float = 1e-2
    lora_lr: float = 6e-3
    flips: str = "both"
    seed: int = 0
    trials: int = 16
    save_every: int = 50


class MaskTraining:
    """One training of the mask model of a concept.

    Args:
        backbone: the pipeline that the concept was learned on; it gets the LoRA until :meth:`close`.
        concept: with the masks of its shots; it gets the mask model.
        config: how.

    Raises:
        DitAttnError: peft is missing.
    """

    def __init__(self, backbone: Backbone, concept: Concept, config: MaskTrainConfig):
        if config.lora_rank:
            check_peft()
        self.backbone, self.concept, self.config = backbone, concept, config
        settings, masked = concept.settings, backbone.family.masked
        texts = [backbone.text(filled(settings.prompt, *pair.split("+", 1))) for pair in settings.pairs]
        self.texts: Text = joined(texts, masked)
        canvas = {pair: canvas_side(concept.shapes[pair]) for pair in settings.pairs}
        sizes = MaskModelSettings(config.tokens, config.lora_rank, canvas=canvas)
        self.model = MaskModel(sizes, len(settings.pairs), settings.width)
        concept.to("cpu")
        rows, generator = [prompt_vectors(text, masked) for text in texts], torch.Generator().manual_seed(config.seed)
        with torch.no_grad():
            self.model.vectors.copy_(first_vectors(rows, config.tokens, concept.mean, concept.deviation, generator))
        concept.mask_model = self.model
        concept.to(backbone.device)
        backbone.pipe.transformer.requires_grad_(False)
        torch.manual_seed(config.seed)
        self.lora = add_lora(backbone.pipe.transformer, config.lora_rank) if config.lora_rank else []
        for parameter in self.lora:
            parameter.requires_grad_(True)
        self.model.vectors.requires_grad_(True)
        self.parameters = [self.model.vectors, *self.lora]
        groups = [{"params": [self.model.vectors], "lr": config.lr}]
        groups += [{"params": self.lora, "lr": config.lora_lr}] if self.lora else []
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.step = 0
        self.losses: list[float] = []

    def loss(self) -> torch.Tensor:
        """Compute the loss of the current step: the mean squared error of the model's objective."""
        config, backbone = self.config, self.backbone
        rng = np.random.default_rng((config.seed, self.step))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        pairs, canvas = self.concept.settings.pairs, self.model.settings.canvas
        numbers, images = [], []
        for _ in range(config.batch):
            number = int(rng.integers(len(pairs)))
            shapes = self.concept.shapes[pairs[number]]
            shape = flipped([shapes[int(rng.integers(len(shapes)))]], config.flips, rng)[0]
            images.append(on_canvas(shape, canvas[pairs[number]], backbone.resolution, rng))
            numbers.append(number)
        of = torch.tensor(numbers, device=backbone.device)
        clean = backbone.encode(torch.stack(images))
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        level = backbone.draw_levels(len(images), generator).to(backbone.device)
        text = {key: value[of] for key, value in self.texts.items()}
        text = self.concept.extend_for_masks(text, backbone.family.masked, of)
        return backbone.errors(clean, noise, level, text).mean()

    def update(self) -> float:
        """Do one step and return its loss."""
        for group, rate in zip(self.optimizer.param_groups, self.rates):
            group["lr"] = rate * rate_scale(self.step, self.config.steps)
        self.backbone.pipe.transformer.train(False)
        loss = self.loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.append(float(loss.detach()))
        return self.losses[-1]

    def finish(self) -> None:
        """Put what was learned into the concept, take the LoRA off the transformer, and draw the trial masks."""
        self.model.lora = lora_state(self.backbone.pipe.transformer) if self.lora else {}
        self.close()
        self._describe(replace(self.model.settings, steps=self.step))
        drawer = MaskDrawer(self.backbone, self.concept)
        usable = {}
        for pair in self.concept.settings.pairs:
            seeds = [seed_of(self.config.seed, pair, number, "trial mask") for number in range(self.config.trials)]
            good = sum(not drawer.attempt(pair, seed)[1] for seed in seeds)
            usable[pair] = good / len(seeds) if seeds else 1.0
        self._describe(replace(self.model.settings, usable=usable))

    def _describe(self, settings: MaskModelSettings) -> None:
        self.model.settings = settings
        self.concept.settings = replace(self.concept.settings, mask_model=settings)

    def close(self) -> None:
        """Take the LoRA off the pipeline's transformer."""
        if self.lora:
            remove_lora(self.backbone.pipe.transformer)
            self.lora = []

    def _about(self) -> dict[str, object]:
        """What must be equal to go on: settings, pairs, and the masks by their areas."""
        areas = {pair: [int(shape.sum()) for shape in shapes] for pair, shapes in self.concept.shapes.items()}
        return {"config": asdict(self.config), "areas": areas}

    def save(self, folder: Path) -> None:
        """Write the checkpoint, atomically.

        Raises:
            DitAttnError: the disk is full or the folder cannot be written; the previous checkpoint stays.
        """
        state = {
            **self._about(), "step": self.step, "losses": self.losses, "vectors": self.model.vectors.data,
            "lora": [parameter.data for parameter in self.lora], "optimizer": self.optimizer.state_dict(),
        }  # fmt: skip
        files.write_checkpoint(folder / CHECKPOINT, state)

    def restore(self, folder: Path) -> None:
        """Go on from the checkpoint of a folder, if there is one.

        Raises:
            DitAttnError: it cannot be read, or it is of other masks or settings.
        """
        path = folder / CHECKPOINT
        if not path.is_file():
            return
        try:
            state = torch.load(path, map_location=self.backbone.device, weights_only=True)
            same = {key: state[key] for key in ("config", "areas")} == self._about()
        except Exception as error:
            raise DitAttnError(f"{path} cannot be read ({type(error).__name__}); delete it and start again") from error
        if not same:
            raise DitAttnError(f"{path} belongs to a training with other settings; choose another --output")
        self.step, self.losses = state["step"], state["losses"]
        self.model.vectors.data.copy_(state["vectors"])
        for parameter, value in zip(self.lora, state["lora"], strict=True):
            parameter.data.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])


def learn_masks(
    backbone: Backbone,
    concept: Concept,
    config: MaskTrainConfig,
    folder: Path,
    *,
    resume: bool = False,
    on_progress: Callable[[int, int, float], None] | None = None,
) -> Concept:
    """Have a concept learn to draw masks; a checkpoint is left on every way out, the concept at the end.

    Args:
        backbone: the pipeline that the concept was learned on; it is as before at the end.
        concept: with the masks of its shots.
        config: how.
        folder: of ``concept.safetensors`` and the checkpoint.
        resume: go on from the checkpoint in ``folder``, where there is one.
        on_progress: callback(done, total, loss).

    Raises:
        DitAttnError: peft is missing, the checkpoint is of another training, or the disk is full.
    """
    trainable = {name: p.requires_grad for name, p in backbone.pipe.transformer.named_parameters()}
    training = MaskTraining(backbone, concept, config)
    try:
        if resume:
            training.restore(folder)
        try:
            while training.step < config.steps:
                loss = training.update()
                if on_progress is not None:
                    on_progress(training.step, config.steps, loss)
                if training.step % config.save_every == 0:
                    training.save(folder)
        finally:
            training.save(folder)
        training.finish()
        concept.save(folder / "concept.safetensors")
        return concept.to("cpu")
    finally:
        training.close()
        for name, parameter in backbone.pipe.transformer.named_parameters():
            parameter.requires_grad_(trainable[name])
