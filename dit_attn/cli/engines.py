"""``--workers``, ``--engine`` and ``--shard``: who makes the items of a command."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from dit_attn import files
from dit_attn.cli.options import Options
from dit_attn.cli.workers import process_rank
from dit_attn.errors import DitAttnError, reason, shorten, unknown
from dit_attn.pipelines.run import Answers, Engine, LocalEngine, Outcome, Recipe, Shard, Task, answered_by
from dit_attn.remote import Place

MAX_WORKERS = 4096
NAMES = ("local", "ray")


@dataclass(frozen=True)
class EngineConfig:
    """Workers, as the flags ask for them.

    Attributes:
        name: ``"local"`` or ``"ray"``.
        address: of a Ray cluster, ``None`` for the one that is found, else one of this machine.
        workers: how many; ``None``: one per GPU.
        cpu: the user wants none on a GPU; the machines of a cluster may have some where this one has not.
    """

    name: str = "local"
    address: str | None = None
    workers: int | None = None
    cpu: bool = False

    def __str__(self) -> str:
        count = "one worker per GPU" if self.workers is None else f"{self.workers} worker{'s' * (self.workers > 1)}"
        return f"{self.name}, {count}"

    def run(
        self, recipe: Recipe, folder: Place, device: Any, tasks: Iterable[Task], count: int
    ) -> Generator[Outcome, None, None]:
        """Start the workers, yield what becomes of every task, and end them when it is closed.

        Args:
            recipe: how they get ready; the mark of the folder is added to its settings.
            folder: of the files.
            device: of the flags.
            tasks: in order.
            count: of the tasks; no more workers than that are started.

        Raises:
            DitAttnError: no worker can be started, or none is left.
            RunStopped: a worker met what would stop the others too.
        """
        with self.started(recipe, folder, device, count) as engine:
            yield from engine.run(tasks)

    @contextmanager
    def answering(self, recipe: Recipe, folder: Place, device: Any, most: int = MAX_WORKERS) -> Iterator[Answers]:
        """Yield what has requests answered by workers, started at the first request and ended with the block.

        Args:
            recipe, folder, device: as for :meth:`run`.
            most: requests that there may be at a time; no more workers than that are started.
        """
        with ExitStack() as stack:
            engine: list[Engine] = []

            def answers(requests: Sequence[Any]) -> Iterator[tuple[int, Any]]:
                if requests and not engine:
                    engine.append(stack.enter_context(self.started(recipe, folder, device, most)))
                return answered_by(engine[0], requests) if requests else iter(())

            yield answers

    @contextmanager
    def started(self, recipe: Recipe, folder: Place, device: Any, most: int) -> Iterator[Engine]:
        """Start at most so many workers, yield their engine, and end them with the block; see :meth:`run`."""
        gpus = visible_gpus() if device.type == "cuda" and device.index is None else []
        if self.name == "ray":
            from dit_attn.pipelines.run.ray_engine import RayEngine

            engine: Engine = RayEngine(self.address, gpus=not self.cpu)
        else:
            engine = LocalEngine(gpus)
        with marked(folder) as mark:
            recipe = replace(recipe, settings={**recipe.settings, "mark": mark})
            try:
                engine.start(recipe, min(self.workers or engine.places(), most))
                yield engine
            finally:
                engine.stop()


def from_options(options: Options, undivided: str = "") -> tuple[EngineConfig | None, Shard | None]:
    """Return who makes the items, ``None`` for this process, and which part of them, ``None`` for all.

    Args:
        options: the flags.
        undivided: why the command cannot be done in parts, ``""`` where it can.

    Raises:
        DitAttnError: a flag that makes no sense, a library that is missing, or processes of a launcher besides.
    """
    if undivided and "shard" in options:
        raise DitAttnError(f"--shard: {undivided}; give --workers N, or --engine ray for several machines")
    shard = Shard.parse(options["shard"]) if "shard" in options else None
    if "workers" not in options and "engine" not in options:
        return None, shard
    name, _, address = options.get("engine", "local").partition(":")
    if name not in NAMES:
        raise unknown("--engine", name, ("local", "ray", "ray:ADDRESS"))
    if name == "local" and address:
        raise DitAttnError(f"--engine local takes no address, got {shorten(address)}; write --engine ray:ADDRESS")
    if name == "ray" and importlib.util.find_spec("ray") is None:
        raise DitAttnError("--engine ray needs the library ray, which is not installed: `pip install 'dit-attn[ray]'`")
    size = process_rank()[1]
    if size > 1:
        raise DitAttnError(
            f"{size} processes were started by a launcher, which share the items already; leave out --workers and "
            "--engine, or start the command without torchrun or accelerate launch"
        )
    workers = _workers(options.get("workers", "auto"))
    if name == "local" and "workers" not in options:
        return None, shard
    return EngineConfig(name, address or None, workers, options.get("device") == "cpu"), shard


def _workers(text: str) -> int | None:
    if text == "auto":
        return None
    if not (text.isdecimal() and 1 <= int(text[:6]) <= MAX_WORKERS):
        raise DitAttnError(f"--workers must be auto or a number from 1 to {MAX_WORKERS}, got {shorten(text)}")
    return int(text)


def visible_gpus() -> list[str]:
    """Return the GPUs of this machine as ``CUDA_VISIBLE_DEVICES`` names them."""
    import torch

    named = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    count = torch.cuda.device_count()
    return named[:count] if named else [str(index) for index in range(count)]


@contextmanager
def marked(folder: Place) -> Iterator[str]:
    """Lay a file into the output folder for a ``with`` block, by which workers know it; yield its name."""
    mark = folder / f"{files.TEMPORARY}{uuid4().hex}"
    try:
        mark.write_bytes(b"x")
    except OSError as error:
        raise DitAttnError(f"cannot write to --output {folder} ({reason(error)}); choose another folder") from error
    try:
        yield mark.name
    finally:
        mark.unlink(missing_ok=True)


def check_marked(folder: Place, mark: str, name: str) -> None:
    """Refuse an output folder that is not the one of the command.

    Raises:
        DitAttnError: so it is.
    """
    if not (folder / mark).is_file():
        raise DitAttnError(f"{name} does not see the files of --output {folder}; give a folder that all machines share")
