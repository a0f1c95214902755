"""DOC"""

from __future__ import annotations

import shlex
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dit_attn.cli import jobs as job_files
from dit_attn.cli import runner
from dit_attn.cli.jobs import Job
from dit_attn.cli.model_source import Source
from dit_attn.cli.runner import Run
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.compare.records import Variant


@dataclass
class Setting:
    """Everything the command knows before it starts.

    Attributes:
        options: flags over the configuration file.
        model: the model.
        jobs: the items.
        variants: the competitors, dense first.
        runs: what the files of each competitor share, by label.
        device, dtype: of the weights.
        folder: where everything goes.
        command, argv: the command line.
    """

    options: dict[str, Any]
    model: Source
    jobs: list[Job]
    variants: tuple[Variant, ...]
    runs: dict[str, Run]
    device: Any
    dtype: Any
    folder: Path
    command: str
    argv: list[str]

    @property
    def first(self) -> Run:
        """The run of dense."""
        return self.runs[self.variants[0].label]

    def job_of(self, variant: Variant, job: Job) -> Job:
        """The job as this competitor calls it."""
        return replace(job, call={**job.call, **dict(variant.call)}) if variant.call else job


def new_setting(
    options: dict[str, Any],
    model: Source,
    jobs: list[Job],
    variants: tuple[Variant, ...],
    device: Any,
    dtype: Any,
    folder: Path,
    argv: list[str],
) -> Setting:
    """A setting with one folder a competitor; arguments as the attributes of :class:`Setting`.

    Raises:
        DitAttnError: two competitors whose settings come out the same.
    """
    known: dict[tuple[Any, ...], str] = {}
    for variant in variants:
        first = known.setdefault((variant.methods, variant.call), variant.label)
        if first != variant.label:
            raise DitAttnError(f"{variant.label!r} and {first!r} are the same settings; leave one of them out")
    names: Counter[str] = Counter()
    runs = {}
    for variant in variants:
        name = job_files.slug(variant.label, 80)
        names[name] += 1
        place = folder / (name if names[name] == 1 else f"{name}-{names[name]}")
        runs[variant.label] = runner.new_run(None, model, variant.methods, options, dtype, device, place, argv)
    command = shlex.join(["dit-attn", *argv])
    return Setting(options, model, jobs, variants, runs, device, dtype, folder, command, argv)
