"""The work behind ``dit-attn compare``, from the folder to the page: in this process, on workers, or a part of it."""

from __future__ import annotations

import time
from typing import Any

from dit_attn import files
from dit_attn.cli import outputs
from dit_attn.cli.commands.compare import maps as compare_maps
from dit_attn.cli.commands.compare import match as compare_match
from dit_attn.cli.commands.compare import on_workers, run, shards
from dit_attn.cli.commands.compare.config import CompareConfig


def run_all(config: CompareConfig) -> dict[str, Any]:
    """Make what is missing and write ``results.json`` and ``report.html``, or the report of a part; return it.

    Raises:
        DitAttnError: the folder cannot be written, weights that cannot be loaded.
        KeyboardInterrupt: every finished item is saved, no half file is left.
    """
    outputs.prepare_folder(config.folder)
    lock = "compare" if config.shard is None else config.shard.file("compare.lock")
    files.claim(config, config.folder, lock, "comparing")  # the caller has it to the end
    resume, wants_maps = config.resume, config.maps and config.jobs[0] in config.planned
    pipe = None
    if config.match_strength:
        config, pipe = compare_match.with_matched(config, run.load_pipeline)
    for one in config.runs.values():
        outputs.prepare_folder(one.folder)
    done = run.find_results(config, config.planned) if resume else {}
    maps = compare_maps.find_maps(config) if resume and wants_maps else {}
    unmapped = compare_maps.missing(config, maps) if wants_maps else []
    started = time.perf_counter()
    if config.engine is not None:
        items, more, device = on_workers.make_all(config, config.engine, done, unmapped)
    else:
        if pipe is None and (len(done) < len(config.planned) * len(config.variants) or unmapped):
            pipe = run.load_pipeline(config)
        started = time.perf_counter()
        items, device = run.make_all(config, pipe, done), config.dense.facts["device"]
        more = compare_maps.make_maps(config, pipe, unmapped)
    seconds = time.perf_counter() - started
    if config.shard is not None:
        return shards.write_part(config, items, seconds, device)
    return run.finish(config, items, maps | more, seconds, device)
