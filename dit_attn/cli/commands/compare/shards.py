"""Parts of a comparison, as ``--shard`` makes them: the report of one, and the results of all."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from dit_attn.cli import outputs, run_record
from dit_attn.cli.commands.compare import maps, run
from dit_attn.cli.commands.compare.config import CompareConfig, job_of
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.compare.records import ItemResult
from dit_attn.remote import Place


def write_part(config: CompareConfig, items: list[ItemResult], seconds: float, device: str) -> dict[str, Any]:
    """Write the report of a part; metrics of sets wait for the others."""
    assert config.shard is not None
    runs = [(variant, config.runs[variant.label].setup) for variant in config.variants]
    digests = [job_of(variant, job).digest(setup) for job in config.jobs for variant, setup in runs]
    part = {
        "shard": run_record.describe_shard(config.shard, digests),
        "config": config.to_dict(config.jobs),
        "device": device,
        "seconds": round(seconds, 1),
        "takes": [asdict(item) for item in items],
    }
    outputs.write_json(part, config.folder / config.shard.file("results.json"))
    return part


def joined(folder: Place, parts: list[dict[str, Any]]) -> dict[str, Any]:
    """Write the results of all parts, with the metrics of all items, and the page; return them.

    Raises:
        DitAttnError: items that are missing, a model or a network that is not here.
    """
    given = parts[0]["config"]
    config = CompareConfig.from_dict({**given, "values": {**given["values"], "output": str(folder)}})
    done = run.find_results(config, config.jobs)
    failed = {(item["variant"], item["index"]): ItemResult(**item) for part in parts for item in part["takes"]}
    failed = {key: item for key, item in failed.items() if item.error is not None}
    items = []
    for job in config.jobs:
        for variant in config.variants:
            item = done.get((variant.label, job.index)) or failed.get((variant.label, job.index))
            if item is None:
                raise DitAttnError(
                    f"{job.stem} of {variant.label} is not in {folder}; copy the files of all parts there, or run part "
                    f"{job.index % len(parts) + 1}/{len(parts)} again with --resume"
                )
            items.append(item)
    devices = ", ".join(dict.fromkeys(part["device"] for part in parts))
    found = maps.find_maps(config) if config.maps else {}
    return run.finish(config, items, found, sum(part["seconds"] for part in parts), devices)
