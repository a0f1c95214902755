"""Saved methods: settings and tensors are one unit, in a folder and on the Hub, which is faked here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError

import dit_attn
from dit_attn import BlockSparse, DitAttnError, Method, hub
from dit_attn.processors.methods.saved import FILE_NAME, TENSORS
from tests._support.compose import tiny
from tests._support.learning import HeadGate, SpanLift, registered, values

FILE = TENSORS["transformer"]


class FakeHub:
    """Repositories as folders; what a client calls."""

    def __init__(self, root: Path) -> None:
        self.root, self.commits = root, []  # type: ignore[var-annotated]

    def create_repo(self, repo_id: str, exist_ok: bool) -> None:
        (self.root / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def create_commit(self, repo_id: str, operations: Any, **kwargs: Any) -> str:
        for part in operations:
            path = self.root / repo_id / part.path_in_repo
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(part.path_or_fileobj)
        self.commits.append((repo_id, sorted(part.path_in_repo for part in operations), kwargs))
        return f"https://hub/{repo_id}/commit/{len(self.commits)}"

    def download(self, repo_id: str, filename: str, local_files_only: bool) -> str:
        path = self.root / repo_id / filename
        if not path.is_file():
            raise LocalEntryNotFoundError("404")
        return str(path)


@pytest.fixture
def fake_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    fake = FakeHub(tmp_path / "hub")
    for name in ("create_repo", "create_commit"):
        monkeypatch.setattr(huggingface_hub.HfApi, name, staticmethod(getattr(fake, name)))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fake.download)
    monkeypatch.setattr(hub, "is_offline", lambda: False)
    monkeypatch.chdir(tmp_path)
    return fake


def test_a_session_is_pushed_in_one_commit_and_enabled_from_there(fake_hub: FakeHub) -> None:
    model, _ = tiny("wan")
    session = dit_attn.enable(model, SpanLift(start=2.0))
    assert session.push_to_hub("me/lift", revision="dev") == "https://hub/me/lift/commit/1"
    about = {"commit_message": "Upload span-lift", "revision": "dev"}
    assert fake_hub.commits == [("me/lift", [FILE_NAME, FILE], about)]
    dit_attn.disable(model)
    with registered(SpanLift):
        session = dit_attn.enable(model, "me/lift")
    assert session.methods == (SpanLift(weights="me/lift", start=2.0),)
    assert all(bool((value == 2).all()) for value in values(model))


def test_several_methods_are_pushed_into_folders_of_one_repository(fake_hub: FakeHub) -> None:
    model, _ = tiny("wan")
    dit_attn.enable(model, SpanLift(start=2.0), HeadGate(start=3.0)).push_to_hub("me/both")
    files = [f"{name}/{file}" for name in ("head_gate", "span_lift") for file in (FILE_NAME, FILE)]
    assert fake_hub.commits[0][1] == files
    dit_attn.disable(model)
    with registered(SpanLift, HeadGate):
        dit_attn.enable(model, "me/both/head_gate")
    assert all(bool((value == 3).all()) for value in values(model))


def test_settings_alone_are_pushed_without_tensors_and_named_ones_with_them(fake_hub: FakeHub) -> None:
    BlockSparse(density=0.125).push_to_hub("me/plain")
    assert Method.from_pretrained("me/plain") == BlockSparse(density=0.125)
    model, _ = tiny("wan")
    dit_attn.enable(model, SpanLift()).push_to_hub("me/lift")
    with registered(SpanLift):
        Method.from_pretrained("me/lift").push_to_hub("me/copy")
        SpanLift().push_to_hub("me/fresh")
    assert [len(commit[1]) for commit in fake_hub.commits] == [1, 2, 2, 1]
    originals = [(fake_hub.root / "me" / name / FILE).read_bytes() for name in ("lift", "copy")]
    assert originals[0] == originals[1]


def test_tensors_that_the_hub_does_not_have_cost_one_line(fake_hub: FakeHub) -> None:
    model, _ = tiny("wan")
    dit_attn.enable(model, SpanLift()).push_to_hub("me/lift")
    dit_attn.disable(model)
    (fake_hub.root / "me/lift" / FILE).unlink()
    with registered(SpanLift), pytest.raises(DitAttnError, match=r"no dit_attn_method\.safetensors at 'me/lift'"):
        dit_attn.enable(model, "me/lift")
    assert not values(model)


def test_a_folder_that_cannot_be_written_keeps_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = tiny("wan")
    session = dit_attn.enable(model, SpanLift())
    session.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    stock = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if path.suffix == ".json":
            raise OSError(28, "No space left on device")
        return stock(path, data)

    with torch.no_grad():
        values(model)[0].fill_(1.0)
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DitAttnError, match=r"cannot save span.lift to .* \(No space left on device\)"):
        session.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
