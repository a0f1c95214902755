"""Predict the clean sample at one step of a run and decode it with the pipeline itself.

After that step the scheduler passes the prediction on to the end of the run unchanged, so that the pipeline's output is
the decoded prediction, with its autograd graph.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch

from dit_attn.errors import DitAttnError
from dit_attn.pipelines.transformers import transformers_of
from dit_attn.processors.attach.perturbed_pass import replaced_forwards


class Stop(Protocol):
    """Where a run is cut short.

    Attributes:
        at: fraction of the run.
        done: whether that step is over; set by :func:`stop_at_prediction`.
    """

    at: float
    done: bool


@contextmanager
def frozen_weights(pipe: Any) -> Iterator[None]:
    """Turn off the gradients of all weights: otherwise every activation of the plain pass would be saved."""
    parts = [part for part in vars(pipe).values() if isinstance(part, torch.nn.Module)]
    trainable = [parameter for part in parts for parameter in part.parameters() if parameter.requires_grad]
    for parameter in trainable:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trainable:
            parameter.requires_grad_(True)


@contextmanager
def stop_at_prediction(pipe: Any, stop: Stop) -> Iterator[None]:
    """Turn gradients on at the step ``stop.at`` and send its clean prediction straight to the decoder.

    Args:
        pipe: a stock pipeline; its scheduler and transformers are restored at the end.
        stop: the step; ``done`` is set after it.
    """
    scheduler = pipe.scheduler
    stock = type(scheduler)
    models = list(transformers_of(pipe).values())
    later_passes = ExitStack()
    last_output: list[Any] = []

    def step(self: Any, model_output: Any, timestep: Any, sample: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return_dict = kwargs.get("return_dict", True)
        if stop.done:
            result = sample
        elif torch.is_grad_enabled():
            result = clean_sample(self, model_output, timestep, sample)
            stop.done = True
            later_passes.enter_context(replaced_forwards({model: lambda *_, **__: last_output[-1] for model in models}))
        else:
            return stock.step(self, model_output, timestep, sample, *args, **kwargs)
        result = result.to(sample.dtype)
        return _StepOutput(result) if return_dict else (result,)

    def before(module: torch.nn.Module, args: Any) -> None:
        if not stop.done and _progress(scheduler) >= stop.at - 1e-9:
            torch.set_grad_enabled(True)

    def after(module: torch.nn.Module, args: Any, output: Any) -> None:
        if torch.is_grad_enabled() and not stop.done:
            last_output[:] = [_detached(output)]

    scheduler.__class__ = type(stock.__name__, (stock,), {"step": step})
    handles = [model.register_forward_pre_hook(before, prepend=True) for model in models]
    handles += [model.register_forward_hook(after) for model in models]
    try:
        yield
    finally:
        scheduler.__class__ = stock
        later_passes.close()
        for handle in handles:
            handle.remove()


class _StepOutput(tuple[Any, ...]):
    """The output of a scheduler's step, as a tuple and with the attribute ``prev_sample``."""

    def __new__(cls, sample: torch.Tensor) -> _StepOutput:
        return super().__new__(cls, (sample,))

    @property
    def prev_sample(self) -> Any:
        """The sample."""
        return self[0]


def _progress(scheduler: Any) -> float:
    """Fraction of the run that is done."""
    index = getattr(scheduler, "step_index", None)
    return (index or 0) / max(len(scheduler.timesteps), 1)


def _detached(output: Any) -> Any:
    if isinstance(output, torch.Tensor):
        return output.detach()
    if isinstance(output, dict):
        return type(output)(**{name: _detached(item) for name, item in output.items()})
    return type(output)(_detached(item) for item in output) if isinstance(output, (tuple, list)) else output


def clean_sample(scheduler: Any, prediction: torch.Tensor, timestep: Any, sample: torch.Tensor) -> torch.Tensor:
    """Return the clean sample x0 that a model prediction stands for.

    Args:
        scheduler: a diffusers scheduler.
        prediction: output of the model, of the shape of ``sample``.
        timestep: of the step.
        sample: noisy sample.

    Raises:
        DitAttnError: not known for this scheduler.
    """
    if getattr(scheduler, "step_index", 0) is None:
        scheduler._init_step_index(timestep)
    name = type(scheduler).__name__
    config = scheduler.config
    if name.startswith("FlowMatch"):
        sigma = scheduler.sigmas[scheduler.step_index].to(sample.device, sample.dtype)
        return sample - sigma * prediction
    kind = str(config.get("algorithm_type", ""))
    solver = config.get("predict_x0", False) or kind in ("dpmsolver++", "sde-dpmsolver++")
    if solver and hasattr(scheduler, "convert_model_output"):
        converted: torch.Tensor = scheduler.convert_model_output(prediction, sample=sample)
        return converted
    if name.startswith("DDIM") or name.startswith("CogVideoXDDIM"):
        alpha = scheduler.alphas_cumprod[int(timestep)].to(sample.device, sample.dtype)
        kinds = {
            "epsilon": lambda: (sample - (1 - alpha) ** 0.5 * prediction) / alpha**0.5,
            "v_prediction": lambda: alpha**0.5 * sample - (1 - alpha) ** 0.5 * prediction,
            "sample": lambda: prediction,
        }
        return kinds[config.prediction_type]()
    raise DitAttnError(
        f"the gradient needs the clean image that a step of {name} predicts, which is known for flow-matching "
        "schedulers, UniPC, DPM-Solver++ and DDIM; use another strategy or scheduler"
    )
