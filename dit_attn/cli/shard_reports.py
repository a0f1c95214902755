"""The reports of the parts of a run that ``--shard`` made, read back and checked."""

from __future__ import annotations

import re
from typing import Any

from dit_attn import files
from dit_attn.errors import DitAttnError, reason
from dit_attn.pipelines.run import Shard
from dit_attn.remote import Place, names_in


def read_shards(folder: Place, names: tuple[str, ...]) -> tuple[str, list[dict[str, Any]]]:
    """Return which of the reports ``names`` the parts in a folder are of, and the parts in order.

    Raises:
        DitAttnError: there is none, one is missing or damaged, or they are not the parts of one run.
    """
    present = names_in(folder)
    found = {name: _of(present, name) for name in names}
    known = [name for name in names if found[name]]
    if not known:
        wanted = " or ".join(Shard(1, 4).file(name) for name in names)
        raise DitAttnError(f"{folder} has no report of a part, such as {wanted}; run the command with --shard 1/4 ...")
    if len(known) > 1:
        raise DitAttnError(f"{folder} has parts of {' and of '.join(known)}; give each command a folder of its own")
    name, shards = known[0], sorted(found[known[0]], key=lambda shard: (shard.count, shard.number))
    if shards[0].count != shards[-1].count:
        raise DitAttnError(
            f"{shards[0].file(name)} and {shards[-1].file(name)} overlap in {folder}; remove the reports of one run"
        )
    numbers = {shard.number for shard in shards}
    absent = [number for number in range(1, shards[0].count + 1) if number not in numbers]
    if absent:
        missing = Shard(absent[0], shards[0].count)
        more = f" (and {len(absent) - 1} others)" if len(absent) > 1 else ""
        raise DitAttnError(
            f"{missing.file(name)}{more} is not in {folder}; run the command with --shard {missing}, or copy it there"
        )
    reports = [_read(folder / shard.file(name), shard) for shard in shards]
    for shard, report in zip(shards, reports, strict=True):
        if report["shard"]["jobs"] != reports[0]["shard"]["jobs"]:
            raise DitAttnError(
                f"{shards[0].file(name)} and {shard.file(name)} in {folder} are parts of different jobs (other "
                "prompts, settings or model); run all parts with the same command"
            )
    return name, reports


def _of(present: set[str], name: str) -> list[Shard]:
    stem, _, ending = name.rpartition(".")
    pattern = re.compile(rf"{re.escape(stem)}-(\d{{1,6}})-of-(\d{{1,6}})\.{re.escape(ending)}")
    matches = [pattern.fullmatch(one) for one in sorted(present)]
    return [Shard(int(one[1]), int(one[2])) for one in matches if one is not None]


def _read(path: Place, shard: Shard) -> dict[str, Any]:
    """Return the report of a part; what other code wrote under its name is refused."""
    try:
        data = files.parse_json(files.read_regular(path))
        said = data["shard"]
        if (said["number"], said["count"]) != (shard.number, shard.count) or not isinstance(said["jobs"], str):
            raise ValueError("its content is of another part")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DitAttnError(
            f"{path} is not the report of part {shard} ({reason(error)}); run the command with --shard {shard} --resume"
        ) from error
    return dict(data)
