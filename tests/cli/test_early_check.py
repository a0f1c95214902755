"""What is wrong with a command is reported before torch is imported; what is right shows a first line before it."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from dit_attn.cli.early_check import preset_names
from dit_attn.processors.methods.presets import presets

PROMPT = ("--prompt", "a large red circle at the left on white")
MODEL = ("--model", "tiny-image")
METHOD = ("--method", "block-sparse:density=0.5")
GENERATE = ("generate", *MODEL, *PROMPT)
COMPARE = ("compare", *MODEL, *METHOD)
CALIBRATE = ("calibrate", *MODEL, "--method", "rectified-spaattn")
SEARCH = ("search", *MODEL)
HUB = ("--model", "org/not-here")
WRONG = [
    ((*GENERATE, "--method", "blok-sparse"), "Did you mean 'block-sparse'"),
    ((*GENERATE, "--method", "block-sparse:densty=0.5"), "Did you mean 'density'"),
    ((*GENERATE, "--method", "softpag", "--set", "scael=3"), "Did you mean 'scale'"),
    ((*GENERATE, "--method", "block-sparse:density=2"), "block-sparse.density must be between"),
    ((*GENERATE, "--method", "block-sparse", "--set", "q_block=big"), "q_block must be a whole number, got 'big'"),
    ((*GENERATE, "--method", "re-ttention:mask=wndow"), "Did you mean 'window'"),
    ((*GENERATE, "--method", "nowhere/settings.json"), "nowhere/settings.json: there is no such file or folder"),
    ((*GENERATE, *METHOD, "--preset", "wan2.1-13b"), "Did you mean 'wan2.1-1.3b'"),
    ((*GENERATE, "--preset", "wan2.1-14b"), "without a method does nothing"),
    ((*GENERATE, *METHOD, "--method", "re-ttention"), "re-ttention and block-sparse cannot run together"),
    ((*GENERATE, "--method"), "--method needs a value"),
    (("generate", "tiny-image"), "write --model tiny-image"),
    ((*GENERATE, "block-sparse:density=0.5"), "write --method block-sparse:density=0.5"),
    (("generate", "--model", "wan2.1-14b", *PROMPT), "e.g. Wan-AI/Wan2.1-T2V-14B-Diffusers"),
    (("bench",), "WHAT is missing"),
    ((*GENERATE, "--device", "tpu"), "unknown --device 'tpu'"),
    ((*GENERATE, "--device", "cpu", "--cpu-offload", "model"), "--cpu-offload model needs a GPU"),
    ((*GENERATE, "--image", "absent.png"), "--image absent.png: there is no such file"),
    ((*GENERATE, "--image", "words.txt"), "--image words.txt is not a readable image"),
    ((*GENERATE, "--output", "words.txt"), "--output words.txt is a file; give a folder"),
    ((*GENERATE, "--output", "nothing://run"), "fsspec knows no protocol 'nothing'"),
    ((*GENERATE, "--output", "sftp://me:secret@host/run"), "the address holds a password"),
    ((*GENERATE, "--output", "s3://"), "names no folder"),
    ((*GENERATE, "--output", "absent://run"), "needs a library of the protocol absent (Install absent)"),
    ((*COMPARE, *PROMPT, "--output", "nothing://run"), "fsspec knows no protocol 'nothing'"),
    (("inspect", *MODEL, *PROMPT, "--output", "s3://b/run"), "'s3://b/run' is an address; give a local folder"),
    ((*GENERATE, "--image", "s3://bucket/a.png"), "'s3://bucket/a.png' is an address; give a local file"),
    ((*GENERATE, "--lora", "absent"), "--lora absent: there is no such file or folder"),
    ((*GENERATE, "--pipeline-kwargs", '{"generator": 1}'), "use --seed"),
    ((*GENERATE, "--config", "absent.yaml"), "cannot read --config absent.yaml"),
    ((*GENERATE, "--steps", "0"), "--steps must be at least 1"),
    ((*GENERATE, "--variant", "fp16"), "--variant 'fp16': tiny-image is embedded"),
    (("generate", *MODEL), "no prompt"),
    (("generate", *MODEL, "--prompts", "absent.txt"), "cannot read --prompts absent.txt"),
    (("generate", *MODEL, "--prompts", "empty.txt"), "has no prompt in it"),
    (("generate", *MODEL, "--prompts", "."), "--prompts . is a folder; give a file"),
    (("generate", "--model", "tiny-imaeg", *PROMPT), "Did you mean 'tiny-image'"),
    (("generate", "--model", ".", *PROMPT), "no model_index.json"),
    (("generate", *HUB, *PROMPT), "not in the local cache and the Hugging Face Hub cannot be reached"),
    (("explain", "--model", "tiny-imaeg"), "Did you mean 'tiny-image'"),
    (("explain", *MODEL, "--method", "blok-sparse"), "Did you mean 'block-sparse'"),
    (("inspect", *MODEL, *PROMPT, "--method", "blok-sparse"), "Did you mean 'block-sparse'"),
    (("inspect", *MODEL), "no prompt"),
    (("inspect", *MODEL, *PROMPT, *PROMPT), "inspect looks at one run"),
    (("compare", *MODEL, *PROMPT, "--method", "blok-sparse"), "Did you mean 'block-sparse'"),
    (("compare", *MODEL, *PROMPT), "nothing to compare with dense"),
    (COMPARE, "no prompt"),
    ((*COMPARE, *PROMPT, "--method", "seg + softpag"), "softpag and seg cannot run together"),
    ((*COMPARE, *PROMPT, "--held-out", "3"), "two sets of items"),
    ((*COMPARE, *PROMPT, "--metrics", "fid-wrld"), "Did you mean 'fid-world'"),
    ((*COMPARE, *PROMPT, "--seeds", "one"), "--seeds must be whole numbers"),
    ((*COMPARE, *PROMPT, "--match-strength"), "none is compared"),
    ((*COMPARE, *PROMPT, "--method", "call:num_inference_steps=x"), "num_inference_steps in call"),
    ((*COMPARE, *PROMPT, "--inception", "absent.pth"), "--inception absent.pth: there is no such file"),
    (("calibrate", *MODEL, "--method", "blok-sparse"), "Did you mean 'block-sparse'"),
    (("calibrate", *MODEL), "calibrate takes one method, got 0"),
    ((*CALIBRATE, "--cost", "0.3", "--error", "0.1"), "two budgets"),
    ((*CALIBRATE, "--densities", "a,b"), "--densities must be numbers"),
    ((*CALIBRATE, *PROMPT, "--check", "3"), "there are 1"),
    (("search", "--model", "tiny-imaeg", "--set", "scale=2"), "Did you mean 'tiny-image'"),
    ((*SEARCH, "--u", "0"), "--u must be above 0"),
    ((*SEARCH, "--method", "seg"), "a search finds heads for softpag"),
    ((*SEARCH, "--objective", "style"), "give --style"),
    ((*SEARCH, "--reference", "absent"), "--reference absent: there is no such folder"),
    ((*SEARCH, *PROMPT, "--held-out", "1"), "there are 1"),
    ((*CALIBRATE, "--shard", "1/2"), "--shard: calibrate chooses densities from the measurements of all items"),
    ((*SEARCH, "--shard", "1/2"), "--shard: search chooses the heads of a round from the scores of all candidates"),
    ((*SEARCH, "--workers", "0"), "--workers must be auto or a number"),
    (("anomaly", "train", *MODEL, "--workers", "2"), "anomaly train has no items for --workers: every step"),
    (("anomaly", "generate", *MODEL, "--shard", "1/2"), "--shard: a pair that is rejected is made again in a batch"),
    (("anomaly", "benchmark", *MODEL, "--shard", "1/2"), "--shard: the verdicts are of the measurements of all seeds"),
    (("finetune", "sla", "--tiny", "--shard", "1/2"), "--shard: every step of a training begins where the one before"),
    (("finetune", "merge", "--workers", "2"), "finetune merge adds tensors in one process; leave out --workers"),
    (("bench", "modle"), "Did you mean 'model'"),
    (("bench", "model"), "bench model needs --config"),
    (("bench", "model", "--config", "wan2.1-13b"), "Did you mean 'wan2.1-1.3b'"),
    (("bench", "model", "--config", "flux", "--method", "blok-sparse"), "Did you mean 'block-sparse'"),
    (("bench", "kernels", "--shape", "wan"), "unknown --shape 'wan'"),
    (("bench", "kernels", "--density", "2"), "--density must be above 0"),
    (("bench", "kernels", "--inputs", "absent.safetensors"), "there is no such file"),
    (("bench", "operators", "--source", "tiny-vido"), "Did you mean 'tiny-video'"),
    (("bench", "windows", "--device", "cuda"), "bench windows measures CPUs"),
    (("bench", "capture"), "bench capture needs --output"),
    (("eval", "absent"), "no folder absent"),
    (("eval", "."), "no image or video in ."),
    (("eval", "parent"), "try: dit-attn eval parent/m-softpag --reference parent/m-dense"),
    (("eval", "parent/m-dense", "--metric", "pnsr"), "Did you mean 'psnr'"),
    (("eval", "parent/m-dense", "--reference", "absent"), "--reference absent: there is no such folder"),
    (("eval", "parent/m-dense", "--captions", "absent.txt"), "--captions absent.txt: there is no such file"),
    (("train", "tiny-imag"), "Did you mean 'tiny-image'"),
    (("train", "tiny-image", "--minutes", "0"), "must be more than 0"),
    (("train", "tiny-image", "--device", "mps"), "--device mps cannot train"),
    (("train", "tiny-image", "-o", "run"), "already holds a run"),
    (("demo", "--steps", "0"), "--steps must be at least 1"),
    (("demo", "--output", "words.txt"), "--output words.txt is a file"),
    (("methods", "blok-sparse"), "Did you mean 'block-sparse'"),
]
RIGHT = [
    GENERATE,
    ("explain", *MODEL),
    ("inspect", *MODEL, *PROMPT),
    (*COMPARE, *PROMPT),
    CALIBRATE,
    SEARCH,
    ("bench", "kernels"),
    ("eval", "parent/m-dense"),
    ("train", "tiny-image"),
    ("demo",),
    ("models",),
    ("doctor",),
]
# Runs every command in one interpreter that stops at the first import of something that takes long.
SCRIPT = """
import contextlib, io, json, sys
from fsspec.registry import known_implementations
from dit_attn.cli import main

known_implementations["absent"] = {"class": "absent.Files", "err": "Install absent"}

class Terminal(io.StringIO):
    isatty = lambda self: True

class Stop:
    def find_spec(self, name, path=None, target=None):
        if name in ("torch", "diffusers", "transformers", "numpy"):
            seen.append(err.getvalue())
            raise KeyboardInterrupt

seen, outcomes = [], []
sys.meta_path.insert(0, Stop())
for words in json.loads(sys.argv[1]):
    seen.clear()
    with contextlib.redirect_stderr(Terminal()) as err, contextlib.redirect_stdout(io.StringIO()):
        code = main(words)
    outcomes.append((code, err.getvalue(), seen[:1]))
print(json.dumps(outcomes))
"""


@pytest.fixture
def stopped_at_torch(tmp_path):
    """Return a function that runs commands: exit code, standard error, and what of it was there before torch."""
    for name in ("m-dense", "m-softpag"):
        (tmp_path / "parent" / name).mkdir(parents=True)
        (tmp_path / "parent" / name / "a.png").write_bytes(b"x")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoint.pt").write_bytes(b"x")
    (tmp_path / "words.txt").write_text("a circle\n")
    (tmp_path / "empty.txt").write_text("\n")
    place = os.pathsep.join([os.getcwd(), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": place, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "cache")}

    def run(commands):
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, json.dumps(commands)],
            check=True, capture_output=True, text=True, cwd=tmp_path, env=environment,
        )  # fmt: skip
        return list(zip(commands, json.loads(done.stdout), strict=True))

    return run


def test_what_is_wrong_is_one_line_before_torch_is_imported(stopped_at_torch):
    for words, (code, err, seen) in stopped_at_torch([words for words, _ in WRONG]):
        message = dict(WRONG)[words]
        assert (code, seen) == (2, []), (words, err)
        assert message in err and err.count("\n") == 1, (words, err)


def test_on_a_terminal_a_command_says_what_it_does_before_torch_is_imported(stopped_at_torch):
    for words, (code, _, seen) in stopped_at_torch(RIGHT):
        assert code == 130 and seen and "loading torch and diffusers" in seen[0], words


def test_the_names_of_the_presets_are_those_of_the_files_that_are_read():
    assert preset_names() == tuple(sorted(preset.name for preset in presets()))
