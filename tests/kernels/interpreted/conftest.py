"""What every case in the interpreter shares; a run of the other tests passes here too, and compiles kernels."""

from __future__ import annotations

from dit_attn.kernels.device import interpreting

if interpreting():
    from tests._support import quick_interpreter

    quick_interpreter.install()
