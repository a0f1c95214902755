"""Learn anomalies from a few shots: appearance and mask encoder first, then a LoRA with them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dit_attn import files
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.anomaly.backbone import Backbone, Text, joined
from dit_attn.pipelines.anomaly.concept import Concept, ConceptSettings, add_lora, check_peft, lora_state, remove_lora
from dit_attn.pipelines.anomaly.gate import Gate
from dit_attn.pipelines.anomaly.masks import MaskSource, boxed, foreground
from dit_attn.pipelines.anomaly.pixels import read_image
from dit_attn.pipelines.anomaly.sources import Shot, Source
from dit_attn.pipelines.anomaly.views import flipped, view_of

CHECKPOINT = "checkpoint.pt"
_CONTROLS = 48  # normal images under real masks, per pair
_FULL = 0.1  # weight of the error of the entire view beside 1 for that inside the mask


@dataclass(frozen=True)
class TrainConfig:
    """How anomalies are learned.

    Attributes:
        prompt, normal_prompt: templates with ``{product}`` and ``{defect}``.
        tokens, mask_tokens, lora_rank: sizes, see :class:`~dit_attn.pipelines.anomaly.concept.ConceptSettings`.
        steps: optimizer steps.
        lora_after: fraction of the steps after which the LoRA learns too.
        batch: samples per step, of all processes together.
        lr, lora_lr: learning rates of the vectors and of the LoRA.
        flips: mirror shots, ``"both"``, ``"horizontal"`` or ``"none"``.
        crop: see :func:`~dit_attn.pipelines.anomaly.views.view_of`.
        seed: of everything random.
        licence: of the images, for the concept file.
        save_every: steps between checkpoints.
    """

    prompt: str = "{product} with a {defect}"
    normal_prompt: str = "normal {product}"
    tokens: int = 8
    mask_tokens: int = 4
    lora_rank: int = 8
    steps: int = 200
    lora_after: float = 0.2
    batch: int = 4
    lr: float = 1e-2
    lora_lr: float = 2e-3
    flips: str = "both"
    crop: str = "auto"
    seed: int = 0
    licence: str = ""
    save_every: int = 50


class ConceptTraining:
    """One training: prepared data, the concept, optimizers and progress.

    Args:
        backbone: the pipeline; its transformer gets the LoRA until :meth:`close`.
        source: shots and normal images.
        config: how.
        model: name of the model, for the concept file.

    Raises:
        DitAttnError: an image or mask cannot be used, a template has another field, or peft is missing.
    """

    def __init__(self, backbone: Backbone, source: Source, config: TrainConfig, model: str = ""):
        if not source.shots:
            raise DitAttnError("there are no defect images to learn from; give --defects and --masks, or --data")
        if config.lora_rank:
            check_peft()
        self.backbone, self.source, self.config = backbone, source, config
        self.shots = [(shot, *shot.read()) for shot in source.shots]
        self.pairs = source.pairs
        texts = [backbone.text(filled(config.prompt, *pair)) for pair in self.pairs]
        self.texts: Text = joined(texts, backbone.family.masked)
        for product, _ in self.pairs:
            filled(config.normal_prompt, product, "")
        settings = ConceptSettings(
            pipeline=backbone.name, model=model, width=texts[0]["prompt_embeds"].shape[-1],
            resolution=backbone.resolution, pairs=tuple(f"{p}+{d}" for p, d in self.pairs), prompt=config.prompt,
            normal_prompt=config.normal_prompt, tokens=config.tokens, mask_tokens=config.mask_tokens,
            lora_rank=config.lora_rank, seed=config.seed, licence=config.licence,
            shots={"learned": _names(source.shots), "held_out": _names(source.held_out)},
            gate={f"{p}+{d}": self._gate(p, d).to_dict() for p, d in self.pairs},
        )  # fmt: skip
        torch.manual_seed(config.seed)
        self.concept = Concept(settings)
        self.concept.begin(texts, backbone.family.masked, torch.Generator().manual_seed(config.seed))
        for shot, _, mask in self.shots:
            self.concept.shapes.setdefault(f"{shot.product}+{shot.defect}", []).append(boxed(mask))
        self.concept.to(backbone.device)
        backbone.pipe.transformer.requires_grad_(False)
        self.lora = add_lora(backbone.pipe.transformer, config.lora_rank) if config.lora_rank else []
        for parameter in self.lora:
            parameter.requires_grad_(True)
        groups = [{"params": list(self.concept.parameters()), "lr": config.lr}]
        groups += [{"params": self.lora, "lr": config.lora_lr}] if self.lora else []
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
        self.rates = [group["lr"] for group in self.optimizer.param_groups]
        self.step = 0
        self.losses: list[float] = []

    def _gate(self, product: str, defect: str) -> Gate:
        shots = [(p / 255, m) for shot, p, m in self.shots if (shot.product, shot.defect) == (product, defect)]
        rng = np.random.default_rng(self.config.seed)
        masks = MaskSource("real", [mask for _, mask in shots])
        images = self.source.normals[product]
        chosen = rng.permutation(len(images))[:_CONTROLS]
        normals = []
        for i in range(_CONTROLS):
            pixels = read_image(images[chosen[i % len(chosen)]])
            normals.append((pixels / 255, masks.sample(foreground(pixels), rng)))
        return Gate.fit(shots, normals)

    def batch(
        self, rank: int = 0, size: int = 1
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Text]:
        """Draw the data of the current step: latents, noise, levels, masks, pairs and text.

        Every process draws the samples of all of them and keeps every ``size``-th one.
        """
        count = self.config.batch
        rng = np.random.default_rng((self.config.seed, self.step, 0))
        generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
        images, masks, numbers = [], [], []
        for _ in range(count):
            number = int(rng.integers(len(self.pairs)))
            of_pair = [one for one in self.shots if (one[0].product, one[0].defect) == self.pairs[number]]
            _, pixels, mask = of_pair[int(rng.integers(len(of_pair)))]
            pixels, mask = flipped((pixels, mask), self.config.flips, rng)
            view = view_of(mask, self.backbone.resolution, self.config.crop, rng)
            images.append(view.image(pixels))
            masks.append(view.mask(mask))
            numbers.append(number)
        device, own = self.backbone.device, slice(rank, None, size)
        pairs = torch.tensor(numbers[own], device=device)
        clean = self.backbone.encode(torch.stack(images[own]))
        noise = torch.randn(count, *clean.shape[1:], generator=generator)[own].to(device)
        text = {key: value[pairs] for key, value in self.texts.items()}
        level = self.backbone.draw_levels(count, generator)[own].to(device)
        return clean, noise, level, torch.stack(masks[own]).to(device), pairs, text

    def update(self, accelerator: Any) -> float:
        """Do one step and return its loss, the mean over all processes."""
        config = self.config
        scale = rate_scale(self.step, config.steps)
        with_lora = self.step >= config.lora_after * config.steps
        for index, (group, rate) in enumerate(zip(self.optimizer.param_groups, self.rates)):
            group["lr"] = rate * scale * (1.0 if index == 0 or with_lora else 0.0)
        self.backbone.pipe.transformer.train(False)
        data = self.batch(accelerator.process_index, accelerator.num_processes)
        loss = masked_loss(self.backbone, self.concept, *data)
        accelerator.backward(loss)
        loss = loss.detach()
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        if accelerator.num_processes > 1:
            loss = _average(accelerator, parameters, loss)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.losses.append(float(loss))
        return self.losses[-1]

    def finished(self) -> Concept:
        """Return the concept as learned so far."""
        done = max(0, self.step - round(self.config.lora_after * self.config.steps))
        self.concept.settings = replace(self.concept.settings, steps=self.step, lora_steps=done if self.lora else 0)
        self.concept.lora = lora_state(self.backbone.pipe.transformer) if self.lora else {}
        return self.concept

    def close(self) -> None:
        """Take the LoRA off the pipeline's transformer."""
        if self.lora:
            remove_lora(self.backbone.pipe.transformer)
            self.lora = []

    def save(self, folder: Path) -> None:
        """Write the checkpoint, atomically.

        Raises:
            DitAttnError: the disk is full or the folder cannot be written; the previous checkpoint stays.
        """
        state = {
            "config": asdict(self.config), "pairs": list(self.concept.settings.pairs), "step": self.step,
            "losses": self.losses, "concept": self.concept.state_dict(), "optimizer": self.optimizer.state_dict(),
            "lora": [parameter.data for parameter in self.lora],
        }  # fmt: skip
        files.write_checkpoint(folder / CHECKPOINT, state)

    def restore(self, folder: Path) -> None:
        """Go on from the checkpoint of a folder.

        Raises:
            DitAttnError: there is none, it cannot be read, or it is of other shots or settings.
        """
        path = folder / CHECKPOINT
        if not path.is_file():
            raise DitAttnError(f"nothing to resume: there is no {path}; leave out --resume")
        try:
            state = torch.load(path, map_location=self.backbone.device, weights_only=True)
            same = state["config"] == asdict(self.config) and state["pairs"] == list(self.concept.settings.pairs)
        except Exception as error:
            raise DitAttnError(f"{path} cannot be read ({type(error).__name__}); delete it and start again") from error
        if not same:
            raise DitAttnError(f"{path} belongs to a training with other settings; choose another --output")
        self.step, self.losses = state["step"], state["losses"]
        self.concept.load_state_dict(state["concept"])
        for parameter, value in zip(self.lora, state["lora"], strict=True):
            parameter.data.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])


def masked_loss(
    backbone: Backbone,
    concept: Concept,
    clean: torch.Tensor,
    noise: torch.Tensor,
    level: torch.Tensor,
    masks: torch.Tensor,
    pairs: torch.Tensor,
    text: Text,
) -> torch.Tensor:
    """Compute the masked loss of a batch, as :meth:`ConceptTraining.batch` draws it."""
    errors = backbone.errors(clean, noise, level, concept.extend(text, backbone.family.masked, pairs, masks))
    cover = backbone.cells(masks, backbone.factor).expand(-1, clean.shape[1], -1, -1)
    inside = backbone.pack(cover).to(errors)
    inner = (errors * inside).flatten(1).sum(1) / inside.flatten(1).sum(1).clamp(min=1)
    return (inner + _FULL * errors.flatten(1).mean(1)).mean()


def filled(template: str, product: str, defect: str) -> str:
    """Fill a template.

    Raises:
        DitAttnError: it has a field other than ``{product}`` and ``{defect}``.
    """
    try:
        return template.format(product=product, defect=defect)
    except (KeyError, IndexError, ValueError) as error:
        raise DitAttnError(f"the template {template!r} may have {{product}} and {{defect}} only") from error


def rate_scale(step: int, steps: int) -> float:
    """Return the factor of a learning rate: ten steps up from 0, and a line down over the second half."""
    return min(1.0, (step + 1) / 10, max(0.05, 2 * (steps - step) / steps))


def train(
    backbone: Backbone,
    source: Source,
    config: TrainConfig,
    folder: Path,
    *,
    model: str = "",
    resume: bool = False,
    free_text: bool = False,
    checkpointing: bool = False,
    on_progress: Callable[[int, int, float], None] | None = None,
) -> Concept:
    """Learn the anomalies of ``source``; a checkpoint is left on every way out, the concept at the end.

    Several processes of ``accelerate launch`` share every batch; the first one writes.

    Args:
        backbone: the pipeline; it is as before at the end, except for freed text encoders.
        source: shots and normal images.
        config: how.
        folder: of ``concept.safetensors`` and the checkpoint.
        model: name of the model, for the concept file.
        resume: go on from the checkpoint in ``folder``.
        free_text: drop the text encoders once the prompts are encoded.
        checkpointing: compute activations twice instead of storing them; what is learned is the same.
        on_progress: callback(done, total, loss).

    Raises:
        DitAttnError: data that cannot be used, a batch that does not divide by the processes, or the disk is full.
    """
    from accelerate import Accelerator

    transformer = backbone.pipe.transformer
    trainable = {name: p.requires_grad for name, p in transformer.named_parameters()}
    checkpointed = transformer.is_gradient_checkpointing
    training = ConceptTraining(backbone, source, config, model)
    try:
        if free_text:
            backbone.free_text_encoders()
        if checkpointing:
            transformer.enable_gradient_checkpointing()
        if resume:
            training.restore(folder)
        accelerator = Accelerator(cpu=backbone.device.type == "cpu")
        check_batch(config.batch, accelerator.num_processes)
        main, saved = accelerator.is_main_process, time.monotonic()
        try:
            while training.step < config.steps:
                loss = training.update(accelerator)
                if on_progress is not None and main:
                    on_progress(training.step, config.steps, loss)
                if main and (training.step % config.save_every == 0 or time.monotonic() - saved > 300):
                    training.save(folder)
                    saved = time.monotonic()
        finally:
            if main:
                training.save(folder)
        concept = training.finished()
        if main:
            concept.save(folder / "concept.safetensors")
        return concept.to("cpu")
    finally:
        training.close()
        if checkpointing and not checkpointed:
            transformer.disable_gradient_checkpointing()
        for name, parameter in transformer.named_parameters():
            parameter.requires_grad_(trainable[name])


def _names(shots: Sequence[Shot]) -> list[str]:
    return [f"{shot.product}+{shot.defect}/{shot.image.name}" for shot in shots]


def check_batch(batch: int, processes: int) -> None:
    """Refuse a batch of which every process cannot have an equal part.

    Raises:
        DitAttnError: so it is.
    """
    if batch % processes:
        raise DitAttnError(
            f"--train-batch {batch} is shared by {processes} processes and does not divide by them; give a multiple"
        )


def _average(accelerator: Any, parameters: Sequence[torch.nn.Parameter], loss: torch.Tensor) -> torch.Tensor:
    """Average gradients and the loss over all processes, in one message; the frozen transformer is left alone."""
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    grads = [parameter.grad for parameter in parameters if parameter.grad is not None]
    every = accelerator.reduce(torch.cat([loss.view(1), *(grad.flatten() for grad in grads)]), "mean")
    for grad, mean in zip(grads, every[1:].split([grad.numel() for grad in grads])):
        grad.copy_(mean.view_as(grad))
    return every[0]
