"""The loop of a fine-tuning: one method, one transformer, checkpoints that a later process continues."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dit_attn.api import disable, enable
from dit_attn.errors import DitAttnError, RunStopped
from dit_attn.pipelines.finetune.checkpoint import read_checkpoint, write_checkpoint
from dit_attn.pipelines.finetune.config import FinetuneConfig
from dit_attn.pipelines.finetune.examples import Example, read_example, split
from dit_attn.pipelines.finetune.objective import Parameterization, prepare, weighted_error
from dit_attn.pipelines.finetune.result import export, gather
from dit_attn.pipelines.finetune.sharding import shard_model, split_like
from dit_attn.processors.methods.base import Method

CHECKPOINT = "checkpoint.pt"
_SPLIT_OTHERWISE = ("DEEPSPEED", "MEGATRON_LM")
_TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"]


class Finetune:
    """A fine-tuning in memory.

    Args:
        pipe: a pipeline with one transformer, which is trained in place; other parts are not touched.
        config: the settings.
        examples: files of examples.
        validate: returns the losses of the held-out examples; ``None``: they are measured in this process.
        fsdp: split the model over the processes of the launch (FSDP 2); so does a launch with FSDP. Then all processes
            call ``save``, ``restore`` and ``export``.

    Attributes:
        step: optimizer steps done.
        trained: what is trained, by name.
        average: moving averages of that; empty where none is wanted.
        shell: what a split model is put together in, ``None`` for one that is whole.
        log: entries ``{"step", "loss", "held_out", ...}``.

    Raises:
        DitAttnError: two transformers, a method that does not fit the model, a loss that does not fit it or the
            examples, peft missing for stage lora, one process to split a model over, a launch with another way to split
            it.
    """

    def __init__(
        self,
        pipe: Any,
        config: FinetuneConfig,
        examples: Sequence[Path],
        validate: Callable[[Finetune], list[float]] | None = None,
        fsdp: bool = False,
    ) -> None:
        from accelerate import Accelerator

        if getattr(pipe, "transformer_2", None) is not None:
            raise DitAttnError(f"{type(pipe).__name__} has two transformers; give a pipeline of the one to tune")
        self.pipe, self.config, self.model = pipe, config, pipe.transformer
        self.training, self.held_out = split(examples, config.held_out)
        if not self.training:
            raise DitAttnError("no examples to train on; give --data with more, or more prompts")
        self.about = Parameterization.of(pipe)
        clean = read_example(self.training[0]).clean
        self.about.check(config, clean)
        device = next(self.model.parameters()).device
        self.accelerator = Accelerator(cpu=device.type == "cpu")
        kind = self.accelerator.distributed_type.value
        if kind in _SPLIT_OTHERWISE:
            raise DitAttnError(f"a model that {kind} splits cannot be tuned; launch without it and split with --fsdp")
        fsdp |= kind == "FSDP"
        if fsdp and self.accelerator.num_processes == 1:
            raise DitAttnError("one process has nothing to split the model over; launch several, or leave out --fsdp")
        disable(pipe)
        self._teacher = copy.deepcopy(self.model).eval() if clean and config.loss == "teacher" else None
        self.method = config.method_at(0)
        self.session = enable(self.model, self.method)
        self.trained = self._choose()
        if config.gradient_checkpointing:
            self.model.enable_gradient_checkpointing()
        self.transformer = type(self.model).__name__
        self.shell = shard_model(self.model) if fsdp else None
        if fsdp:
            self.trained = {name: value for name, value in self.model.named_parameters() if name in self.trained}
        self.optimizer = torch.optim.AdamW(
            self.trained.values(), lr=config.lr, betas=config.betas, weight_decay=config.weight_decay
        )
        self.average = {name: value.detach().clone() for name, value in self.trained.items()} if config.ema else {}
        self.validate = validate
        self.device, self.step, self.seconds, self.saved = device, 0, 0.0, -1
        self.log: list[dict[str, float]] = []
        self.call: Any = self.model
        if self.accelerator.num_processes > 1 and not fsdp:
            self.call, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)

    def _choose(self) -> dict[str, torch.nn.Parameter]:
        """The parameters to train, by name; the others are frozen."""
        self.model.requires_grad_(False)
        if self.config.stage == "lora":
            try:
                from peft import LoraConfig
            except ImportError as error:
                raise DitAttnError("stage lora needs the library peft: `pip install 'dit-attn[lora]'`") from error
            names = [name for name, _ in self.model.named_modules()]
            targets = [name for name in _TARGETS if any(path.endswith(f".{name}") for path in names)]
            self.model.add_adapter(LoraConfig(r=self.config.rank, lora_alpha=self.config.rank, target_modules=targets))
        elif self.config.stage == "full":
            self.model.requires_grad_(True)
        for parameter in self.session.learned.parameters():
            parameter.requires_grad_(True)
        found = {name: value for name, value in self.model.named_parameters() if value.requires_grad}
        if not found:
            raise DitAttnError(f"{self.method.slug} has nothing to train with these settings; use stage full or lora")
        return found

    # -- one step ----------------------------------------------------------------------------------------------------

    def predict(self, arguments: dict[str, Any]) -> torch.Tensor:
        """Return the transformer's prediction with the method enabled."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            return self.call(**arguments, return_dict=False)[0]

    def _ask_teacher(self, arguments: dict[str, Any]) -> torch.Tensor:
        assert self._teacher is not None
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.bf16):
            return self._teacher(**arguments, return_dict=False)[0]

    def loss_of(self, example: Example, generator: torch.Generator) -> torch.Tensor:
        """Return the loss of one example."""
        example = example.to(self.device)
        arguments, target, weight = prepare(example, self.about, self.config, generator, self._ask_teacher)
        loss = weighted_error(self.predict(arguments), target, weight)
        added = self.method.auxiliary_loss(self.session.learned.modules())
        return loss if added is None else loss + added

    def train_step(self) -> float:
        """Do one optimizer step and return its loss.

        Raises:
            RunStopped: the loss is not finite; nothing is updated.
        """
        self._follow_schedule()
        self.model.train()
        generator = torch.Generator().manual_seed(self.config.seed * 1_000_003 + self.step)
        each = self.config.batch * self.accelerator.num_processes
        places = torch.randint(len(self.training), (each,), generator=generator).tolist()
        mine = list(enumerate(places))[self.accelerator.process_index :: self.accelerator.num_processes]
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * min(1.0, (self.step + 1) / max(1, self.config.warmup))
        total = 0.0
        for position, place in mine:  # noise by the position in the batch: the same on any number of processes
            generator = torch.Generator().manual_seed((self.config.seed * 1_000_003 + self.step) * 65_537 + position)
            loss = self.loss_of(read_example(self.training[place]), generator) / len(mine)
            found = self._of_all(loss)
            if not bool(torch.isfinite(found).all()):
                self.optimizer.zero_grad(set_to_none=True)
                raise RunStopped(
                    f"the loss of step {self.step + 1} is not finite; the checkpoint of step {max(self.saved, 0)} is "
                    "kept: resume it with a smaller --lr"
                )
            self.accelerator.backward(loss)
            total += float(found.mean())
        torch.nn.utils.clip_grad_norm_(self.trained.values(), self.config.clip)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self._update_average()
        return total

    def _of_all(self, loss: torch.Tensor) -> torch.Tensor:
        """The losses of all processes: they stop together."""
        own = loss.detach().float().reshape(1)
        return self.accelerator.gather(own) if self.accelerator.num_processes > 1 else own

    def _follow_schedule(self) -> None:
        """Enable the method with the density of this part of the run."""
        self.use(self.config.method_at(self.step))

    @torch.no_grad()
    def _update_average(self) -> None:
        if self.average:
            decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
            live = [self.trained[name].detach() for name in self.average]
            torch._foreach_lerp_(list(self.average.values()), live, 1 - decay)

    def held_out_loss(self) -> float | None:
        """Return the mean loss of the held-out examples, with the same noise every time; ``None`` without any."""
        if self.validate is not None:
            losses = self.validate(self)
        else:
            losses = [self.validation_loss(path, place) for place, path in enumerate(self.held_out)]
        return sum(losses) / len(losses) if losses else None

    @torch.no_grad()
    def validation_loss(self, path: Path, place: int) -> float:
        """Return the loss of the held-out example at ``place``, whose noise depends on that place alone."""
        self.model.eval()
        generator = torch.Generator().manual_seed(self.config.seed * 65_537 + place)
        return float(self.loss_of(read_example(path), generator))

    def use(self, method: Method) -> None:
        """Enable the method with other settings; what it has learned stays."""
        if method != self.method:
            self.method, self.session = method, enable(self.model, method)

    # -- the run -----------------------------------------------------------------------------------------------------

    def fit(self, folder: Path, on_step: Callable[[int, float], None] = lambda step, loss: None) -> None:
        """Train to the last step; a checkpoint is left on every way out but that of a loss that is not finite.

        Of a split model, whose processes may be stopped at different points, the last one of the schedule is left.

        Args:
            folder: of the checkpoint.
            on_step: callback(step, loss).

        Raises:
            RunStopped: the loss is not finite, or the checkpoint cannot be written.
        """
        folder.mkdir(parents=True, exist_ok=True)
        recent: list[float] = []
        last = time.monotonic()
        if self.step == 0:
            self._note([])
        try:
            while self.step < self.config.steps:
                recent.append(self.train_step())
                self.seconds, last = self.seconds + time.monotonic() - last, time.monotonic()
                on_step(self.step, recent[-1])
                if self.step % self.config.log_every == 0 or self.step == self.config.steps:
                    self._note(recent)
                    recent = []
                    last = time.monotonic()
                if self.step % self.config.checkpoint_every == 0:
                    self.save(folder)
        except RunStopped:
            raise
        except BaseException:
            if self.shell is None:
                self.save(folder)
            raise
        self.save(folder)

    def _note(self, losses: list[float]) -> None:
        entry: dict[str, float] = {"step": self.step, "seconds": round(self.seconds, 2)}
        if losses:
            entry["loss"] = sum(losses) / len(losses)
        held_out = self.held_out_loss()
        if held_out is not None:
            entry["held_out"] = held_out
        density = getattr(self.method, "density", None)
        if isinstance(density, float):
            entry["density"] = density
        self.log.append(entry)

    def save(self, folder: Path) -> None:
        """Write the checkpoint, atomically; that of a split model is as one process would write it.

        Raises:
            RunStopped: it cannot be written; the previous one stays.
        """
        write_checkpoint(self, folder / CHECKPOINT)

    def restore(self, folder: Path) -> None:
        """Continue from the checkpoint in ``folder``.

        Raises:
            DitAttnError: none, an unreadable one, or one of another model or other settings.
        """
        read_checkpoint(self, folder / CHECKPOINT)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
        """Load the trained tensors that a file holds.

        Raises:
            DitAttnError: they are of another model.
        """
        for name, value in self.trained.items():
            if name not in tensors or tensors[name].shape != value.shape:
                raise DitAttnError(f"{path} is of another model: {name} is missing or of another shape")
        for name, value in self.trained.items():
            value.copy_(split_like(tensors[name], value))

    # -- the result --------------------------------------------------------------------------------------------------

    def gather(self) -> None:
        """Put a split model together in the main process, where it takes the pipeline's place; all processes call it.

        It is for :meth:`export` then, not for training. Other models stay as they are.
        """
        gather(self)

    def export(self, folder: Path, weights: bool = True) -> list[Path]:
        """Write what was tuned: ``method``, and ``transformer`` or ``lora``. The pipeline stays enabled and tuned.

        The moving average takes the place of the tensors where there is one. A split model is gathered before.

        Args:
            folder: where the folders are written.
            weights: write the transformer, or the adapters, too.

        Returns:
            The folders.
        """
        return export(self, folder, weights)
