"""The entry point: light, one line per mistake, exit codes."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from dit_attn import __version__
from dit_attn import cli as package
from dit_attn.cli.commands import generate
from dit_attn.errors import DitAttnError
from dit_attn.eval.metrics import score
from dit_attn.pipelines.compare import metrics


def test_help_loads_nothing_heavy():
    code = (
        "import sys; from dit_attn.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy', 'yaml', 'PIL'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert all(name in done.stdout for name in package.COMMANDS)


def test_help_of_generate_loads_nothing_heavy():
    code = (
        "import sys; from dit_attn.cli import main\n"
        "try: main(['generate', '--help'])\n"
        "except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_python_m_is_the_command(tmp_path):
    done = subprocess.run([sys.executable, "-m", "dit_attn", "--version"], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == f"dit-attn {__version__}"


def test_no_command_prints_help(cli):
    outcome = cli()
    assert outcome.code == 0
    assert "generate" in outcome.out


def test_an_unknown_command_is_named_with_the_nearest(cli):
    cli("genrate").refused("'genrate'", "Did you mean 'generate'")


def test_an_unknown_flag_is_named_with_the_nearest(cli):
    cli("generate", "--promt", "x").refused("'--promt'", "Did you mean --prompt")


def test_loose_words_are_refused(cli):
    cli("generate", "--model", "tiny-image", "--prompt", "a", "b").refused("'b'", "quotes")


def test_a_missing_command_module_does_not_break_the_others(cli, monkeypatch):
    monkeypatch.setitem(package.COMMANDS, "absent", package.Command("absent", "not there"))
    cli("absent").refused("'absent'", "not part of this installation")
    assert cli("models", "--json").code == 0


def test_debug_shows_the_traceback(cli):
    outcome = cli("generate", "--debug", "--model", "nothing-here", "--prompt", "x")
    assert outcome.code == 2
    assert "Traceback" in outcome.err


def test_a_fault_of_ours_is_one_line_that_says_how_to_see_more(cli, monkeypatch):
    def boom(args):
        raise RuntimeError("lost\nin space")

    monkeypatch.setattr(generate, "run", boom)
    outcome = cli("generate")
    assert outcome.code == 1
    assert (
        outcome.err
        == "dit-attn: error: unexpected RuntimeError: lost in space; run again with --debug for the traceback\n"
    )


def test_a_torchvision_that_cannot_be_imported_is_named_with_its_remedy(cli, monkeypatch, broken_torchvision):
    monkeypatch.setattr(generate, "run", lambda args: __import__("torchvision"))
    cli("generate").refused("torchvision is installed and cannot be imported", "nms", "pip uninstall torchvision")
    with pytest.raises(DitAttnError, match=r"nms does not exist.*torchmetrics loads it"):
        score("ssim", torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    with pytest.raises(DitAttnError, match=r"nms does not exist.*torchmetrics loads it"):
        metrics.check_metrics(["ms-ssim"], None)


def test_ctrl_c_exits_with_130(cli, monkeypatch):
    def interrupted(args):
        raise KeyboardInterrupt

    monkeypatch.setattr(generate, "run", interrupted)
    assert cli("generate").code == 130


@pytest.mark.parametrize("command", ["generate", "models", "explain", "doctor", "demo", "train"])
def test_every_command_has_help(command, cli, capsys):
    with pytest.raises(SystemExit) as end:
        cli(command, "--help")
    assert end.value.code == 0
