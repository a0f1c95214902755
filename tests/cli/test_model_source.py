"""Where a model is, and what tells two of them apart."""

from __future__ import annotations

import shutil
import socket

import pytest

from dit_attn.cli.model_source import fingerprint


def test_a_copy_is_the_same_model_and_changed_weights_are_not(tmp_path):
    folder = tmp_path / "model"
    (folder / "transformer").mkdir(parents=True)
    (folder / "model_index.json").write_text("{}")
    weights = folder / "transformer" / "weights.safetensors"
    weights.write_bytes(bytes(range(256)) * 20_000)  # 5 MB
    before = fingerprint(folder)
    shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)  # new times
    assert fingerprint(tmp_path / "copy") == before == fingerprint(folder)
    weights.write_bytes(bytes(255 - i for i in range(256)) * 20_000)
    assert fingerprint(folder) != before
    weights.rename(weights.with_name("other.safetensors"))
    assert fingerprint(folder) != before


def test_a_hub_that_cannot_be_reached_costs_one_line_at_once(cli, monkeypatch):
    from huggingface_hub import constants

    def refuse(*args, **kwargs):
        raise OSError("no route")

    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "create_connection", refuse)
    outcome = cli("generate", "--model", "someone/something", "--prompt", "x")
    outcome.refused("not in the local cache", "cannot be reached", "give a local folder")
    assert constants.HF_HUB_OFFLINE  # nothing is retried


@pytest.mark.parametrize("size", (0, 10))
def test_small_files_count_whole(tmp_path, size):
    file = tmp_path / "adapter.bin"
    file.write_bytes(b"a" * size)
    before = fingerprint(file)
    file.write_bytes(b"a" * size + b"b")
    assert fingerprint(file) != before
