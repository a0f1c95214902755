"""The training loop of the embedded models: rectified flow, the network predicts the clean sample.

The input is `x_s = (1 - s) x0 + s eps`; the loss is the squared error of the velocity that the prediction implies,
`|x0_hat - x0|^2 / max(s, s_min)^2` (Li and He 2025, "Back to basics", table 1: x-prediction with v-loss).
Hidden matrices are updated by Muon (Jordan 2024), everything else by AdamW.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dit_attn import files
from dit_attn.errors import DitAttnError
from dit_attn.machine import multiplies_bf16
from dit_attn.models import nets
from dit_attn.models.data import Batch, draw
from dit_attn.models.optimizers import build_optimizers
from dit_attn.models.recipe import Recipe
from dit_attn.models.trainee import Trainee
from dit_attn.models.warmstart import warm_start

CHECKPOINT = "checkpoint.pt"
LOG_EVERY = 50


def loss_of(model: Callable[..., torch.Tensor], batch: Batch, min_level: float) -> torch.Tensor:
    """Compute the mean squared error of the implied velocity, weighted where the batch says so."""
    predicted = model(batch.noisy, batch.level, batch.ids, batch.mask, batch.rest).float()
    error = (predicted - batch.clean).square()
    error = (error if batch.weight is None else error * batch.weight).flatten(1).mean(1)
    return (error / batch.level.clamp(min=min_level).square()).mean()


@dataclass
class Run:
    """A training run in memory: everything that a checkpoint holds."""

    recipe: Recipe
    seed: int
    device: torch.device
    step: int = 0
    seconds: float = 0.0
    log: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.tokenizer = nets.build_tokenizer(self.recipe.kind, self.recipe.net.text_length)
        self.model = Trainee(self.recipe.family, self.tokenizer, self.recipe.net)
        if self.recipe.warm_start:
            warm_start(self.model, self.recipe.warm_start)
        self.model.to(self.device)
        self.average = {k: v.detach().clone() for k, v in self.model.state_dict().items()}
        self.optimizers = build_optimizers(self.model, self.recipe)
        self.base_lr = [o.param_groups[0]["lr"] for o in self.optimizers]

    def batch(self) -> Batch:
        """Draw the data of the current step."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.step)
        return draw(self.recipe, self.recipe.stage_at(self.step), self.tokenizer, generator, self.device)

    @torch.no_grad()
    def update_average(self) -> None:
        """Update the exponential moving average of the weights, with a warm-up."""
        decay = min(self.recipe.ema, (1 + self.step) / (10 + self.step))
        live = self.model.state_dict()
        floats = [k for k, v in live.items() if v.is_floating_point()]
        torch._foreach_lerp_([self.average[k] for k in floats], [live[k] for k in floats], 1 - decay)

    def averaged(self) -> Trainee:
        """Copy the model with the averaged weights, for evaluation and export."""
        model = Trainee(self.recipe.family, self.tokenizer, self.recipe.net)
        model.load_state_dict({k: v.cpu() for k, v in self.average.items()})
        return model.eval().requires_grad_(False)

    def save(self, folder: Path) -> None:
        """Write the checkpoint, atomically.

        Raises:
            DitAttnError: the disk is full or the folder cannot be written; the previous checkpoint stays.
        """
        state = {
            "name": self.recipe.name,
            "tail": self.recipe.is_tail,
            "seed": self.seed,
            "step": self.step,
            "seconds": self.seconds,
            "log": self.log,
            "model": self.model.state_dict(),
            "average": self.average,
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        files.write_checkpoint(folder / CHECKPOINT, state)

    def restore(self, folder: Path) -> None:
        """Continue from the checkpoint in `folder`.

        Raises:
            DitAttnError: no checkpoint, an unreadable one, or one of another model.
        """
        path = folder / CHECKPOINT
        if not path.is_file():
            raise DitAttnError(f"nothing to resume: {path} does not exist; leave out --resume to start a new run")
        try:
            state = torch.load(path, map_location=self.device, weights_only=True)
            name, tail = state["name"], state.get("tail", False)
        except Exception as error:
            raise DitAttnError(
                f"{path} is not a readable training checkpoint ({type(error).__name__}); delete it and start again"
            ) from error
        if name != self.recipe.name:
            raise DitAttnError(f"{path} belongs to {name!r}, not {self.recipe.name!r}; choose another --output")
        if tail != self.recipe.is_tail:
            kind, flag = ("a tail", "add --tail") if tail else ("a whole training", "leave out --tail")
            raise DitAttnError(f"{path} belongs to {kind} of {name!r}; {flag} or choose another --output")
        self.seed, self.step, self.seconds, self.log = (state[k] for k in ("seed", "step", "seconds", "log"))
        self.model.load_state_dict(state["model"])
        self.average = state["average"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def fit(
    run: Run,
    folder: Path,
    *,
    minutes: float | None = None,
    checkpoint_minutes: float = 5.0,
    evaluate: Callable[[Run], dict[str, float]] | None = None,
    eval_every: int = 0,
    quiet: bool = False,
) -> None:
    """Train `run` up to its recipe's last step, or for `minutes`; a checkpoint is left on every way out.

    Args:
        evaluate: called every `eval_every` steps; what it returns goes into the log.
    """
    from accelerate import Accelerator
    from tqdm.auto import tqdm

    accelerator = Accelerator(cpu=run.device.type == "cpu")
    model = accelerator.prepare_model(run.model, device_placement=False)
    folder.mkdir(parents=True, exist_ok=True)
    started = saved = last = time.monotonic()
    bar = tqdm(total=run.recipe.steps, initial=run.step, unit="step", disable=True if quiet else None)
    recent: list[float] = []
    try:
        while run.step < run.recipe.steps and (minutes is None or time.monotonic() - started < minutes * 60):
            recent.append(_step(run, model, accelerator))
            now = time.monotonic()
            run.seconds, last = run.seconds + now - last, now
            bar.update()
            if run.step % LOG_EVERY == 0:
                _report(run, {"loss": sum(recent) / len(recent), "seconds": run.seconds}, bar, quiet)
                recent.clear()
            if evaluate and eval_every and run.step % eval_every == 0:
                _report(run, evaluate(run), bar, quiet)
                last = time.monotonic()
            if now - saved > checkpoint_minutes * 60:
                run.save(folder)
                saved = now
    finally:
        run.save(folder)
        bar.close()


def _report(run: Run, values: dict[str, float], bar: Any, quiet: bool) -> None:
    """Put `values` into the log, on the progress bar, and on a line of its own where there is no bar."""
    entry = {"step": run.step, **{name: round(value, 4) for name, value in values.items()}}
    run.log.append(entry)
    bar.set_postfix(values, refresh=False)
    if bar.disable and not quiet:
        print(" ".join(f"{name}={value}" for name, value in entry.items()), flush=True)


def _in_precision(model: torch.nn.Module, run: Run) -> Callable[..., torch.Tensor]:
    """`model` under autocast where the recipe asks for bf16 and the device multiplies it; recipes may differ."""
    enabled = run.recipe.precision == "bf16" and multiplies_bf16(run.device)

    def predict(*inputs: Any) -> torch.Tensor:
        with torch.autocast(run.device.type, torch.bfloat16, enabled=enabled):
            return model(*inputs)

    return predict


def _step(run: Run, model: torch.nn.Module, accelerator: Any) -> float:
    """One update; returns the loss."""
    run.model.train()
    scale = run.recipe.lr_scale(run.step)
    for optimizer, lr in zip(run.optimizers, run.base_lr, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr * scale
    loss = loss_of(_in_precision(model, run), run.batch(), run.recipe.min_level)
    accelerator.backward(loss)
    torch.nn.utils.clip_grad_norm_(run.model.parameters(), run.recipe.clip)
    for optimizer in run.optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    run.step += 1
    run.update_average()
    return float(loss.detach())
