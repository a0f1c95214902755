"""Run many jobs on one process, several, or a cluster: the engines, and what passes between them and their workers.

A recipe says how a worker gets ready (it loads the weights, once); a task is one job, or several that must share a
worker; both are JSON. Workers pull tasks, write the files themselves and answer in JSON.
"""

from dit_attn.pipelines.run.engine import Engine, JobFailed, Outcome, Recipe, Task
from dit_attn.pipelines.run.local import LocalEngine
from dit_attn.pipelines.run.requests import Answers, answered_by, answered_here
from dit_attn.pipelines.run.shard import Shard

__all__ = [
    "Answers",
    "Engine",
    "JobFailed",
    "LocalEngine",
    "Outcome",
    "Recipe",
    "Shard",
    "Task",
    "answered_by",
    "answered_here",
]
