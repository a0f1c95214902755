"""Layer by step maps of ``dit-attn compare``: one more run of the first item a method, watched and not timed."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, Any

from dit_attn.api import observing
from dit_attn.cli import outputs, runner
from dit_attn.errors import RunStopped
from dit_attn.pipelines.compare import comparison
from dit_attn.pipelines.compare.attention_map import Recorder

if TYPE_CHECKING:
    from dit_attn.cli.commands.compare.config import Setting
    from dit_attn.pipelines.compare.records import Variant

FILE = "maps.json"  # in the folder of every competitor
_FAILURES = (RuntimeError, ValueError, TypeError, NotImplementedError, AttributeError)


def find_maps(setting: Setting) -> dict[str, dict[str, Any]]:
    """Maps of an earlier run of the same first job, by label."""
    found = {}
    for variant in setting.variants:
        run = setting.runs[variant.label]
        data = outputs.read_sidecar(run.folder / FILE)
        digest = setting.job_of(variant, setting.jobs[0]).digest(run.setup)
        if data.get("job_hash") == digest and isinstance(data.get("maps"), dict):
            found[variant.label] = data["maps"]
    return found


def missing(setting: Setting, maps: dict[str, dict[str, Any]]) -> list[Variant]:
    """Competitors with a method that thins attention out and that have no map yet."""
    readers = [v for v in setting.variants if any(method.role != "guidance" for method in v.methods)]
    return [variant for variant in readers if variant.label not in maps]


def make_maps(setting: Setting, pipe: Any, variants: list[Variant]) -> dict[str, dict[str, Any]]:
    """Run the first job of every variant once more under watch; what fails says why under ``failed`` and is not kept.

    Raises:
        RunStopped: the disk is full.
    """
    from tqdm import tqdm

    maps: dict[str, dict[str, Any]] = {}
    quiet = not sys.stderr.isatty() or len(variants) < 2
    for variant in tqdm(variants, desc="maps, not timed", unit="method", disable=quiet):
        run, job = setting.runs[variant.label], setting.job_of(variant, setting.jobs[0])
        recorder, started = Recorder(), time.perf_counter()
        try:
            with comparison.on(pipe, variant), observing(pipe, recorder):
                runner.call_pipeline(pipe, job)
        except RunStopped:
            raise
        except _FAILURES as failure:
            lines = str(failure).strip().splitlines()
            maps[variant.label] = {"failed": f"{type(failure).__name__}: {lines[0] if lines else 'no message'}"}
            continue
        facts = {"prompt": job.prompt, "seed": job.seed, "seconds": round(time.perf_counter() - started, 3)}
        maps[variant.label] = {**facts, **recorder.maps()}
        outputs.write_json({"job_hash": job.digest(run.setup), "maps": maps[variant.label]}, run.folder / FILE)
    return maps
