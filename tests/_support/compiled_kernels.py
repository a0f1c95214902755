"""Compiling a kernel launch for a GPU that is not there, and reading what came out."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from dit_attn.kernels.triton_launch import Launch

SHARED_MEMORY = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}  # bytes a program can have
_TYPES = {
    torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.uint8: "u8",
}  # fmt: skip


@dataclass(frozen=True)
class Compiled:
    """What the compiler made of a launch: PTX, machine code, bytes of shared memory, registers, spill instructions.

    Registers are those of a thread.
    """

    ptx: str
    cubin: bytes
    shared: int
    registers: int
    spills: int

    @property
    def waits(self) -> list[int]:
        """How many copies each ``cp.async.wait_group`` leaves in flight, in program order."""
        return [int(n) for n in re.findall(r"cp\.async\.wait_group\s+(?:0x)?(\d+)", self.ptx)]

    def disassemble(self) -> str:
        """Return the instructions of the machine code."""
        return _disassemble(self.cubin)


def compile_for(launch: Launch, capability: int) -> Compiled:
    """Compile ``launch`` for compute capability ``capability`` (90 for Hopper) as a launch on it would."""
    kernel = launch.kernel
    signature, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(kernel.params):
        value = launch.arguments[parameter.name]
        if parameter.is_constexpr or value is None or (value == 1 if _specialised(parameter, value) else False):
            signature[parameter.name], constants[(index,)] = "constexpr", value
            continue
        signature[parameter.name] = _type_of(value)
        aligned = value.data_ptr() if isinstance(value, torch.Tensor) else value
        if isinstance(value, torch.Tensor) or (_specialised(parameter, value) and aligned % 16 == 0):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    options = {"num_warps": launch.warps, "num_stages": launch.stages}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, spills = _resources(compiled.asm["cubin"])
    return Compiled(compiled.asm["ptx"], compiled.asm["cubin"], compiled.metadata.shared, registers, spills)


def _specialised(parameter, value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and not parameter.do_not_specialize


def _type_of(value) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    return "fp32" if isinstance(value, float) else "i32"


def _resources(cubin: bytes) -> tuple[int, int]:
    """Registers per thread, and how many instructions move registers to the stack or back."""
    found = re.search(r"REG:(\d+) STACK:(\d+)", _read("cuobjdump", "-res-usage", cubin))
    assert found
    # A frame is not a spill: the compiler also reserves a few bytes that nothing uses.
    code = _disassemble(cubin) if int(found[2]) else ""
    return int(found[1]), len(re.findall(r"\b(?:STL|LDL)\b", code))


def _disassemble(cubin: bytes) -> str:
    return _read("nvdisasm", "-c", cubin)


def _read(tool: str, option: str, cubin: bytes) -> str:
    """What a tool prints about machine code."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return _tool(tool, option, file.name)


def _tool(name: str, *arguments: str) -> str:
    """Output of one of the CUDA tools that Triton brings."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    command = [str(tool) if tool.exists() else str(shutil.which(name)), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout
