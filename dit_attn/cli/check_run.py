"""Check a run by the rules of its pipeline and of its methods, before weights are loaded or a folder is made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from dit_attn.cli import jobs as job_files
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
            be read; a size that the pipeline refuses.
    """
    from dit_attn import api  # imports torch

    methods = tuple(methods)
    api.check_conflicts(methods)
    job_files.check_calls(jobs, source.pipeline)
    try:
        pipe = source.without_weights
    except DitAttnError:
        raise
    except Exception:  # a damaged configuration raises anything; loading says what is damaged
        return
    job_files.check_inputs(jobs, pipe)
    if methods:
        api.check(pipe, *methods)
