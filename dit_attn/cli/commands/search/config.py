"""The configuration of ``dit-attn search``, checked before weights are loaded."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dit_attn.cli import engines, outputs
from dit_attn.cli import jobs as job_files
from dit_attn.cli.captions import held_out_captions, knows_shapes
from dit_attn.cli.commands.search import early
from dit_attn.cli.engines import EngineConfig
from dit_attn.cli.load_pipeline import LoadConfig
from dit_attn.cli.model_source import Source
from dit_attn.cli.options import Options
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.head_search import Pair, ScorerOptions, SearchConfig, SearchPlan

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
        options: the flags, for workers.
        engine: workers that score candidates; ``None``: this process does.
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
    options: Options = field(default_factory=lambda: Options({}), repr=False)
    engine: EngineConfig | None = None

    @classmethod
    def from_options(cls, options: Options) -> HeadSearchConfig:
        """Check the flags.

        Raises:
            DitAttnError: bad input.
        """
        settings = early.method_settings(options)
        load = LoadConfig.from_options(options)
        source = load.source
        if source.transformer is None:
            raise DitAttnError(
                f"{source.pipeline.__name__} of {source.name} has no diffusion transformer, so it has no heads to "
                "search"
            )
        pairs, call = make_pairs(options, source)
        steps = options.get("search_steps")
        search = SearchConfig(**{"controls": 1, "steps": steps, **settings, **options.pick(*_SEARCH)})
        objective = options.get("objective", "clip-world" if knows_shapes(source.kind, source.name) else "clip")
        default = Path("outputs") / f"search-{Path(source.path).name or 'model'}"
        folder = outputs.folder_of(options.get("output"), default)
        rest = options.pick("resume", "dry_run", "json")
        rest |= {"options": options, "engine": engines.from_options(options)[0]}
        scorer, given = options.pick(*_SCORER), "device" in options
        return cls(load, search, objective, pairs, call, folder, options.argv, scorer, given, **rest)

    @property
    def plan(self) -> SearchPlan:
        """How the candidates are scored."""
        steps = self.call.get("num_inference_steps")
        count = len(self.pairs) - self.search.held_out
        return SearchPlan(self.search, count, steps if isinstance(steps, int) else None)


def make_pairs(options: Options, source: Source) -> tuple[tuple[Pair, ...], dict[str, Any]]:
    """Make pairs to search on and, behind them, those held out; and the arguments that all calls share.

    Raises:
        DitAttnError: fewer prompts than wanted, or lines that differ in more than prompt and seed.
    """
    values = {key: value for key, value in options.values.items() if key != "guidance_scale"}
    if not early.has_prompts(options):
        count, seed = options.get("pairs", 4) + options.get("held_out", 0), options.get("seed", 42)
        values["prompt"] = held_out_captions(source.defaults, count, seed)
    jobs = early.wanted_jobs(options, job_files.make_jobs(values, source.defaults))
    job_files.check_calls(jobs, source.pipeline)
    return tuple(Pair(job.prompt, job.seed) for job in jobs), jobs[0].call


def scorer_options(given: dict[str, str], device: Any) -> ScorerOptions:
    """Return what the objective needs, by the flags; ``--reference`` as uint8 (N, 3, H, W), of one size."""
    reference = None
    if "reference" in given:
        from dit_attn.eval.folders import read_folder

        reference = read_folder(Path(given["reference"]).expanduser()).images(64)
    return ScorerOptions(
        given.get("clip"), given.get("weights"), given.get("weights_head"), given.get("style"), reference, device
    )  # fmt: skip
