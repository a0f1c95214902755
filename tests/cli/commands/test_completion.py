"""`dit-attn completion`: what may follow on a command line, and the scripts that ask for it."""

from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dit_attn
from dit_attn.cli import COMMANDS, groups_of
from dit_attn.cli.completion import complete
from dit_attn.processors.methods import methods

GENERATE = ("generate", "--model", "tiny-image")


def following(*words):
    return complete(words, {name: lambda name=name: groups_of(name) for name in COMMANDS})


@pytest.mark.parametrize(
    ("words", "found"),
    [
        (("gen",), ["generate"]),
        (("generate", "--num-f"), ["--num-frames"]),
        (("generate", "--no-c"), ["--no-contact-sheet"]),
        (("generate", "--model", "tiny-v"), ["tiny-video"]),
        (("generate", "--model=tiny-v"), ["--model=tiny-video"]),
        (("generate", "--cpu-offload", ""), ["model", "group"]),
        (("generate", "--device", "c"), ["cpu", "cuda"]),
        ((*GENERATE, "--preset", "wan2.1-1.3"), ["wan2.1-1.3b"]),
        ((*GENERATE, "--method", "re-"), ["re-ttention"]),
        ((*GENERATE, "--method", "block-sparse:densi"), ["block-sparse:densities=", "block-sparse:density="]),
        ((*GENERATE, "--method", "block-sparse:density=0.5,ke"), ["block-sparse:density=0.5,keep="]),
        ((*GENERATE, "--method", "re-ttention:mask=w"), ["re-ttention:mask=window"]),
        ((*GENERATE, "--method=softpag:force="), ["--method=softpag:force=true", "--method=softpag:force=false"]),
        ((*GENERATE, "--method", "block-sparse + se"), ["block-sparse + seg"]),
        ((*GENERATE, "--method", "block-sparse", "--set", "q_"), ["q_block="]),
        (("search", "--set", "targ"), ["target="]),
        (("compare", "--metrics", "fid-world,clip-w"), ["fid-world,clip-world"]),
        (("eval", "folder", "--metric", "temp"), ["temporal"]),
        (("bench", "win"), ["windows"]),
        (("bench", "model", "--config", "wan2.1-1.3"), ["wan2.1-1.3b"]),
        (("bench", "kernels", "--dtype", "float32", "big"), []),
        (("bench", "kernels", "--dtype", "float32", "bfl"), ["bfloat16"]),
        (("train", "world"), ["world-clip"]),
        (("methods", "soft"), ["softpag"]),
        (("completion", "z"), ["zsh"]),
        (("generate", "--prompts", "p"), []),  # a file: the shell knows better
        (("generate", "--steps", ""), []),
        (("nothing", "--m"), []),
        ((*GENERATE, "--method", "nothing:d"), []),
    ],
)
def test_what_may_follow(words, found):
    assert following(*words) == found


def test_an_empty_word_lists_everything_that_fits():
    assert following("")[: len(COMMANDS)] == list(COMMANDS)
    assert following() == following("")
    assert set(following(*GENERATE, "--method", "")) >= set(methods())
    assert {"--method", "--set", "--model", "-m", "--help"} <= set(following("generate", "-"))


def test_words_are_read_from_standard_input_one_a_line(cli, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("train\ntiny-v\n"))
    assert cli("completion", "words").out == "tiny-video\n"


def test_another_shell_is_refused(cli):
    cli("completion", "tcsh").refused("'tcsh'", "bash, zsh, fish")


@pytest.fixture
def shell_environment(tmp_path):
    program = tmp_path / "bin" / "dit-attn"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m dit_attn "$@"\n')
    program.chmod(0o755)
    place = os.pathsep.join([os.environ.get("PYTHONPATH", ""), str(Path(dit_attn.__file__).parents[1])])
    return {**os.environ, "PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": place}


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_bash_completes(cli, shell_environment):
    lines = ["dit-attn trai", "dit-attn train tiny-v", "dit-attn generate --method re-ttention:mas"]
    script = cli("completion", "bash").out + "".join(
        f'COMP_LINE="{line}" COMP_POINT={len(line)}; _dit_attn; echo "${{COMPREPLY[*]}}"\n' for line in lines
    )
    command = ["bash", "--norc", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=shell_environment, check=True)
    assert done.stdout.splitlines() == ["train", "tiny-video", "mask="], done.stderr


@pytest.mark.skipif(shutil.which("fish") is None, reason="needs fish")
def test_fish_completes_names_after_a_space_too_and_files_where_there_are_none(cli, shell_environment, tmp_path):
    (tmp_path / "settings.yaml").touch()
    lines = ["dit-attn trai", "dit-attn generate --model ", "dit-attn generate --config set"]
    script = cli("completion", "fish").out + "".join(f"string join , (complete -C '{line}'); true\n" for line in lines)
    command = ["fish", "--no-config", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, env=shell_environment, cwd=tmp_path, check=True)
    names = "tiny-image,tiny-inspect,tiny-joint,tiny-video"
    assert done.stdout.splitlines() == ["train", names, "settings.yaml"], done.stderr
