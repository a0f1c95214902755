"""What ``dit-attn finetune`` can refuse before torch is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dit_attn.cli import engines, method_options
from dit_attn.cli import jobs as job_files
from dit_attn.cli.captions import has_captions
from dit_attn.cli.early_check import check_early
from dit_attn.cli.method_options import MethodSpec
from dit_attn.cli.model_source import locate
from dit_attn.cli.options import Options
from dit_attn.cli.source_index import constant
from dit_attn.cli.workers import process_rank
from dit_attn.errors import DitAttnError

TINY = "tiny-video"
"""Model of ``--tiny``."""
UNDIVIDED = "every step of a training begins where the one before has ended"
CHECKPOINT_MODULE = "dit_attn.pipelines.finetune.loop"


def check(options: Options) -> None:
    """Check the flags of a training as far as that goes without torch.

    Raises:
        DitAttnError: bad input.
    """
    if "model" not in options:
        raise DitAttnError("no model; give --model NAME (`dit-attn models` lists the embedded ones), or --tiny")
    engines.from_options(options, UNDIVIDED)
    check_early(options, together=True)
    method_spec(options)
    densities(options)
    if options.get("fsdp") and process_rank()[1] < 2:
        raise DitAttnError("--fsdp splits a model over processes, and this is one; start several, or leave it out")
    if options.get("device") == "mps":
        raise DitAttnError("--device mps cannot train; use auto, cpu, cuda or cuda:N")
    if "lr" in options and options["lr"] == 0.0:
        raise DitAttnError("--lr must be above 0, got 0")
    if options.get("data") is not None and has_prompts(options):
        raise DitAttnError("--data has examples, and prompts are for the teacher to draw some; give one of them")
    folder = output_of(options)
    checkpoint = folder / constant(CHECKPOINT_MODULE, "CHECKPOINT")
    if options.get("resume") and not checkpoint.exists():
        raise DitAttnError(f"nothing to resume: {checkpoint} does not exist; leave out --resume to start a new run")
    if not options.get("resume") and checkpoint.exists():
        raise DitAttnError(f"{folder} already holds a run; add --resume to continue it or choose another --output")
    kind, _, defaults = locate(options["model"], options.get("revision"), options.get("variant"))
    if "data" in options:
        return
    if has_prompts(options):
        job_files.make_jobs(options.values, defaults)
    elif not has_captions(kind, options["model"]):
        raise DitAttnError("no examples; give --data DIR, or --prompts FILE for the teacher to draw them")


def check_merge(options: Options) -> None:
    """Check the flags of a merge.

    Raises:
        DitAttnError: a model is missing.
    """
    for name in ("workers", "engine", "shard"):
        if name in options:
            raise DitAttnError(f"finetune merge adds tensors in one process; leave out --{name}")
    for name in ("base", "tuned", "target"):
        if not options.get(name):
            raise DitAttnError(f"finetune merge needs --{name} DIR, a transformer folder")


def method_spec(options: Options) -> MethodSpec:
    """Return the one method that is tuned: ``sla`` or ``moh`` where none is named.

    Raises:
        DitAttnError: several are.
    """
    named = options.config.get("method") or any(kind == "method" for kind, _ in options.words)
    if not named:
        settings = [text.partition("=") for kind, text in options.words if kind == "set"]
        name = options["what"]
        return MethodSpec(name, {key.removeprefix(f"{name}."): value for key, _, value in settings})
    specs = method_options.method_specs(options)
    if len(specs) != 1:
        raise DitAttnError(f"finetune takes one method, got {len(specs)}; give --method NAME, e.g. sla")
    return specs[0]


def densities(options: Options) -> tuple[float, ...]:
    """Return the densities of ``--densities``, empty without.

    Raises:
        DitAttnError: they are no numbers.
    """
    try:
        return tuple(float(part) for part in options.get("densities", "").split(",") if part.strip())
    except ValueError as error:
        raise DitAttnError(
            f"--densities must be numbers with commas between, such as 0.3,0.1,0.05, got {options['densities']!r}"
        ) from error


def has_prompts(options: Options) -> bool:
    """Return whether prompts were given."""
    return "prompt" in options or "prompts" in options


def output_of(options: Options) -> Path:
    """Return the folder of the run."""
    name: Any = Path(options["model"]).name
    return Path(options.get("output") or Path("outputs") / f"finetune-{name}").expanduser()
