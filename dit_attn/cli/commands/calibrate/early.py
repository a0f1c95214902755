"""What ``dit-attn calibrate`` can refuse before torch is imported."""

from __future__ import annotations

from dit_attn.cli import engines, method_options
from dit_attn.cli import jobs as job_files
from dit_attn.cli.captions import has_captions
from dit_attn.cli.early_check import check_early
from dit_attn.cli.jobs import Job
from dit_attn.cli.model_source import locate
from dit_attn.cli.options import Options
from dit_attn.errors import DitAttnError
from dit_attn.hub import check_repository

UNDIVIDED = "calibrate chooses densities from the measurements of all items"


def check(options: Options) -> None:
    """Check the flags as far as that goes without torch.

    Raises:
        DitAttnError: bad input.
    """
    engines.from_options(options, UNDIVIDED)
    check_early(options)
    specs = method_options.method_specs(options)
    if len(specs) != 1:
        raise DitAttnError(f"calibrate takes one method, got {len(specs)}; give --method NAME, e.g. rectified-spaattn")
    if "cost" in options and "error" in options:
        raise DitAttnError("--cost and --error are two budgets; give one of them")
    for name in ("cost", "error"):
        if options.get(name) == 0.0:
            raise DitAttnError(f"--{name} must be above 0, got 0")
    if "check" in options and "held_out" in options:
        raise DitAttnError("--check and --held-out are two sets of items to compare on; give one of them")
    if "push_to_hub" in options:
        check_repository(options["push_to_hub"])
    densities(options)
    kind, _, defaults = locate(options["model"])
    check_captions(options, kind)
    if has_prompts(options):
        jobs = job_files.make_jobs(options.values, defaults)
        split(options, jobs)
        for job in jobs:
            job_files.check_images(job)


def has_prompts(options: Options) -> bool:
    """Return whether prompts were given."""
    return "prompt" in options or "prompts" in options


def densities(options: Options) -> list[float] | None:
    """Return the densities of ``--densities``, ``None`` without.

    Raises:
        DitAttnError: they are no numbers.
    """
    if "densities" not in options:
        return None
    try:
        return [float(part) for part in options["densities"].split(",")]
    except ValueError as error:
        raise DitAttnError(
            f"--densities must be numbers with commas between, such as 0.5,0.25,0.125, got {options['densities']!r}"
        ) from error


def check_captions(options: Options, kind: str) -> None:
    """Refuse captions of the shapes world for a model that does not know them.

    Args:
        options: the flags.
        kind: of the model, see :class:`~dit_attn.cli.model_source.Source`.

    Raises:
        DitAttnError: so it is, or there is no prompt.
    """
    if has_captions(kind, options["model"]):
        return
    for name in ("held_out",) if has_prompts(options) else ("held_out", "check"):
        if options.get(name):
            raise DitAttnError(
                f"--{name.replace('_', '-')} {options[name]} without prompts is for embedded models of the "
                f"shapes world, not for {options['model']}; give --prompts FILE with --items N --check N"
            )
    if not has_prompts(options):
        raise DitAttnError("no prompt; give --prompts FILE or --prompt TEXT several times")


def split(options: Options, jobs: list[Job]) -> tuple[list[Job], list[Job]]:
    """Split the prompts that were given into those to calibrate on and those to compare on.

    Raises:
        DitAttnError: too few of them.
    """
    count = options.get("check", 0) if has_prompts(options) else 0
    items = options.get("items", max(len(jobs) - count, 1))
    if items + count > len(jobs):
        raise DitAttnError(
            f"--items {items} and --check {count} need {items + count} prompts, there are {len(jobs)}; give more "
            "prompts or smaller numbers"
        )
    return jobs[:items], jobs[items : items + count]
