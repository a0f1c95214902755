"""What ``dit-attn search`` can refuse before torch is imported."""

from __future__ import annotations

import typing
from typing import Any

from dit_attn.cli import engines, method_options, resolve_methods
from dit_attn.cli import jobs as job_files
from dit_attn.cli.captions import knows_shapes
from dit_attn.cli.early_check import check_early
from dit_attn.cli.jobs import Job
from dit_attn.cli.method_index import known_methods
from dit_attn.cli.model_source import locate
from dit_attn.cli.options import Options
from dit_attn.errors import DitAttnError, unknown

SLUG = "softpag"
UNDIVIDED = "search chooses the heads of a round from the scores of all candidates"
_METHOD = ("scale", "u", "target", "joint")  # settings of the method that a search takes
_WEIGHTS = "its weights: give --weights DIR, a folder in the format of transformers"
_NEEDS = {  # objective -> flag -> what it is
    "style": {"style": 'its words: give --style "golden hour, warm glow"'},
    "pickscore": {"weights": _WEIGHTS},
    "hpsv2": {"weights": _WEIGHTS},
    "aesthetic": {
        "weights": "its CLIP model: give --weights DIR and --weights-head FILE",
        "weights_head": "the layers on top of its CLIP model: give --weights-head FILE",
    },
}


def check(options: Options) -> None:
    """Check the flags as far as that goes without torch.

    Raises:
        DitAttnError: bad input.
    """
    engines.from_options(options, UNDIVIDED)
    check_early(options)
    method_settings(options)
    for name, need in _NEEDS.get(options.get("objective", ""), {}).items():
        if not options.get(name):
            raise DitAttnError(f"the objective {options['objective']} needs {need}")
    kind, _, defaults = locate(options["model"])
    if has_prompts(options):
        wanted_jobs(options, job_files.make_jobs(options.values, defaults))
    elif not knows_shapes(kind, options["model"]):
        raise DitAttnError("no prompt; give --prompt TEXT or --prompts FILE")


def has_prompts(options: Options) -> bool:
    """Return whether prompts were given."""
    return "prompt" in options or "prompts" in options


def method_settings(options: Options) -> dict[str, Any]:
    """Return the settings of the method whose heads are searched: its flags, or those of ``--method`` and ``--set``.

    Raises:
        DitAttnError: another method, a setting that a search does not take, or one that leaves nothing to find.
    """
    words = options.words
    if not options.config.get("method") and all(kind != "method" for kind, _ in words):
        words = [("method", SLUG), *words]
    specs = method_options.method_specs(Options({}, words, options.config))
    if len(specs) != 1 or specs[0].name != SLUG:
        names = " + ".join(spec.name for spec in specs)
        raise DitAttnError(f"a search finds heads for {SLUG}, not for {names}; give --method {SLUG}")
    settings, hints = options.pick(*_METHOD), typing.get_type_hints(known_methods()[SLUG])
    for name, value in specs[0].settings.items():
        if name not in _METHOD:
            raise unknown(f"setting of {SLUG} in a search", name, _METHOD)
        if name in settings:
            raise DitAttnError(f"--{name} and the setting {name} of {SLUG} are the same; give one of them")
        settings[name] = resolve_methods.typed(value, hints[name], f"{SLUG}.{name}")
    if settings.get("u", 1.0) <= 0.0:
        raise DitAttnError("--u must be above 0: a head of strength 0 is not perturbed, got 0")
    if settings.get("scale", 1.0) <= 0.0:
        raise DitAttnError("--scale must be above 0: without a guidance update all heads score the same, got 0")
    return settings


def wanted_jobs(options: Options, jobs: list[Job]) -> list[Job]:
    """Return as many of the items as the search takes, those held out last.

    Raises:
        DitAttnError: too few, or lines that differ in more than prompt and seed.
    """
    held_out = options.get("held_out", 0)
    wanted = options.get("pairs", len(jobs) - held_out) + held_out
    if wanted > len(jobs) or wanted - held_out < 1:
        raise DitAttnError(
            f"{max(wanted - held_out, 1)} --pairs and {held_out} --held-out need {max(wanted, held_out + 1)} prompts, "
            f"and there are {len(jobs)}; give more prompts or smaller numbers"
        )
    jobs = jobs[:wanted]
    other = next((job for job in jobs if job.call != jobs[0].call), None)
    if other is not None:
        raise DitAttnError(f"{other.where}: a search calls all prompts alike; a line may set prompt and seed alone")
    if jobs[0].images():
        raise DitAttnError("a search makes images and videos from prompts alone; leave out input images")
    steps, most = options.get("search_steps"), jobs[0].call.get("num_inference_steps")
    if steps and isinstance(most, int) and steps > most:
        raise DitAttnError(f"--search-steps {steps} is more than the {most} --steps of the run")
    return jobs
