"""The package is loaded again while methods are enabled, as in a notebook whose first cells are run again."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# In a process of its own: the tests beside it know the classes of the first load.
CODE = """
import importlib, sys, torch
import dit_attn
from tests._support.compose import tiny

def load_again():
    for name in [name for name in sys.modules if name.partition(".")[0] == "dit_attn"]:
        del sys.modules[name]
    return importlib.import_module("dit_attn")

def methods(package):
    sparse = package.BlockSparse(density=0.5, q_block=16, kv_block=16, dense_steps=0)
    return sparse, package.SoftPAG(heads="1", scale=2.0)

def run(model, inputs):
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]

def hooks(model):
    return len(model._forward_hooks), len(model._forward_pre_hooks)

model, inputs = tiny("wan")
other, _ = tiny("wan")
stock = run(model, inputs)
dit_attn.enable(model, *methods(dit_attn))
guided = run(model, inputs)
again = load_again()
assert again is not dit_attn and not torch.equal(guided, stock)
assert torch.equal(run(model, inputs), guided)
again.enable(other, *methods(again))
assert torch.equal(run(model, inputs), guided), "the first load serves its layers beside the second"
again.enable(model, *methods(again))
assert hooks(model) == (1, 1) and torch.equal(run(model, inputs), guided)
assert again.summary(model).sparse_calls
third = load_again()
third.disable(model)
assert hooks(model) == (0, 0) and torch.equal(run(model, inputs), stock)
assert not {"compile", "cache_context"} & set(vars(model))
print("done")
"""


def test_a_package_that_is_loaded_again_replaces_and_removes_what_the_first_enabled() -> None:
    root = Path(__file__).resolve().parents[3]
    result = subprocess.run([sys.executable, "-c", CODE], cwd=root, capture_output=True, text=True)
    assert result.stdout.endswith("done\n"), result.stderr[-2000:]
