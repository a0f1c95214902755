"""Check a run by the rules of its pipeline and of its methods, before weights are loaded or a folder is made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from dit_attn.cli import jobs as job_files
from dit_attn.cli import modular_source
from dit_attn.cli.jobs import Job
from dit_attn.cli.model_source import Source
from dit_attn.errors import DitAttnError

if TYPE_CHECKING:
    from dit_attn.processors.methods.base import Method


def check_run(source: Source, jobs: Sequence[Job], methods: Iterable[Method] = ()) -> None:
    """Check methods that are enabled together, and the calls that they are enabled for.

    Args:
        source: the model.
        jobs: the calls.
        methods: enabled together.

    Raises:
        DitAttnError: methods that conflict, a layer or head that the model does not have, a file of heads that cannot
            be read; a size that the pipeline refuses; a method that has no negative prompt and needs one.
    """
    from dit_attn import api  # imports torch

    methods = tuple(methods)
    api.check_conflicts(methods)
    _check_negative(methods, jobs)
    job_files.check_calls(jobs, source.pipeline)
    if source.opened is not None:
        modular_source.check_calls(source.opened, jobs)
    try:
        pipe = source.without_weights
    except DitAttnError:
        raise
    except Exception:  # a damaged configuration raises anything; loading says what is damaged
        return
    job_files.check_inputs(jobs, pipe)
    if methods:
        api.check(pipe, *methods)


def _check_negative(methods: Iterable[Method], jobs: Iterable[Job]) -> None:
    """Refuse a method that moves away from a negative prompt where there is none."""
    for method in methods:
        lacking = [job for job in jobs if job.call.get("negative_prompt") is None]
        if method.has_negative and method.negative_prompt is None and lacking:
            raise DitAttnError(
                f"{lacking[0].where}: {method.slug} needs a negative prompt; give --negative-prompt TEXT, or "
                f"{method.slug}:negative_prompt=TEXT"
            )
