"""Actors of a Ray cluster of this machine: killed, poisoned, refused; addresses where there is none."""

from __future__ import annotations

import json
import socket
import sys
from collections.abc import Iterator
from typing import Any

import pytest

import dit_attn
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.run import Recipe, Task
from dit_attn.pipelines.run.ray_engine import RayEngine, actor_class

STUB = "tests._support.stub_workers:make"


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    ray = pytest.importorskip("ray")
    ray.init("local", num_cpus=2, include_dashboard=False, logging_level="ERROR", log_to_driver=False)
    yield ray
    ray.shutdown()


def test_killed_poisoned_and_failing_tasks_do_not_take_the_others_along(cluster: Any) -> None:
    said = [("say", "a"), ("die once", "b"), ("die", "c"), ("fail", "it is NaN"), ("say", "e")]
    engine = RayEngine(gpus=False)
    assert engine.places() == 1
    try:
        engine.start(Recipe(STUB), 2)
        found = sorted(engine.run(Task(i, task) for i, task in enumerate(said)), key=lambda one: one.task.key)
        later = [one.result["value"] for one in engine.run([Task(0, ("say", "f"))])]
    finally:
        engine.stop()
    assert [one.result and one.result["value"] for one in found] == ["a", "b", None, None, "e"]
    assert [one.tries for one in found] == [1, 2, 3, 1, 1]
    assert later == ["f"]  # by workers that are there still, or again
    assert "died" in str(found[2].error) and len(str(found[2].error).splitlines()) == 1
    assert len({one.result["pid"] for one in found if one.result}) > 1
    assert cluster.is_initialized()  # a cluster that the caller is connected to stays


def test_a_worker_that_cannot_get_ready_is_one_line(cluster: Any) -> None:
    engine = RayEngine(gpus=False)
    engine.start(Recipe(STUB, {"refuse": "no such model"}), 1)
    with pytest.raises(DitAttnError, match="no such model"):
        list(engine.run([Task(0, ("say", "a"))]))
    engine.stop()


@pytest.mark.parametrize("address", ["nowhere", "host:port", ":6379", "10.0.0.1:99999"])
def test_what_is_no_address_is_refused(address: str) -> None:
    pytest.importorskip("ray")
    with pytest.raises(DitAttnError, match="is no address"):
        RayEngine(address).places()


def test_an_address_where_nothing_answers_is_refused_at_once() -> None:
    pytest.importorskip("ray")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(DitAttnError, match=f"127.0.0.1:{port}: nothing answers there"):
        RayEngine(f"127.0.0.1:{port}").places()


def test_a_machine_without_the_package_or_with_another_release_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = json.dumps({"maker": STUB, "settings": {}, "folder": ".", "name": "worker 1"})
    other = json.loads(actor_class()().get_ready(recipe, "99"))
    assert other["kind"] == "refused" and f"has dit-attn {dit_attn.__version__}; install dit-attn 99" in other["value"]
    monkeypatch.setitem(sys.modules, "dit_attn.pipelines.run", None)
    without = json.loads(actor_class()().get_ready(recipe, "99"))
    assert without["kind"] == "refused" and "has no dit_attn" in without["value"]
