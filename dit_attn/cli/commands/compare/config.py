"""The configuration of ``dit-attn compare``, checked before weights are loaded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from dit_attn.cli import engines, method_options, outputs, resolve_methods, run_record
from dit_attn.cli import jobs as job_files
from dit_attn.cli.captions import held_out_captions, knows_shapes
from dit_attn.cli.check_run import check_run
from dit_attn.cli.commands.compare.early import call_of, check_items, parse_seeds, unguided, wanted_metrics
from dit_attn.cli.engines import EngineConfig
from dit_attn.cli.jobs import Job
from dit_attn.cli.load_pipeline import LoadConfig
from dit_attn.cli.model_source import Source
from dit_attn.cli.options import Options
from dit_attn.cli.run_record import Run
from dit_attn.errors import DitAttnError
from dit_attn.eval.extractors import CLIP_DEFAULT, Networks
from dit_attn.pipelines.compare import comparison
from dit_attn.pipelines.compare.metrics import check_metrics
from dit_attn.pipelines.compare.records import Variant
from dit_attn.pipelines.run import Shard
from dit_attn.remote import Place

# Flags that say which items there are, and who makes them: workers and parts are given their jobs.
_OF_THE_ITEMS = ("prompts", "held_out", "seeds", "workers", "engine", "shard", "resume")


@dataclass(frozen=True)
class CompareConfig:
    """One comparison, checked; no weights are loaded.

    Attributes:
        load: the pipeline.
        jobs: the items.
        variants: what is compared, dense first.
        folder: of the files, a path or an address; every variant has a folder in it.
        argv: the command line, for the records.
        metrics: besides PSNR and SSIM.
        networks: of the metrics.
        fps: frames per second of videos; ``None``: those of the model.
        match_strength: add the guidance scale that is as strong, for every guidance method.
        maps: map density and error of every layer and step on the first item.
        shown: items on the page.
        resume: keep what is there already.
        dry_run, json: print the plan and stop; print JSON.
        options: the flags, for workers and parts, which make this configuration again.
        engine: workers that make the items; ``None``: this process does.
        shard: the part of the items that is made; ``None``: all.

    Raises:
        DitAttnError: two variants whose settings come out the same.
    """

    load: LoadConfig
    jobs: tuple[Job, ...]
    variants: tuple[Variant, ...]
    folder: Place
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
    options: Options = field(default_factory=lambda: Options({}), repr=False)
    engine: EngineConfig | None = None
    shard: Shard | None = None

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
        load = LoadConfig.from_options(options, modular=True)
        source = load.source
        metrics = wanted_metrics(options.get("metrics"), knows_shapes(source.kind, source.name))
        variants = comparison.with_dense(_variants(specs, source, options.get("preset")))
        guided = any(method.role == "guidance" for variant in variants for method in variant.methods)
        if options.get("match_strength") and not guided:
            raise unguided()
        jobs = _jobs(options, source)
        for variant in variants:
            check_run(source, [job_of(variant, job) for job in jobs], variant.methods)
        networks = _networks(options)
        check_metrics(metrics, networks)
        folder = outputs.place_given(options.get("output"), Path("outputs") / f"compare-{Path(source.path).name}")
        rest = options.pick("fps", "match_strength", "maps", "resume", "dry_run", "json")
        engine, shard = engines.from_options(options)
        rest |= {"shown": options.get("show", 24), "options": options, "engine": engine, "shard": shard}
        return cls(load, tuple(jobs), variants, folder, options.argv, metrics, networks, **rest)

    def to_dict(self, jobs: Sequence[Job]) -> dict[str, Any]:
        """Return JSON values that :meth:`from_dict` makes this configuration of, with some of its jobs."""
        given = {name: value for name, value in self.options.values.items() if name not in _OF_THE_ITEMS}
        values = {**given, "prompt": [jobs[0].prompt], "dtype": self.dense.setup["dtype"], "output": str(self.folder)}
        rest = {"words": self.options.words, "config": self.options.config, "argv": list(self.argv)}
        return {"values": values, **rest, "jobs": [asdict(job) for job in jobs]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> CompareConfig:
        """Return the configuration that :meth:`to_dict` describes, on any machine that has the model.

        Raises:
            DitAttnError: it has not.
        """
        words = [(kind, text) for kind, text in data["words"]]
        config = cls.from_options(Options(data["values"], words, data["config"], tuple(data["argv"])))
        return replace(config, jobs=tuple(Job(**job) for job in data["jobs"]))

    @property
    def planned(self) -> list[Job]:
        """The jobs of this part."""
        return list(self.jobs) if self.shard is None else self.shard.part(self.jobs)

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
        call = call_of(group)
        methods = [spec for spec in group if spec.name != method_options.CALL]
        found = resolve_methods.resolve(methods, source.transformer, preset)
        variants.append(Variant(method_options.label(group), found, tuple(call.items())))
    return variants


def _jobs(options: Options, source: Source) -> list[Job]:
    """Every prompt with every seed, numbered through."""
    values = options.values
    check_items(options, source.kind)
    if "held_out" in options:
        values = {**values, "prompt": held_out_captions(source.defaults, options["held_out"])}
    jobs = job_files.make_jobs(values, source.defaults)
    if "seeds" not in options:
        return jobs
    pairs = [(job, seed) for job in jobs for seed in parse_seeds(options["seeds"])]
    return [replace(job, index=index, seed=seed) for index, (job, seed) in enumerate(pairs)]
