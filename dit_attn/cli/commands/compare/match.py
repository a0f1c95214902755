"""``dit-attn compare --match-strength``: beside a guidance method, classifier-free guidance that pushes as far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from dit_attn.cli import outputs, runner
from dit_attn.pipelines.compare.match_strength import Matched, guidance_argument, matched
from dit_attn.pipelines.compare.records import Variant

if TYPE_CHECKING:
    from dit_attn.cli.commands.compare.config import Setting

FILE = "matched.json"  # in the folder of the comparison
ITEMS = 4  # that the strength is measured on


def with_matched(setting: Setting, load: Callable[[Setting], Any]) -> tuple[Setting, Any]:
    """The setting with one competitor more for every guidance method, and the pipeline if it had to be loaded.

    Raises:
        DitAttnError: weights that cannot be loaded, a pipeline whose guidance scale is not known.
    """
    from dit_attn.cli.commands.compare import config

    guided = [v for v in setting.variants if any(method.role == "guidance" for method in v.methods)]
    file = setting.folder / FILE
    jobs = setting.jobs[:ITEMS]
    known = outputs.read_sidecar(file) if setting.options.get("resume") else {}
    pipe, extra = None, []
    for variant in guided:
        key = f"{variant.label} {[setting.job_of(variant, j).digest(setting.runs[variant.label].setup) for j in jobs]}"
        if key not in known:
            pipe = load(setting) if pipe is None else pipe
            known[key] = asdict(_measured(setting, pipe, variant))
            outputs.write_json(known, file)
        found = known[key]
        label = f"{found['argument']} {found['scale']:.2f}, as strong as {variant.label}"
        extra.append(Variant(label, (), ((found["argument"], found["scale"]),)))
    everyone = (*setting.variants, *_distinct(extra, setting.variants))
    more = config.new_setting(
        setting.options, setting.model, setting.jobs, everyone, setting.device, setting.dtype, setting.folder,
        setting.argv,
    )  # fmt: skip
    return more, pipe


def _measured(setting: Setting, pipe: Any, variant: Variant) -> Matched:
    name = guidance_argument(pipe)
    jobs = [setting.job_of(variant, job) for job in setting.jobs[:ITEMS]]

    def run(changes: dict[str, Any], index: int) -> None:
        job = jobs[index]
        runner.call_pipeline(pipe, type(job)(job.index, job.prompt, job.seed, {**job.call, **changes}))

    return matched(pipe, variant.methods, run, [job.call.get(name) for job in jobs])


def _distinct(extra: list[Variant], others: tuple[Variant, ...]) -> list[Variant]:
    """Those whose call nobody else makes."""
    calls = {variant.call for variant in others if not variant.methods}
    found: list[Variant] = []
    for variant in extra:
        if variant.call not in calls:
            calls.add(variant.call)
            found.append(variant)
    return found
