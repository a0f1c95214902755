"""The configuration of ``dit-attn compare``, checked before weights are loaded."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dit_attn import files
from dit_attn.cli import jobs as job_files
from dit_attn.cli import method_options, outputs, resolve_methods, run_record
from dit_attn.cli.captions import held_out_captions
from dit_attn.cli.check_run import check_run
from dit_attn.cli.jobs import Job
from dit_attn.cli.load_pipeline import LoadConfig
from dit_attn.cli.model_source import Source
from dit_attn.cli.options import MAX_SEED, Options
from dit_attn.cli.run_record import Run
from dit_attn.errors import DitAttnError, cut, shorten, unknown
from dit_attn.eval.extractors import CLIP_DEFAULT, Networks
from dit_attn.pipelines.compare import comparison
from dit_attn.pipelines.compare.metrics import METRICS, WORLD, check_metrics
from dit_attn.pipelines.compare.records import Variant

ALWAYS = ("psnr", "ssim", "none")  # need no network


@dataclass(frozen=True)
class CompareConfig:
    """One comparison, checked; no weights are loaded.

    Attributes:
        load: the pipeline.
        jobs: the items.
        variants: what is compared, dense first.
        folder: of the files; every variant has a folder in it.
        argv: the command line, for the records.
        metrics: besides PSNR and SSIM.
        networks: of the metrics.
        fps: frames per second of videos; ``None``: those of the model.
        match_strength: add the guidance scale that is as strong, for every guidance method.
        maps: map density and error of every layer and step on the first item.
        shown: items on the page.
        resume: keep what is there already.
        dry_run, json: print the plan and stop; print JSON.

    Raises:
        DitAttnError: two variants whose settings come out the same.
    """

    load: LoadConfig
    jobs: tuple[Job, ...]
    variants: tuple[Variant, ...]
    folder: Path
    argv: tuple[str, ...]
    metrics: tuple[str, ...]
    networks: Networks
    fps: int | None = None
    match_strength: bool = False
    maps: bool = True
    shown: int = 24
    resume: bool = False
    dry_run: bool = False
    json: bool = False

    def __post_init__(self) -> None:
        known: dict[tuple[Any, ...], str] = {}
        for variant in self.variants:
            first = known.setdefault((variant.methods, variant.call), variant.label)
            if first != variant.label:
                raise DitAttnError(f"{variant.label!r} and {first!r} are the same settings; leave one of them out")

    @classmethod
    def from_options(cls, options: Options) -> CompareConfig:
        """Check the flags.

        Raises:
            DitAttnError: bad input.
        """
        specs = method_options.method_variants(options)
        if not specs:
            raise DitAttnError(
                "nothing to compare with dense; add --method NAME, e.g. --method block-sparse:density=0.25"
            )
        load = LoadConfig.from_options(options)
        source = load.source
        metrics = wanted_metrics(options.get("metrics"), source.kind == "embedded")
        variants = comparison.with_dense(_variants(specs, source, options.get("preset")))
        guided = any(method.role == "guidance" for variant in variants for method in variant.methods)
        if options.get("match_strength") and not guided:
            raise DitAttnError("--match-strength matches guidance methods, and none is compared; add --method softpag")
        jobs = _jobs(options, source)
        for variant in variants:
            check_run(source, [job_of(variant, job) for job in jobs], variant.methods)
        networks = _networks(options)
        check_metrics(metrics, networks)
        folder = outputs.folder_of(options.get("output"), Path("outputs") / f"compare-{Path(source.path).name}")
        rest = options.pick("fps", "match_strength", "maps", "resume", "dry_run", "json")
        shown = options.get("show", 24)
        return cls(load, tuple(jobs), variants, folder, options.argv, metrics, networks, shown=shown, **rest)

    @cached_property
    def runs(self) -> dict[str, Run]:
        """What the files of each variant share, by label."""
        names: Counter[str] = Counter()
        runs = {}
        for variant in self.variants:
            name = job_files.slug(variant.label, 80)
            names[name] += 1
            place = self.folder / (name if names[name] == 1 else f"{name}-{names[name]}")
            runs[variant.label] = run_record.new_run(self.load, variant.methods, place, self.argv, self.fps)
        return runs

    @property
    def dense(self) -> Run:
        """The run of dense."""
        return self.runs[self.variants[0].label]


def job_of(variant: Variant, job: Job) -> Job:
    """Return the job as this variant calls it."""
    return replace(job, call={**job.call, **dict(variant.call)}) if variant.call else job


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


def wanted_metrics(text: str | None, embedded: bool) -> tuple[str, ...]:
    """Return the scores to compute besides PSNR and SSIM.

    Args:
        text: of ``--metrics``; ``None`` for the default.
        embedded: whether the model is, which knows the shapes world.

    Raises:
        DitAttnError: an unknown one.
    """
    if text is None:
        return WORLD if embedded else ()
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in (*METRICS, *ALWAYS):
            raise unknown("--metrics", name, (*METRICS, *ALWAYS))
    return tuple(dict.fromkeys(name for name in names if name in METRICS))


def _networks(options: Options) -> Networks:
    inception, lpips = (
        Path(options[name]).expanduser() if options.get(name) else None for name in ("inception", "lpips_weights")
    )
    return Networks(inception, options.get("clip", CLIP_DEFAULT), options.get("lpips", "alex"), lpips_weights=lpips)


def _variants(specs: list[method_options.Variant], source: Source, preset: str | None) -> list[Variant]:
    if source.transformer is None:
        raise DitAttnError(
            f"{source.pipeline.__name__} of {source.name} has no diffusion transformer, which methods need"
        )
    variants = []
    for group in specs:
        given = [item for spec in group if spec.name == method_options.CALL for item in spec.settings.items()]
        call = job_files.typed_arguments({key: _value(key, value) for key, value in given}, method_options.CALL)
        methods = [spec for spec in group if spec.name != method_options.CALL]
        found = resolve_methods.resolve(methods, source.transformer, preset)
        variants.append(Variant(method_options.label(group), found, tuple(call.items())))
    return variants


def _value(key: str, value: Any) -> Any:
    """A number, a truth value or a text, as YAML reads it."""
    try:
        return files.parse_yaml(value) if isinstance(value, str) else value
    except ValueError as error:
        raise DitAttnError(f"call:{key}={cut(value, 60)}: {error}; put a text in quotes") from error


def _jobs(options: Options, source: Source) -> list[Job]:
    """Every prompt with every seed, numbered through."""
    values = options.values
    if "held_out" in options:
        if "prompt" in options or "prompts" in options:
            raise DitAttnError("--held-out and prompts together are two sets of items; give one of them")
        if source.kind != "embedded":
            raise DitAttnError(
                f"--held-out {options['held_out']} is for embedded models, which know the shapes world, not for "
                f"{source.name}; give --prompts FILE"
            )
        values = {**values, "prompt": held_out_captions(source.defaults, options["held_out"])}
    jobs = job_files.make_jobs(values, source.defaults)
    if "seeds" not in options:
        return jobs
    for line, where in job_files.read_prompts(Path(options["prompts"]).expanduser()) if "prompts" in options else ():
        if "seed" in line:
            raise DitAttnError(
                f"--seeds {options['seeds']} and the seed {line['seed']} in {where} contradict each other; "
                "leave one of them out"
            )
    pairs = [(job, seed) for job in jobs for seed in parse_seeds(options["seeds"])]
    return [replace(job, index=index, seed=seed) for index, (job, seed) in enumerate(pairs)]
