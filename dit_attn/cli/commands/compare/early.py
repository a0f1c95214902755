"""What ``dit-attn compare`` can refuse before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dit_attn import files
from dit_attn.cli import engines, method_options
from dit_attn.cli import jobs as job_files
from dit_attn.cli.captions import has_captions
from dit_attn.cli.early_check import check_early
from dit_attn.cli.method_index import known_methods
from dit_attn.cli.model_source import locate
from dit_attn.cli.options import MAX_SEED, Options
from dit_attn.cli.output_address import check_output
from dit_attn.cli.source_index import constant
from dit_attn.errors import DitAttnError, cut, shorten, unknown

ALWAYS = ("psnr", "ssim", "none")  # need no network
_METRICS = "dit_attn.pipelines.compare.metrics"


def check(options: Options) -> None:
    """Check the flags as far as that goes without torch.

    Raises:
        DitAttnError: bad input.
    """
    engine, shard = engines.from_options(options)
    if options.get("match_strength") and (engine is not None or shard is not None):
        raise DitAttnError("--match-strength measures in one process; leave out --workers, --engine and --shard")
    check_early(options)
    check_output(options.get("output"))
    variants = method_options.method_variants(options)
    if not variants:
        raise DitAttnError("nothing to compare with dense; add --method NAME, e.g. --method block-sparse:density=0.25")
    for variant in variants:
        call_of(variant)
    wanted_metrics(options.get("metrics"), False)
    roles = {name: cls.role for name, cls in known_methods().items()}
    found = {roles.get(spec.name) for variant in variants for spec in variant if spec.name != method_options.CALL}
    if options.get("match_strength") and found <= {"sparse"}:  # a saved method may be of any role
        raise unguided()
    kind, _, defaults = locate(options["model"])
    if "held_out" not in options:
        for job in job_files.make_jobs(options.values, defaults):
            job_files.check_images(job)
    check_items(options, kind)


def unguided() -> DitAttnError:
    """Return the error for ``--match-strength`` without a method that guides."""
    return DitAttnError("--match-strength matches guidance methods, and none is compared; add --method softpag")


def check_items(options: Options, kind: str) -> None:
    """Refuse flags about the items that contradict each other.

    Args:
        options: the flags.
        kind: of the model, see :class:`~dit_attn.cli.model_source.Source`.

    Raises:
        DitAttnError: two sets of items, captions for a model that is not embedded, seeds given twice.
    """
    if "held_out" in options:
        if "prompt" in options or "prompts" in options:
            raise DitAttnError("--held-out and prompts together are two sets of items; give one of them")
        if not has_captions(kind, options["model"]):
            raise DitAttnError(
                f"--held-out {options['held_out']} is for embedded models of the shapes world, not for "
                f"{options['model']}; give --prompts FILE"
            )
    if "seeds" not in options:
        return
    parse_seeds(options["seeds"])
    for line, where in job_files.read_prompts(Path(options["prompts"]).expanduser()) if "prompts" in options else ():
        if "seed" in line:
            raise DitAttnError(
                f"--seeds {options['seeds']} and the seed {line['seed']} in {where} contradict each other; "
                "leave one of them out"
            )


def parse_seeds(text: str) -> tuple[int, ...]:
    """Read ``"0,1"`` as seeds.

    Raises:
        DitAttnError: not whole numbers in range, or one twice.
    """
    try:
        seeds = tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise DitAttnError(
            f"--seeds must be whole numbers with commas between, such as 0,1, got {shorten(text)}"
        ) from error
    if any(not 0 <= seed <= MAX_SEED for seed in seeds):
        raise DitAttnError(f"--seeds must be between 0 and {MAX_SEED}, got {shorten(text)}")
    if len(set(seeds)) < len(seeds):
        raise DitAttnError(f"--seeds names a seed twice: {shorten(text)}; every seed makes one item a prompt")
    return seeds


def wanted_metrics(text: str | None, shapes: bool) -> tuple[str, ...]:
    """Return the scores to compute besides PSNR and SSIM.

    Args:
        text: of ``--metrics``; ``None`` for the default.
        shapes: whether the model draws the shapes world.

    Raises:
        DitAttnError: an unknown one.
    """
    if text is None:
        return constant(_METRICS, "WORLD") if shapes else ()
    known = constant(_METRICS, "METRICS")
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in (*known, *ALWAYS):
            raise unknown("--metrics", name, (*known, *ALWAYS))
    return tuple(dict.fromkeys(name for name in names if name in known))


def call_of(variant: method_options.Variant) -> dict[str, Any]:
    """Return the arguments of the pipeline's call that a variant changes.

    Raises:
        DitAttnError: one is not YAML, of another type, or out of range.
    """
    given = [item for spec in variant if spec.name == method_options.CALL for item in spec.settings.items()]
    return job_files.typed_arguments({key: _value(key, value) for key, value in given}, method_options.CALL)


def _value(key: str, value: Any) -> Any:
    """A number, a truth value or a text, as YAML reads it."""
    try:
        return files.parse_yaml(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DitAttnError(f"call:{key}={cut(value, 60)}: {error}; put a text in quotes") from error
