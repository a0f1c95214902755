"""What every case in the interpreter shares."""

from __future__ import annotations

from tests._support import quick_interpreter

quick_interpreter.install()
