"""Draw the examples of a fine-tuning with the dense model: calls of its own runs, or what they end in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from dit_attn.api import disable
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.finetune.examples import LATENTS, TIME, Example, read_example, write_example
from dit_attn.pipelines.output import batch_of
from dit_attn.pipelines.run import Answers, answered_here
from dit_attn.pipelines.worker_share import WorkerShare

_LEFT_OUT = ("return_dict", "attention_kwargs", "joint_attention_kwargs", "cross_attention_kwargs")


def record_examples(
    pipe: Any,
    prompts: Sequence[str],
    folder: Path,
    *,
    calls_per_run: int = 4,
    clean: bool = False,
    seed: int = 0,
    call: dict[str, Any] | None = None,
    share: WorkerShare | None = None,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
    answers: Answers | None = None,
) -> list[Path]:
    """Run a stock pipeline, dense, and write examples of its runs; a run whose files are there is not made again.

    Args:
        pipe: the pipeline; enabled methods are disabled.
        prompts: one run each.
        folder: of the files.
        calls_per_run: calls of the transformer per run, drawn from all of them, with their results.
        clean: instead, the final latents of every run with the conditions of its first call.
        seed: of the first run; run n has ``seed + n``.
        call: further arguments of the pipeline's call.
        share: of this process, where several draw into one folder.
        on_progress: callback(done, total) after every run.
        answers: makes the runs elsewhere, see :class:`TeacherRuns`; ``None``: in this process.

    Returns:
        The files, those of the other processes too.

    Raises:
        DitAttnError: a pipeline whose latents are not those of its transformer, or a file that cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    share = share or WorkerShare()
    found: list[Path] = []
    requests: list[dict[str, Any]] = []
    for index, prompt in enumerate(prompts):
        paths = [folder / f"{index:05d}_{place}.safetensors" for place in range(1 if clean else calls_per_run)]
        if index % share.size == share.rank and not all(_is_example(path) for path in paths):
            requests.append({"prompt": prompt, "seed": seed + index, "files": [str(path) for path in paths]})
        found += paths
    done = len(prompts) - len(requests)
    for number in range(done):
        on_progress(number + 1, len(prompts))
    if answers is None:
        answers = answered_here(TeacherRuns(pipe, clean, call))
    for _ in answers(requests):
        done += 1
        on_progress(done, len(prompts))
    share.gather([])  # those of the other processes are there now
    return [path for path in found if path.exists()]


class TeacherRuns:
    """Makes requested runs of a stock pipeline and writes their examples.

    Args:
        pipe: the pipeline; enabled methods are disabled.
        clean: write the final latents, see :func:`record_examples`.
        call: further arguments of the pipeline's call.
    """

    def __init__(self, pipe: Any, clean: bool = False, call: dict[str, Any] | None = None) -> None:
        self.pipe, self.clean, self.call = pipe, clean, call or {}
        disable(pipe)

    def __call__(self, request: dict[str, Any]) -> None:
        """Make one run.

        Args:
            request: JSON values: ``prompt``, ``seed``, and the ``files`` that the examples are written to.
        """
        seed, paths = request["seed"], [Path(name) for name in request["files"]]
        calls, latents = _run(self.pipe, request["prompt"], torch.Generator("cpu").manual_seed(seed), self.call)
        chosen = [_clean(calls[0], latents, self.pipe)] if self.clean else _drawn(calls, len(paths), seed)
        for path, example in zip(paths, chosen):
            write_example(example, path)


def _is_example(path: Path) -> bool:
    """Whether a file is there and is an example: one that was cut off is made again."""
    try:
        return path.exists() and read_example(path) is not None
    except DitAttnError:
        return False


def _run(
    pipe: Any, prompt: str, generator: torch.Generator, call: dict[str, Any]
) -> tuple[list[Example], torch.Tensor]:
    """The transformer's calls of one run, and its final latents."""
    calls: list[Example] = []
    names = list(inspect.signature(pipe.transformer.forward).parameters)

    def record(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = {**dict(zip(names, args)), **kwargs}
        given = {name: value for name, value in given.items() if name not in _LEFT_OUT and value is not None}
        result = output[0] if isinstance(output, tuple) else output.sample
        calls.append(Example(given, result).to(torch.device("cpu")))

    handle = pipe.transformer.register_forward_hook(record, with_kwargs=True)
    try:
        with torch.no_grad():
            result = pipe(prompt=prompt, generator=generator, output_type="latent", **call)
    finally:
        handle.remove()
    made = batch_of(result)
    if not calls or made is None or not isinstance(made.items, torch.Tensor):
        raise DitAttnError(f"{type(pipe).__name__} called no transformer, or gives no latents; it cannot be a teacher")
    return calls, made.items.cpu()


def _drawn(calls: list[Example], count: int, seed: int) -> list[Example]:
    order = torch.randperm(len(calls), generator=torch.Generator().manual_seed(seed)).tolist()
    return [calls[place] for place in sorted(order[:count])]


def _clean(call: Example, latents: torch.Tensor, pipe: Any) -> Example:
    given: torch.Tensor = call.arguments[LATENTS]
    if given.shape[1:] != latents.shape[1:] or given.shape[0] % latents.shape[0]:
        raise DitAttnError(
            f"{type(pipe).__name__} gives latents of another shape than its transformer takes; use loss teacher"
        )
    repeated = latents.repeat(given.shape[0] // latents.shape[0], *[1] * (latents.ndim - 1)).to(given.dtype)
    return Example({**{k: v for k, v in call.arguments.items() if k != TIME}, LATENTS: repeated})
