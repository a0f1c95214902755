"""``python -m dit_attn.pipelines.run.worker``: one worker of the local engine; JSON lines in, JSON lines out."""

from __future__ import annotations

import json
import os
import signal
import sys
from typing import Any


def main() -> int:
    """Get ready by the first line of standard input, then do a task per line until the input ends."""
    from dit_attn.pipelines.run import work

    signal.signal(signal.SIGTERM, _leave)
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever a library prints is no answer

    def answer(data: dict[str, Any]) -> None:
        answers.write(json.dumps(data) + "\n")
        answers.flush()

    recipe = json.loads(sys.stdin.readline())
    function, ready = work.get_ready(**recipe)
    answer(ready)
    if function is None:
        return 1
    for line in sys.stdin:
        task = json.loads(line)
        answer(work.do_task(function, task["content"], task["again"]))
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # nothing is being written, and libraries end without a word
    return 0


def _leave(number: int, frame: object) -> None:
    """End by an exception, so that files which are being written are removed."""
    sys.exit(128 + number)


if __name__ == "__main__":
    sys.exit(main())
