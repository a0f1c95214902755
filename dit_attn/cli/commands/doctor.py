"""``dit-attn doctor``: what this machine has, which kernels give right numbers on it, and why others do not run."""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dit_attn.cli import options as flags
from dit_attn.cli import parser as parsers
from dit_attn.cli.progress import loading_libraries
from dit_attn.cli.table import Table, show
from dit_attn.errors import DitAttnError, reason
from dit_attn.machine import free_memory, main_memory, multiplies_bf16, processor_model

# Library -> what it is for, and how to get it.
OPTIONAL = {
    "triton": ("GPU kernels", "pip install 'dit-attn[triton]' (Linux, CUDA)"),
    "comfy_kitchen": ("the kernel backend comfy-kitchen, INT8", "pip install 'dit-attn[kitchen]' (CUDA, ROCm)"),
    "fsspec": ("an --output such as s3://bucket/run", "pip install 'dit-attn[remote]'"),
    "ray": ("workers on a cluster, --engine ray", "pip install 'dit-attn[ray]'"),
    "xformers": ("a dense attention backend of diffusers", "pip install 'dit-attn[xformers]'"),
    "torchmetrics": ("image and video metrics", "pip install 'dit-attn[eval]'"),
    "peft": ("--lora", "pip install 'dit-attn[lora]'"),
    "imageio_ffmpeg": ("MP4 files", "pip install imageio-ffmpeg"),
    "av": ("reading and writing videos with sound", "pip install 'dit-attn[video]'"),
    "ftfy": ("prompt cleaning of some pipelines", "pip install ftfy"),
    "sentencepiece": ("tokenizers of T5-like text encoders", "pip install sentencepiece"),
}
REQUIRED = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "safetensors",
    "numpy",
    "pillow",
    "pyyaml",
    "scipy",
    "tqdm",
    "rich",
)
# Largest error against the fp64 reference that counts as right, by torch dtype.
TOLERANCE = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 4e-3}
# Backends that run dense layouts alone, and the error that counts as right for those that round to 8 bits.
DENSE = {"sdpa": None, "comfy-kitchen": 5e-2}
BUDGET_SECONDS = 5.0


@dataclass(frozen=True)
class KernelCheck:
    """Result of one kernel backend on one device.

    Attributes:
        backend, device, dtype: what was tried.
        status: ``"ok"``, ``"wrong"`` (numbers differ from the reference), ``"unavailable"`` or ``"skipped"``.
        error: largest absolute difference from the reference.
        seconds: time of one call after the first.
        why: why it is not ok.
    """

    backend: str
    device: str
    dtype: str
    status: str
    error: float | None = None
    seconds: float | None = None
    why: str | None = None


GROUPS = {"output": flags.only(flags.OUTPUT, "json")}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of ``doctor``."""
    parsers.describe(
        parser,
        "doctor [--json]",
        "Check versions, devices, memory, optional libraries, and the numbers every kernel backend gives.",
    )
    parsers.add_groups(parser, GROUPS)


def run(args: argparse.Namespace) -> int:
    """Print the findings. Returns 0, or 1 when a kernel gives wrong numbers; a missing GPU is no fault."""
    options = flags.merge(args, GROUPS)
    with loading_libraries(not options.get("json")):
        checks = check_kernels()
    data: dict[str, Any] = {
        "versions": _versions(),
        "devices": _devices(),
        "memory": _memory(),
        "optional": _optional(),
        "kernels": [asdict(check) for check in checks],
    }
    data["ready"] = readiness(data)
    if options.get("json"):
        print(json.dumps(data, indent=1))
    else:
        _show(data)
    return 1 if any(check.status == "wrong" for check in checks) else 0


def readiness(data: dict[str, Any]) -> str:
    """Return in one line what this machine is ready for, and what to do for more.

    Args:
        data: the findings, as ``--json`` prints them.
    """
    wrong = sorted({check["backend"] for check in data["kernels"] if check["status"] == "wrong"})
    missing = sorted(name for name, version in data["versions"].items() if version is None)
    if wrong or missing:
        what = f"{', '.join(wrong)} gives wrong numbers; report it" if wrong else f"{', '.join(missing)} is missing"
        return f"Not ready: {what}." if wrong else f"Not ready: {what}; reinstall dit-attn."
    gpus = [device for device in data["devices"] if device["device"].startswith("cuda:")]
    if not gpus:
        why = next((device["why"] for device in data["devices"] if device.get("why")), "")
        remedy = "install a torch with CUDA (pytorch.org/get-started) for a GPU" if "built without" in why else why
        return f"Ready: CPU only; {remedy}." if remedy else "Ready: CPU only."
    names = ", ".join(f"{device['device']} ({device['name']})" for device in gpus)
    triton = next((one for one in data["kernels"] if one["backend"] == "triton" and one["device"] == "cuda"), None)
    if triton is None or triton["status"] == "ok":
        return f"Ready: {names}, with the Triton kernels."
    return f"Ready: {names}, without the Triton kernels: {triton['why']}."


def check_kernels(budget: float = BUDGET_SECONDS) -> list[KernelCheck]:
    """Every backend of ``kernels.sparse_attention`` against the reference on every device, in ``budget`` seconds."""
    import torch

    from dit_attn.kernels.backends import registry

    deadline = time.perf_counter() + budget
    cases = [(torch.device("cpu"), torch.float32)]
    if torch.cuda.is_available():
        cases = [(torch.device("cuda"), torch.bfloat16), (torch.device("cuda"), torch.float16), *cases]
    order = sorted(registry.BACKENDS, key=lambda backend: backend == "flex")  # last: it loads a compiler
    out = []
    for device, dtype in cases:
        for backend in order:
            name = str(dtype).removeprefix("torch.")
            if time.perf_counter() > deadline:
                out.append(KernelCheck(backend, device.type, name, "skipped", why="out of time"))
                continue
            out.append(_check(backend, device, dtype, name))
    return out


def _check(backend: str, device: Any, dtype: Any, name: str) -> KernelCheck:
    """One backend on random numbers with ragged tails; grouped heads where it can."""
    import torch

    from dit_attn.kernels import BlockLayout, reference_attention, sparse_attention

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 300, 4, 64, generator=generator).to(device, dtype) for _ in range(3))
    layout = BlockLayout.dense(300, 300, 64, 64)
    if backend not in DENSE:
        mask = torch.rand(2, 4, layout.nq, layout.nk, generator=generator) < 0.5
        mask[..., 0] = True
        layout = BlockLayout.from_mask(mask, 300, 300, 64, 64)
    layout = layout.to(device)
    expected = reference_attention(q.double(), k.double(), v.double(), layout)[0]
    try:
        sparse_attention(q, k, v, layout, backend=backend)
        _wait(device)
        started = time.perf_counter()
        found = sparse_attention(q, k, v, layout, backend=backend)
        _wait(device)
        seconds = time.perf_counter() - started
    except DitAttnError as refusal:
        return KernelCheck(backend, device.type, name, "unavailable", why=_refusal(refusal))
    except Exception as error:  # a backend may fail in any way; the way is what is reported
        return KernelCheck(backend, device.type, name, "unavailable", why=f"{type(error).__name__}: {reason(error)}")
    assert isinstance(found, torch.Tensor)
    difference = float((found.double() - expected).abs().max())
    allowed = DENSE.get(backend) or TOLERANCE[name]
    if difference <= allowed:
        return KernelCheck(backend, device.type, name, "ok", difference, seconds)
    why = f"differs from the reference by {difference:.1e}, allowed {allowed:.0e}; please report it"
    return KernelCheck(backend, device.type, name, "wrong", difference, seconds, why)


def _refusal(error: DitAttnError) -> str:
    """The reason alone, without the call that was refused and what to do instead."""
    return str(error).partition(": ")[2].rpartition("; use backend=")[0] or str(error)


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize()


def _versions() -> dict[str, str | None]:
    import dit_attn

    found = {"dit_attn": dit_attn.__version__, "python": platform.python_version(), "system": platform.platform()}
    return {**found, **{name: _version(name) for name in REQUIRED}}


def _version(name: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[dict[str, Any]]:
    import torch

    cpu: dict[str, Any] = {"device": "cpu", "name": processor_model(), "threads": torch.get_num_threads()}
    found = [cpu | {"bf16": "fast" if multiplies_bf16(torch.device("cpu")) else "slow, use float32"}]
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        found.append(
            {
                "device": f"cuda:{index}",
                "name": facts.name,
                "gigabytes": round(facts.total_memory / 1e9, 1),
                "capability": f"{facts.major}.{facts.minor}",
            }
        )
    if not torch.cuda.is_available():
        built = "this torch is built without CUDA" if torch.version.cuda is None else "no NVIDIA driver or GPU found"
        found.append({"device": "cuda", "name": None, "why": built})
    if torch.backends.mps.is_available():
        found.append({"device": "mps", "name": "Apple GPU"})
    return found


def _memory() -> dict[str, float | None]:
    import torch

    sizes = {
        "free_memory_gb": free_memory(torch.device("cpu")),
        "memory_gb": main_memory(),
        "free_disk_gb": shutil.disk_usage(Path.cwd()).free,
    }
    return {name: None if size is None else round(size / 1e9, 1) for name, size in sizes.items()}


def _optional() -> list[dict[str, Any]]:
    import importlib.util

    return [
        {
            "library": name,
            "for": purpose,
            "version": (_version(name.replace("_", "-")) or "unknown") if importlib.util.find_spec(name) else None,
            "install": None if importlib.util.find_spec(name) else hint,
        }
        for name, (purpose, hint) in OPTIONAL.items()
    ]


def _show(data: dict[str, Any]) -> None:
    versions = [(name, version or "MISSING: reinstall dit-attn") for name, version in data["versions"].items()]
    devices = []
    for device in data["devices"]:
        facts = [f"{value} {key}" for key, value in device.items() if key not in ("device", "name", "why", "bf16")]
        facts += [f"bf16 is {device['bf16']}"] if "bf16" in device else []
        devices.append((device["device"], device["name"] or f"none: {device['why']}", ", ".join(facts)))
    memory = [
        (name.removesuffix("_gb").replace("_", " "), "unknown" if gb is None else f"{gb} GB")
        for name, gb in data["memory"].items()
    ]
    kernels = []
    for check in data["kernels"]:
        measured = check["error"] is not None
        numbers = (f"{check['error']:.1e}", f"{1e3 * check['seconds']:.1f} ms") if measured else ("-", "-")
        names = (check["backend"], check["device"], check["dtype"], check["status"])
        kernels.append((*names, *numbers, check["why"] or ""))
    optional = [
        (row["library"], row["version"] or f"missing: {row['install']}", row["for"]) for row in data["optional"]
    ]
    show(
        Table(("", ""), versions, title="Versions"),
        "",
        Table(("", "", ""), devices, title="Devices"),
        "",
        Table(("", ">"), memory, title="Memory"),
        "",
        Table(
            ("backend", "device", "type", "status", ">error", ">time", "why not"),
            kernels,
            title="Kernels (against the fp64 reference)",
            folded=("why not",),
        ),
        "",
        Table(("", "", ""), optional, title="Optional libraries"),
        "",
        data["ready"],
    )
