"""What is wrong with a command is reported before torch is imported."""

from __future__ import annotations

import json
import os
import subprocess
import sys

PROMPT = ("--prompt", "a large red circle at the left on white")
MODEL = ("--model", "tiny-image")
CASES = [
    (("generate", *MODEL, *PROMPT, "--method", "blok-sparse"), "Did you mean 'block-sparse'"),
    (("generate", *MODEL, *PROMPT, "--method", "block-sparse:densty=0.5"), "Did you mean 'density'"),
    (("generate", *MODEL, *PROMPT, "--method", "softpag", "--set", "scael=3"), "Did you mean 'scale'"),
    (("generate", *MODEL), "no prompt"),
    (("generate", *MODEL, "--prompts", "absent.txt"), "cannot read --prompts absent.txt"),
    (("generate", "--model", "tiny-imaeg", *PROMPT), "Did you mean 'tiny-image'"),
    (("generate", *MODEL, *PROMPT, "--steps", "0"), "--steps must be at least 1"),
    (("explain", "--model", "tiny-imaeg"), "Did you mean 'tiny-image'"),
    (("explain", *MODEL, "--method", "blok-sparse"), "Did you mean 'block-sparse'"),
    (("inspect", *MODEL, *PROMPT, "--method", "blok-sparse"), "Did you mean 'block-sparse'"),
    (("inspect", *MODEL), "no prompt"),
    (("compare", *MODEL, *PROMPT, "--method", "blok-sparse"), "Did you mean 'block-sparse'"),
    (("calibrate", *MODEL, "--method", "blok-sparse"), "Did you mean 'block-sparse'"),
    (("search", "--model", "tiny-imaeg", "--set", "scale=2"), "Did you mean 'tiny-image'"),
    (("bench", "model", "--method", "blok-sparse"), "Did you mean 'block-sparse'"),
]
# Runs every command in one interpreter, in which nothing may be imported that takes long.
SCRIPT = """
import contextlib, io, json, sys
from dit_attn.cli import main
outcomes = []
for words in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = main(words)
    outcomes.append((code, err.getvalue(), sorted({"torch", "diffusers", "transformers", "numpy"} & set(sys.modules))))
print(json.dumps(outcomes))
"""


def test_what_is_wrong_is_reported_before_torch_is_imported(tmp_path):
    there = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps([words for words, _ in CASES])],
        check=True, capture_output=True, text=True, cwd=tmp_path, env={**os.environ, "PYTHONPATH": there},
    )  # fmt: skip
    for (words, message), (code, err, heavy) in zip(CASES, json.loads(done.stdout), strict=True):
        assert (code, heavy) == (2, []), (words, err)
        assert message in err, (words, err)
