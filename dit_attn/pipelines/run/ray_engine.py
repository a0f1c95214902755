"""The Ray engine: workers are actors of a cluster, each with a GPU of its own where the cluster has some."""

from __future__ import annotations

import json
import socket
import sys
from contextlib import suppress
from dataclasses import asdict
from typing import Any

import dit_attn
from dit_attn.errors import DitAttnError, reason, shorten
from dit_attn.pipelines.run.engine import Recipe
from dit_attn.pipelines.run.pool import Event, WorkerPool

PATIENCE = 5.0  # seconds that the port of a cluster has to answer


class RayEngine(WorkerPool):
    """Actors on a Ray cluster.

    Args:
        address: ``HOST:PORT`` or ``ray://HOST:PORT``; ``None``: that of ``RAY_ADDRESS``, the cluster that runs on this
            machine, or one that is started here and ended with the engine.
        gpus: give each worker a GPU where the cluster has any.
    """

    def __init__(self, address: str | None = None, gpus: bool = True) -> None:
        self._address = address
        self._wants_gpus = gpus
        self._started = False
        self._actors: dict[int, Any] = {}
        self._pending: dict[Any, int] = {}  # worker by the answer that is awaited

    def places(self) -> int:
        """Return the number of GPUs of the cluster; of its machines where it has none."""
        import ray

        self._connect()
        return self._gpus() or max(1, sum(node["Alive"] for node in ray.nodes()))

    def start(self, recipe: Recipe, workers: int) -> None:
        """Connect to the cluster and ask for so many actors; those that find no free place yet get ready later."""
        self._connect()
        super().start(recipe, workers)

    def stop(self) -> None:
        """End every actor, and a cluster that was started here."""
        import ray

        for actor in self._actors.values():
            with suppress(Exception):  # it has ended, or the cluster has
                ray.kill(actor)
        self._actors.clear()
        self._pending.clear()
        if self._started:
            ray.shutdown()
            self._started = False

    def name(self, worker: int) -> str:
        """Return the number of a worker; its sidecars name the machine too."""
        return f"Ray worker {worker + 1}"

    def _connect(self) -> None:
        import ray

        if self._address is not None:
            _check_answers(self._address)
        if ray.is_initialized():
            return
        try:
            ray.init(self._address, logging_level="ERROR", log_to_driver="--debug" in sys.argv)
        except Exception as error:  # ConnectionError, ValueError, RuntimeError, a time limit: by what is wrong there
            where = "" if self._address is None else f":{self._address}"
            raise DitAttnError(
                f"--engine ray{where}: no Ray cluster can be reached ({reason(error)}); start one with "
                "`ray start --head`, and check its address and release of Ray"
            ) from error
        self._started = True

    def _gpus(self) -> int:
        import ray

        return int(ray.cluster_resources().get("GPU", 0)) if self._wants_gpus else 0

    def _spawn(self, worker: int) -> None:
        import ray

        places = {"num_cpus": 1, "num_gpus": 1 if self._gpus() else 0, "max_restarts": 0}
        actor = ray.remote(**places)(actor_class()).remote()
        self._actors[worker] = actor
        recipe = {**asdict(self._recipe), "name": self.name(worker)}
        self._pending[actor.get_ready.remote(json.dumps(recipe), dit_attn.__version__)] = worker

    def _send(self, worker: int, content: Any, again: bool) -> None:
        self._pending[self._actors[worker].do_task.remote(json.dumps(content), again)] = worker

    def _receive(self) -> Event:
        import ray

        ready = ray.wait(list(self._pending), num_returns=1)[0][0]
        worker = self._pending.pop(ready)
        try:
            return Event(worker, **json.loads(ray.get(ready)))
        except ray.exceptions.RayError as error:
            return Event(worker, "dead", f"{self.name(worker)} died ({_cause(error)})")


def actor_class() -> type:
    """Return the class of the actors. It is sent by value: a machine without this package can say that it has none."""

    class Worker:
        def get_ready(self, recipe: str, release: str) -> str:
            import json
            import platform
            import sys

            machine = platform.node()
            remedy = f"install dit-attn {release} for {sys.executable} on every machine of the cluster"
            try:
                import dit_attn
                from dit_attn.pipelines.run import work
            except ImportError as error:
                return json.dumps({"kind": "refused", "value": f"{machine} has no dit_attn ({error}); {remedy}"})
            if dit_attn.__version__ != release:
                why = f"{machine} has dit-attn {dit_attn.__version__}; {remedy}"
                return json.dumps({"kind": "refused", "value": why})
            given = json.loads(recipe)
            self.work, answer = work.get_ready(**{**given, "name": f"{machine}, {given['name']}"})
            return json.dumps(answer)

        def do_task(self, content: str, again: bool) -> str:
            import json

            from dit_attn.pipelines.run import work

            assert self.work is not None  # a worker that refused gets no task
            return json.dumps(work.do_task(self.work, json.loads(content), again))

    return Worker


def _check_answers(address: str) -> None:
    """Refuse an address whose port does not answer: Ray itself would try for a minute.

    Raises:
        DitAttnError: so it is, or it is no address.
    """
    host, _, port = address.removeprefix("ray://").rstrip("/").rpartition(":")
    if address in ("auto", "local"):
        return
    if not host or not port.isdecimal() or int(port[:6]) > 65535:
        raise DitAttnError(f"--engine ray: {shorten(address)} is no address; write ray:HOST:PORT")
    try:
        socket.create_connection((host, int(port)), timeout=PATIENCE).close()
    except OSError as error:
        raise DitAttnError(
            f"--engine ray:{address}: nothing answers there ({reason(error)}); start the cluster with "
            "`ray start --head`, or check the address"
        ) from error


def _cause(error: Exception) -> str:
    """Return what Ray says of a death, in one line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    known = [line for line in lines if "Worker exit" in line or "SYSTEM_ERROR" in line or "OOM" in line]
    return (known or [reason(error)])[0]
