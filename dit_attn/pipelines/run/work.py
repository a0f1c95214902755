"""What happens inside a worker, whatever engine started it: get ready by the recipe, do tasks, answer in JSON."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from dit_attn.errors import DitAttnError, RunStopped, reason
from dit_attn.pipelines.run.engine import JobFailed

Work = Callable[[Any, bool], Any]  # from the content of a task, and whether it was tried before, to its result
Answer = dict[str, Any]  # kind, value and final of an Event


def get_ready(maker: str, settings: dict[str, Any], folder: str, name: str) -> tuple[Work | None, Answer]:
    """Call the recipe's maker; return the function that does tasks, ``None`` where it is refused, and the answer."""
    try:
        if os.path.isdir(folder):
            os.chdir(folder)
        module, _, function = maker.partition(":")
        work = getattr(importlib.import_module(module), function)(settings, name)
    except DitAttnError as error:
        return None, {"kind": "refused", "value": str(error)}
    except Exception as error:
        _show_traceback()
        return None, {"kind": "refused", "value": f"{name} cannot get ready ({type(error).__name__}: {reason(error)})"}
    return work, {"kind": "ready"}


def do_task(work: Work, content: Any, again: bool) -> Answer:
    """Do one task; whatever it raises becomes an answer."""
    try:
        return {"kind": "done", "value": work(content, again)}
    except RunStopped as error:
        return {"kind": "stopped", "value": str(error)}
    except JobFailed as error:
        return {"kind": "failed", "value": str(error), "final": error.final}
    except Exception as error:  # a task that fails must not take its worker along
        _show_traceback()
        return {"kind": "failed", "value": f"{type(error).__name__}: {reason(error)}"}


def _show_traceback() -> None:
    if "--debug" in sys.argv:
        import traceback

        traceback.print_exc(file=sys.stderr)
