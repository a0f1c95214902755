"""``dit-attn compare --match-strength``: for every guidance method, classifier-free guidance as strong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

from dit_attn.cli import outputs, runner
from dit_attn.cli.commands.compare.config import CompareConfig, job_of
from dit_attn.pipelines.compare.match_strength import MatchedScale, guidance_argument, match_guidance_scale
from dit_attn.pipelines.compare.records import Variant, fits

FILE = "matched.json"  # in the folder of the comparison
ITEMS = 4  # that the strength is measured on


def with_matched(config: CompareConfig, load: Callable[[CompareConfig], Any]) -> tuple[CompareConfig, Any]:
    """Add a variant of matched guidance for every guidance method; return the pipeline too, if it had to be loaded.

    Raises:
        DitAttnError: weights that cannot be loaded, a pipeline whose guidance scale is not known.
    """
    guided = [v for v in config.variants if any(method.role == "guidance" for method in v.methods)]
    file = config.folder / FILE
    jobs = config.jobs[:ITEMS]
    known = outputs.read_sidecar(file) if config.resume else {}
    pipe, extra = None, []
    for variant in guided:
        setup = config.runs[variant.label].setup
        key = f"{variant.label} {[job_of(variant, job).digest(setup) for job in jobs]}"
        if not _is_match(known.get(key)):
            pipe = load(config) if pipe is None else pipe
            known[key] = asdict(_measured(config, pipe, variant))
            outputs.write_json(known, file)
        found = known[key]
        label = f"{found['argument']} {found['scale']:.2f}, as strong as {variant.label}"
        extra.append(Variant(label, (), ((found["argument"], found["scale"]),)))
    everyone = (*config.variants, *_distinct(extra, config.variants))
    return replace(config, variants=everyone), pipe


def _is_match(data: Any) -> bool:
    """Tell whether this is what was measured; an edited file is measured again."""
    return isinstance(data, dict) and fits(data.get("argument"), str) and fits(data.get("scale"), float)


def _measured(config: CompareConfig, pipe: Any, variant: Variant) -> MatchedScale:
    name = guidance_argument(pipe)
    jobs = [job_of(variant, job) for job in config.jobs[:ITEMS]]

    def run(changes: dict[str, Any], index: int) -> None:
        job = jobs[index]
        runner.call_pipeline(pipe, replace(job, call={**job.call, **changes}))

    return match_guidance_scale(pipe, variant.methods, run, [job.call.get(name) for job in jobs])


def _distinct(extra: list[Variant], others: tuple[Variant, ...]) -> list[Variant]:
    """Return those whose call no other variant makes."""
    calls = {variant.call for variant in others if not variant.methods}
    found: list[Variant] = []
    for variant in extra:
        if variant.call not in calls:
            calls.add(variant.call)
            found.append(variant)
    return found
