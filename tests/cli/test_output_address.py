"""``--output`` at an fsspec address: the bytes of a local folder, resumed and merged; what is lost is one line."""

from __future__ import annotations

import json
from collections.abc import Iterator

import numpy as np
import pytest

from dit_attn import remote
from dit_attn.cli import groups_of, item_report, outputs, runner
from dit_attn.cli.outputs import Media
from dit_attn.errors import RunStopped
from dit_attn.remote import RemotePath
from tests._support import address_systems
from tests._support.address_systems import FailingFiles
from tests.cli.conftest import FAST

PROMPTS = ("--prompt", "a large red circle at the left on white", "--prompt", "a large blue square on white")
RUN = RemotePath("memory://run/a")


@pytest.fixture(autouse=True)
def systems(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    address_systems.register()
    monkeypatch.setattr(remote, "PAUSES", ())
    yield
    address_systems.register()


def content(folder: remote.Place, ending: str) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in remote.names_in(folder) if name.endswith(ending)}


def test_the_items_of_an_address_are_those_of_a_folder_and_are_resumed(image, tmp_path, monkeypatch):
    assert image(*PROMPTS, "--output", tmp_path / "local").code == 0
    done = image(*PROMPTS, "--output", RUN)
    assert done.code == 0 and f"contact sheet: {RUN}/sheet.png" in done.out
    made = content(RUN, ".png")
    images = {name: data for name, data in content(tmp_path / "local", ".png").items() if name != "sheet.png"}
    assert len(images) == 2 and {name: made[name] for name in images} == images and set(made) - set(images)
    report = json.loads((RUN / "run.json").read_bytes())
    assert report["folder"] == str(RUN) and {item["file"] for item in report["items"]} == {f"{RUN}/{n}" for n in images}
    for name in images:
        sidecar = json.loads((RUN / name).with_suffix(".json").read_bytes())
        assert sidecar["file"] == name and sidecar["seconds"] > 0
    assert not any(name.startswith(".") for name in RUN.names())

    (RUN / min(images)).write_bytes(b"damaged")
    again = image(*PROMPTS, "--output", RUN, "--resume", "--no-contact-sheet")
    assert again.code == 0 and again.out.count("already there") == 1
    assert {name: content(RUN, ".png")[name] for name in images} == images
    monkeypatch.setattr(runner, "call_pipeline", lambda *given: pytest.fail("made again"))
    assert image(*PROMPTS, "--output", RUN, "--resume").out.count("already there") == 2
    assert image(*PROMPTS, "--output", f"file://{tmp_path}/local", "--resume").out.count("already there") == 2


def test_another_job_at_the_same_name_is_not_overwritten(image):
    assert image(*PROMPTS[:2], "--output", RUN).code == 0
    assert image(*PROMPTS[:2], "--output", RUN, "--guidance-scale", "3.5").code == 0
    assert len(content(RUN, ".png")) == 2 and len(content(RUN, ".json")) == 3


def test_a_name_that_is_taken_while_an_item_is_made_gets_the_jobs_hash(monkeypatch):
    media, place = Media(np.zeros((1, 8, 8, 3), np.uint8), False), outputs.place

    def overtaken(folder, stem, digest):  # asked first, the name is free; then another process takes it
        found = place(folder, stem, digest)
        (RUN / "a.json").create(b'{"job_hash": "other"}')
        return found

    monkeypatch.setattr(outputs, "place", overtaken)
    digest = "0123456789"
    path = outputs.save(media, RUN, "a", digest, 8, {}, lambda name, sha256: {"file": name, "job_hash": digest})
    assert path.name == "a_01234567.png" and json.loads(path.with_suffix(".json").read_bytes())["file"] == path.name
    assert json.loads((RUN / "a.json").read_bytes()) == {"job_hash": "other"}


def test_a_comparison_arrives_with_its_page_and_is_resumed(cli, monkeypatch):
    words = ("compare", "--model", "tiny-image", *FAST, *PROMPTS, "--metrics", "none", "--output", "memory://cmp")
    words = (*words, "--method", "block-sparse:density=0.5")
    assert cli(*words).code == 0
    folder = RemotePath("memory://cmp")
    page, results = (folder / "report.html").read_bytes(), json.loads((folder / "results.json").read_bytes())
    assert page.count(b"data:image/png;base64") >= 4 and {"dense", "block-sparse-density-0-5"} <= folder.names()
    takes = {(item["variant"], item["index"]): item for item in results["takes"]}
    monkeypatch.setattr(runner, "call_pipeline", lambda *given: pytest.fail("made again"))
    assert cli(*words, "--resume").code == 0
    again = json.loads((folder / "results.json").read_bytes())
    assert {(item["variant"], item["index"]): item for item in again["takes"]} == takes


def test_parts_at_an_address_are_merged_there(cli, image):
    for number in (2, 1):
        assert image(*PROMPTS, "--output", RUN, "--shard", f"{number}/2").code == 0
    assert cli("merge", RUN).code == 0
    report = json.loads((RUN / "run.json").read_bytes())
    assert [item["index"] for item in report["items"]] == [0, 1] and (RUN / "sheet.png").is_file()
    RemotePath(report["items"][1]["file"]).unlink()
    cli("merge", RUN).refused("is missing; copy the files of all parts")
    cli("merge", "memory://nothing").refused("has no report of a part")
    cli("merge", "nothing://x").refused("FOLDER nothing://x: fsspec knows no protocol")


def test_workers_write_to_the_address_and_refuse_one_that_they_do_not_see(image, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", address_systems.install(tmp_path / "entry"))
    folder = f"shared://{tmp_path}/run"
    assert image(*PROMPTS, "--output", tmp_path / "local").code == 0
    assert image(*PROMPTS, "--output", folder, "--workers", "1").code == 0
    assert content(tmp_path / "run", "42.png") == content(tmp_path / "local", "42.png")
    assert "worker" in json.loads(next((tmp_path / "run").glob("0000*.json")).read_text())
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.startswith(".")]
    image(*PROMPTS, "--output", RUN, "--workers", "1").refused(f"does not see the files of --output {RUN}")


def test_native_passes_are_kept_at_the_address(cli, monkeypatch):
    words = ("generate", "--model", "tiny-image", *PROMPTS[:2], "--steps", "4", "--height", "128", "--width", "128")
    words = (*words, "--high-resolution", "--dense", "--output", RUN)
    assert cli(*words).code == 0
    made = content(RUN, ".png")
    assert [name.endswith(".safetensors") for name in (RUN / "native").names()] == [True]
    (RUN / next(iter(made))).unlink()
    assert cli(*words, "--resume").code == 0 and content(RUN, ".png") == made


def test_an_address_that_is_lost_ends_the_run_in_one_line_and_is_resumed(image, monkeypatch):
    save, saved = outputs.save, []

    def losing(*given):
        saved.append(given)
        FailingFiles.errors[:] = [None, None, RuntimeError("down")] if len(saved) == 2 else []
        return save(*given)

    monkeypatch.setattr(outputs, "save", losing)
    image(*PROMPTS, "--output", "failing://run").refused(
        "cannot write failing://run/0001_a-large", "(RuntimeError: down)", "run the same command with --resume"
    )
    monkeypatch.setattr(outputs, "save", save)
    FailingFiles.errors.clear()
    assert image(*PROMPTS, "--output", "failing://run", "--resume").out.count("already there") == 1
    FailingFiles.errors[:] = [None, None, RuntimeError("down")]  # reached, probed; then nobody knows what is there
    with pytest.raises(RunStopped, match=r"cannot read failing://run/a.json \(RuntimeError: down\)"):
        FailingFiles.errors[:] = [RuntimeError("down")]
        outputs.read_sidecar(RemotePath("failing://run/a.json"))


def test_an_address_that_is_lost_behind_the_last_item_is_one_line(image, monkeypatch):
    def losing(*given):
        FailingFiles.errors[:] = [RuntimeError("down")]
        RemotePath("failing://run/0000.png").read_bytes()

    monkeypatch.setattr(item_report, "write", losing)
    done = image(*PROMPTS[:2], "--output", "failing://run")
    done.refused("cannot reach failing://run/0000.png (RuntimeError: down); finished items are saved", "--resume")


def test_an_address_without_rights_is_refused_before_weights_are_loaded(image, monkeypatch):
    monkeypatch.setattr("dit_attn.cli.run_record.load_run", lambda *given, **more: pytest.fail("loaded"))
    FailingFiles.errors[:] = [PermissionError("Access Denied")]
    image(*PROMPTS, "--output", "failing://run").refused("cannot reach --output failing://run (Access Denied); check")
    FailingFiles.errors[:] = [None, PermissionError("Access Denied")]  # it may be listed, and not written
    image(*PROMPTS, "--output", "failing://run").refused("cannot reach --output failing://run (Access Denied); check")
    assert not FailingFiles.store


def test_a_dry_run_writes_nothing(image):
    assert str(RUN) in image(*PROMPTS, "--output", RUN, "--dry-run").out and not RUN.exists()


def test_commands_say_whether_they_take_an_address():
    taking = {name for name in ("generate", "edit", "compare") if _output(name).address}
    assert taking == {"generate", "edit", "compare"} and not _output("inspect").address


def _output(name):
    return next(flag for group in groups_of(name).values() for flag in group if flag.name == "output")
