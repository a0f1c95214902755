"""What the flags of ``dit-attn finetune`` say of the training and of the runs that draw its examples."""

from __future__ import annotations

from typing import Any

from dit_attn.cli import jobs as job_files
from dit_attn.cli.captions import shuffled_captions
from dit_attn.cli.commands.finetune import early
from dit_attn.cli.model_source import Source
from dit_attn.cli.options import Options
from dit_attn.pipelines.finetune.config import FinetuneConfig

RUNS = 64


def config_of(options: Options, method: Any) -> FinetuneConfig:
    """Return how a method is tuned, by the flags."""
    names = (
        "stage", "loss", "batch", "lr", "warmup", "ema", "rank", "gradient_checkpointing", "log_every",
        "checkpoint_every", "seed",
    )  # fmt: skip
    given = options.pick(*names)
    given["bf16"] = options.get("mixed_precision") == "bf16"
    if "train_steps" in options:
        given["steps"] = options["train_steps"]
    return FinetuneConfig(method, densities=early.densities(options), **given)


def prompts_of(options: Options, source: Source) -> list[str]:
    """Return the prompts of the teacher's runs."""
    if not early.has_prompts(options):
        return shuffled_captions(source.defaults, False, options.get("runs", RUNS))
    jobs = job_files.make_jobs(options.values, source.defaults)
    return [jobs[i % len(jobs)].prompt for i in range(options.get("runs", len(jobs)))]


def call_of(options: Options, source: Source) -> dict[str, Any]:
    """Return the arguments of the teacher's calls."""
    values = options.values if early.has_prompts(options) else {**options.values, "prompt": ["a caption"]}
    return job_files.make_jobs(values, source.defaults)[0].call
