"""Validation by workers: the trained tensors go to them as a file, and losses of held-out examples come back."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import uuid4

from dit_attn import files
from dit_attn.errors import RunStopped
from dit_attn.pipelines.finetune.config import FinetuneConfig
from dit_attn.pipelines.finetune.loop import Finetune
from dit_attn.pipelines.run import Answers
from dit_attn.processors.methods.base import Method


class ValidationByWorkers:
    """Has the losses of held-out examples measured; for ``validate`` of :class:`Finetune`.

    Args:
        answers: measures one example per request, see :class:`ValidationRequests`.
        folder: where the trained tensors lie for as long as that takes; workers see it.
    """

    def __init__(self, answers: Answers, folder: Path) -> None:
        self.answers, self.folder = answers, folder

    def __call__(self, job: Finetune) -> list[float]:
        """Return the losses, in the order of the examples.

        Raises:
            RunStopped: the tensors cannot be written.
            JobFailed: an example that no worker could measure.
        """
        if not job.held_out:
            return []
        path = self.folder / f"{files.TEMPORARY}{uuid4().hex}.pt"
        shared = {"tensors": str(path), "method": job.method.to_dict()}
        requests = [{**shared, "example": str(file), "place": place} for place, file in enumerate(job.held_out)]
        state = {"trained": {name: value.detach() for name, value in job.trained.items()}}
        try:
            files.write_checkpoint(path, state, RunStopped)
            found = dict(self.answers(requests))
        finally:
            path.unlink(missing_ok=True)
        return [found[place] for place in range(len(requests))]


class ValidationRequests:
    """Measures requested examples with the tensors of a training elsewhere; the files are read once per training step.

    Args:
        pipe: the pipeline that is trained, as it was before.
        config: of the training.
    """

    def __init__(self, pipe: Any, config: FinetuneConfig) -> None:
        self.pipe, self.config = pipe, config
        self._job: Finetune | None = None
        self._tensors = ""

    def __call__(self, request: dict[str, Any]) -> float:
        """Return the loss of one example.

        Args:
            request: JSON values: file of the ``tensors``, settings of the ``method``, file of the ``example``, and its
                ``place`` among those held out.
        """
        example = Path(request["example"])
        if self._job is None:
            self._job = Finetune(self.pipe, self.config, [example])
        if request["tensors"] != self._tensors:
            path = Path(request["tensors"])
            self._job.use(Method.from_dict(request["method"]))
            self._job.load(files.read_weights(path)["trained"], path)
            self._tensors = request["tensors"]
        return self._job.validation_loss(example, request["place"])
