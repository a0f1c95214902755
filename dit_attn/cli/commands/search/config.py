"""The configuration of ``dit-attn search``, checked before weights are loaded."""

from __future__ import annotations

import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dit_attn.cli import jobs as job_files
from dit_attn.cli import method_options, outputs, resolve_methods
from dit_attn.cli.captions import held_out_captions
from dit_attn.cli.load_pipeline import LoadConfig
from dit_attn.cli.model_source import Source
from dit_attn.cli.options import Options
from dit_attn.errors import DitAttnError, unknown
from dit_attn.pipelines.head_search import Pair, SearchConfig, SearchPlan
from dit_attn.processors.methods.softpag import SoftPAG

_METHOD = ("scale", "u", "target", "joint")  # settings of the method that a search takes
_SEARCH = ("rounds", "per_round", "strategy", "guidance_scale", "held_out", "controls", "layers", "tune", "batch",
           "seed", "keep", "screen")  # fmt: skip
_SCORER = ("clip", "weights", "weights_head", "style", "reference")


@dataclass(frozen=True)
class HeadSearchConfig:
    """One search, checked; no weights are loaded.

    Attributes:
        load: the pipeline.
        search: settings of the search itself.
        objective: name of the objective.
        pairs: all of them, those held out last.
        call: arguments of every call.
        folder: of the files.
        argv: the command line, for the records.
        scorer: the flags about networks and files of the objective that were given.
        device_given: whether ``--device`` was; else every process takes a GPU of its own.
        resume: keep the scores that are there already.
        dry_run, json: print the plan and stop; print JSON.
    """

    load: LoadConfig
    search: SearchConfig
    objective: str
    pairs: tuple[Pair, ...]
    call: dict[str, Any]
    folder: Path
    argv: tuple[str, ...]
    scorer: dict[str, str]
    device_given: bool = False
    resume: bool = False
    dry_run: bool = False
    json: bool = False

    @classmethod
    def from_options(cls, options: Options) -> HeadSearchConfig:
        """Check the flags.

        Raises:
            DitAttnError: bad input.
        """
        settings = _method_settings(options)
        if settings.get("u", 1.0) <= 0.0:
            raise DitAttnError("--u must be above 0: a head of strength 0 is not perturbed, got 0")
        if settings.get("scale", 1.0) <= 0.0:
            raise DitAttnError("--scale must be above 0: without a guidance update all heads score the same, got 0")
        load = LoadConfig.from_options(options)
        source = load.source
        if source.transformer is None:
            raise DitAttnError(
                f"{source.pipeline.__name__} of {source.name} has no diffusion transformer, so it has no heads to "
                "search"
            )
        pairs, call = make_pairs(options, source)
        steps, most = options.get("search_steps"), call.get("num_inference_steps")
        if steps and isinstance(most, int) and steps > most:
            raise DitAttnError(f"--search-steps {steps} is more than the {most} --steps of the run")
        search = SearchConfig(**{"controls": 1, "steps": steps, **settings, **options.pick(*_SEARCH)})
        objective = options.get("objective", "clip-world" if source.kind == "embedded" else "clip")
        default = Path("outputs") / f"search-{Path(source.path).name or 'model'}"
        folder = outputs.folder_of(options.get("output"), default)
        rest = options.pick("resume", "dry_run", "json")
        scorer, given = options.pick(*_SCORER), "device" in options
        return cls(load, search, objective, pairs, call, folder, options.argv, scorer, given, **rest)

    @property
    def plan(self) -> SearchPlan:
        """How the candidates are scored."""
        steps = self.call.get("num_inference_steps")
        count = len(self.pairs) - self.search.held_out
        return SearchPlan(self.search, count, steps if isinstance(steps, int) else None)


def _method_settings(options: Options) -> dict[str, Any]:
    """Settings of the method whose heads are searched: its flags, or those of ``--method`` and ``--set``."""
    words = options.words
    if not options.config.get("method") and all(kind != "method" for kind, _ in words):
        words = [("method", SoftPAG.slug), *words]
    specs = method_options.method_specs(Options({}, words, options.config))
    if len(specs) != 1 or specs[0].name != SoftPAG.slug:
        names = " + ".join(spec.name for spec in specs)
        raise DitAttnError(f"a search finds heads for {SoftPAG.slug}, not for {names}; give --method {SoftPAG.slug}")
    settings, hints = options.pick(*_METHOD), typing.get_type_hints(SoftPAG)
    for name, value in specs[0].settings.items():
        if name not in _METHOD:
            raise unknown(f"setting of {SoftPAG.slug} in a search", name, _METHOD)
        if name in settings:
            raise DitAttnError(f"--{name} and the setting {name} of {SoftPAG.slug} are the same; give one of them")
        settings[name] = resolve_methods.typed(value, hints[name], f"{SoftPAG.slug}.{name}")
    return settings


def make_pairs(options: Options, source: Source) -> tuple[tuple[Pair, ...], dict[str, Any]]:
    """Make pairs to search on and, behind them, those held out; and the arguments that all calls share.

    Raises:
        DitAttnError: no prompts for a model that is not embedded, fewer than wanted, or lines that differ in more than
            prompt and seed.
    """
    held_out = options.get("held_out", 0)
    values = {key: value for key, value in options.values.items() if key != "guidance_scale"}
    if "prompt" not in options and "prompts" not in options:
        if source.kind != "embedded":
            raise DitAttnError("no prompt; give --prompt TEXT or --prompts FILE")
        count, seed = options.get("pairs", 4) + held_out, options.get("seed", 42)
        values["prompt"] = held_out_captions(source.defaults, count, seed)
    jobs = job_files.make_jobs(values, source.defaults)
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
    job_files.check_calls(jobs, source.pipeline)
    return tuple(Pair(job.prompt, job.seed) for job in jobs), jobs[0].call
