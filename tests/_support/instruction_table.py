"""Instructions of the Triton attention kernels: ``python -m tests._support.instruction_table`` writes the record.

Every configuration is compiled for GPUs that need not be there, beside dense attention with the same tiles
(`dense_attention_kernel`), with a running maximum and with lazy rescaling. From the instructions of a warp for 64 keys
and the rate of the tensor cores follows the share of time in which these work: at least, where products and the rest
take turns, and at most, where they overlap. It is a model; no GPU has timed it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import triton

from dit_attn.kernels import BlockLayout
from dit_attn.kernels.backends.triton.attention import (
    Config,
    backward_configs,
    forward_config,
    panels,
    plan_backward,
    plan_forward,
)
from dit_attn.kernels.problem import Problem
from dit_attn.kernels.terms import NO_TERMS, Terms, pooled_compensation
from dit_attn.kernels.triton_launch import Launch
from dit_attn.models.export import environment
from tests._support.compiled_kernels import SHARED_MEMORY, compile_for
from tests._support.dense_attention_kernel import plan_dense
from tests._support.dense_gradient_kernels import plan_dense_gradients
from tests._support.kernel_loop import key_loops
from tests._support.other_environment import write_record

OUTPUT = Path(__file__).resolve().parents[2] / "benchmarks" / "kernels" / "instructions.json"
OTHERS = {
    128: (Config(128, 64, 8, 3), Config(128, 128, 8, 2), Config(128, 128, 8, 3), Config(64, 128, 4, 2)),
    64: (Config(128, 64, 8, 4), Config(128, 128, 8, 3), Config(128, 128, 4, 3)),
}
FLOPS_PER_CYCLE = {80: 2048, 90: 4096, 100: 8192}  # of a multiprocessor's tensor cores, bf16, dense
REGISTERS, THREADS = 65536, {80: 2048, 90: 2048, 100: 2048}  # of a multiprocessor
SCHEDULERS = 4


def plain_problem(dim: int) -> Problem:
    """Make a call in bf16 over full blocks of 128."""
    q = torch.zeros(1, 1024, 2, dim, dtype=torch.bfloat16)
    return Problem(q, q, q, BlockLayout.dense(1024, 1024), dim**-0.5, None, None)


def sparse_launch(dim: int, config: Config, capability: int, tma: bool = False, terms: Terms = NO_TERMS) -> Launch:
    """Prepare its forward launch; ``tma`` loads keys and values by tensor descriptors."""
    problem = plain_problem(dim)
    out, lse = torch.empty_like(problem.q), torch.empty(1, 2, 1024)
    return plan_forward(problem, terms, out, lse, tma, config, capability)


def gradient_launches(dim: int, capability: int) -> tuple[Launch, Launch]:
    """Prepare the launches of the gradients of q, and of k and v, as shipped."""
    problem = plain_problem(dim)
    q, rows = problem.q, torch.empty(1, 2, 1024)
    _, for_q, for_k = plan_backward(problem, q, rows, q, rows, q, q, q, None, capability)
    return for_q, for_k


def gradient_rows(capability: int) -> Iterator[dict[str, Any]]:
    """Yield the rows of the shipped backward kernels and of dense ones with the same tiles."""
    for dim in OTHERS:
        configs = backward_configs(plain_problem(dim), capability)
        sparse, dense = gradient_launches(dim, capability), plan_dense_gradients(dim, *configs)
        for what, products, inner, config, *launches in zip(
            ("q", "k and v"), (3, 4), ("columns", "rows"), configs, sparse, dense
        ):
            for name, launch in zip(("sparse", "dense"), launches):
                compiled = compile_for(launch, capability)
                loop = key_loops(compiled.disassemble())[0]
                steps = 64 / getattr(config, inner)
                issued = loop.instructions * config.warps / SCHEDULERS
                busy = 2 * products * config.rows * config.columns * sum(panels(dim)) / FLOPS_PER_CYCLE[capability]
                yield {
                    "kernel": f"{name}, gradient of {what}",
                    "capability": capability,
                    "head_dim": dim,
                    **{key: getattr(config, key) for key in ("rows", "columns", "warps", "stages")},
                    "default": True,
                    f"instructions_64_{'keys' if inner == 'columns' else 'queries'}": round(
                        loop.instructions * steps, 1
                    ),
                    "warp_instructions_64_x_64": round(
                        loop.instructions * config.warps * 4096 / (config.rows * config.columns)
                    ),
                    "barriers_a_step": loop.barriers,
                    "registers": compiled.registers,
                    "spills": compiled.spills,
                    "shared_bytes": compiled.shared,
                    "tensor_share": [round(busy / (busy + issued), 3), round(busy / max(busy, issued), 3)],
                }


def pooled_terms(dim: int) -> Terms:
    """Make what Rectified SpaAttn adds to it: a pooled key for every block."""
    problem = plain_problem(dim)
    return Terms(compensation=pooled_compensation(problem.k, problem.v, 128))


def measured(launch: Launch, capability: int, dim: int, config: Config) -> dict[str, Any]:
    """Compile a launch and count."""
    compiled = compile_for(launch, capability)
    found = key_loops(compiled.disassemble())
    pooled = {}
    if launch.arguments.get("COMP"):  # its loops: keys, pooled keys, and both again with a running maximum
        pooled = {"pooled_instructions_64_keys": round(found[1].instructions * 64 / launch.arguments["BV"], 1)}
        found = found[:1]
    loop = min(found, key=lambda one: one.instructions)
    issued = loop.instructions * config.warps / SCHEDULERS
    products = 4 * config.rows * config.columns * sum(panels(dim)) / FLOPS_PER_CYCLE[capability]
    threads = 32 * config.warps
    programs = min(
        REGISTERS // (compiled.registers * threads),
        SHARED_MEMORY[capability] // max(1, compiled.shared),
        THREADS[capability] // threads,
    )
    return {
        "instructions_64_keys": round(loop.instructions * 64 / config.columns, 1),
        **pooled,
        "barriers_64_keys": round(loop.barriers * 64 / config.columns, 2),
        "registers": compiled.registers,
        "spills": compiled.spills,
        "shared_bytes": compiled.shared,
        "programs_per_multiprocessor": programs,
        "tensor_share": [round(products / (products + issued), 3), round(products / max(products, issued), 3)],
    }


def rows() -> Iterator[dict[str, Any]]:
    """Yield one row a kernel, configuration and generation."""
    for capability in FLOPS_PER_CYCLE:
        for dim, configs in OTHERS.items():
            for config in configs:
                kernels = {
                    "sparse": sparse_launch(dim, config, capability),
                    "dense, running maximum": plan_dense(dim, config, lazy=False),
                    "dense, lazy rescaling": plan_dense(dim, config, lazy=True),
                }
                kernels["sparse, pooled keys"] = sparse_launch(dim, config, capability, terms=pooled_terms(dim))
                if capability >= 90:
                    kernels["sparse, descriptors"] = sparse_launch(dim, config, capability, tma=True)
                for name, launch in kernels.items():
                    yield {
                        "kernel": name,
                        "capability": capability,
                        "head_dim": dim,
                        **{key: getattr(config, key) for key in ("rows", "columns", "warps", "stages")},
                        "default": config == forward_config(plain_problem(dim), NO_TERMS, capability),
                        **measured(launch, capability, dim, config),
                    }


def main() -> None:
    """Count and write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--output", type=Path, default=OUTPUT)
    parser.add_argument("--gradients", action="store_true", help="count these only and keep the other rows")
    given, found = parser.parse_args(), []
    if given.gradients:
        earlier = json.loads(given.output.read_text())["rows"]
        found = [row for row in earlier if "gradient" not in row["kernel"]]
    gradients = chain.from_iterable(map(gradient_rows, FLOPS_PER_CYCLE))
    for row in gradients if given.gradients else chain(rows(), gradients):
        found.append(row)
        print(row, flush=True)
    record = {
        "what": "instructions of a warp in the loop over full blocks, bf16, from machine code; not timed",
        "environment": {**environment(), "triton": triton.__version__},
        "rows": found,
    }
    write_record(given.output, "python -m tests._support.instruction_table", record)


if __name__ == "__main__":
    main()
