"""Several processes, or one that was interrupted, leave the files that one process leaves."""

from __future__ import annotations

import json
import os
import shutil
import socket

import pytest
import torch
from accelerate import Accelerator

from dit_attn.cli.workers import join_workers
from dit_attn.errors import DitAttnError
from dit_attn.pipelines.anomaly import AnomalyGenerator, Backbone, Concept, GenerateConfig, MaskSource, TrainConfig
from dit_attn.pipelines.anomaly.manifest import read_rows
from dit_attn.pipelines.anomaly.rounds import Rounds
from dit_attn.pipelines.anomaly.sources import from_folders
from dit_attn.pipelines.anomaly.training import ConceptTraining, check_batch, train
from tests._support.inspection_pipelines import data, tiny_pipeline
from tests._support.ranks import run_ranks

PAIR, COUNTS = ("metal", "hole"), {("metal", "hole"): 5}
TRAIN = TrainConfig(steps=4, batch=4, tokens=2, mask_tokens=1, lora_rank=2, lora_after=0.3, save_every=2)
GENERATE = GenerateConfig(steps=2, batch=2, retries=1)


def _source(folder):
    place = folder / "data"
    return from_folders(place / "normal", place / "defects", place / "masks", *PAIR)


def _generate(folder, name, worker=None):
    concept = Concept.load(folder / "one" / "concept.safetensors")
    masks = {PAIR: MaskSource("real", concept.shapes["+".join(PAIR)])}
    normals = _source(folder).normals
    return AnomalyGenerator(tiny_pipeline(), concept, GENERATE).run(
        folder / name, normals, COUNTS, masks, controls=2, worker=worker
    )


def _work(rank, folder, port):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    _, worker = join_workers(torch.device("cpu"), True)
    assert (worker.rank, worker.size) == (rank, 2)
    train(Backbone(tiny_pipeline(), 32), _source(folder), TRAIN, folder / "two")
    train(Backbone(tiny_pipeline(), 32), _source(folder), TRAIN, folder / "resumed", resume=True)
    summary = _generate(folder, "pairs_two", worker)
    assert summary["pairs"]["metal+hole"]["wanted"] == 5


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a training and a run of pairs of one process, and of two."""
    folder, threads = tmp_path_factory.mktemp("workers"), torch.get_num_threads()
    data(folder / "data")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    torch.set_num_threads(1)  # as in the processes: other numbers of threads round otherwise
    train(Backbone(tiny_pipeline(), 32), _source(folder), TRAIN, folder / "one")
    _generate(folder, "pairs_one")
    cut = ConceptTraining(Backbone(tiny_pipeline(), 32), _source(folder), TRAIN)
    for _ in range(2):
        cut.update(Accelerator(cpu=True))
    cut.save(folder / "resumed")
    run_ranks(_work, 2, folder, port)
    yield folder
    torch.set_num_threads(threads)


def _tree(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("name", ["two", "resumed"])
def test_two_processes_learn_what_one_learns(name, place):
    one, two = (torch.load(place / which / "checkpoint.pt", weights_only=True) for which in ("one", name))
    assert two["losses"] == pytest.approx(one["losses"], rel=1e-4) and len(two["losses"]) == 4
    learned, same = (Concept.load(place / which / "concept.safetensors") for which in ("one", name))
    for name, value in learned.state_dict().items():
        torch.testing.assert_close(same.state_dict()[name], value, rtol=1e-2, atol=1e-3)


def test_two_processes_make_the_pairs_of_one_byte_for_byte(place):
    one, two = _tree(place / "pairs_one"), _tree(place / "pairs_two")
    assert {str(path) for path in one if path.suffix != ".png"} == {"manifest.jsonl", "summary.json"}
    assert len(read_rows(place / "pairs_one" / "manifest.jsonl")) >= 5
    assert one == two


def test_what_processes_left_behind_is_gone_on_with_to_the_same_bytes(place, tmp_path):
    whole, left = place / "pairs_one", tmp_path / "left"
    rows = (whole / "manifest.jsonl").read_text().splitlines(keepends=True)
    left.mkdir()
    (left / "manifest.jsonl").write_text(rows[0] + rows[1][: len(rows[1]) // 2])
    (left / "manifest-1.jsonl").write_text(rows[-1])
    for row in map(json.loads, (rows[0], rows[-1])):
        for path in (row["generated"], row["mask_file"]):
            (left / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(whole / path, left / path)
    _generate(place, left)
    assert _tree(left) == _tree(whole)


def test_a_round_is_of_the_pairs_whose_earlier_attempts_were_rejected():
    def row(number, attempt, decision):
        return {"product": "nut", "defect": "hole", "number": number, "attempt": attempt, "decision": decision}

    rounds = Rounds({("nut", "hole"): 5}, 2, 1)
    numbers = [[pair[2] for pair in pairs] for pairs in rounds.open(0)]
    assert numbers == [[0, 1], [2, 3], [4]] and rounds.open(1) == []
    rounds.add([row(i, 0, "accepted" if i in (1, 4) else "rejected") for i in (4, 3, 1, 0)])
    assert [[pair[2] for pair in pairs] for pairs in rounds.open(0)] == [[2, 3]]  # of the same pairs as before
    assert (rounds.finished, rounds.rejected) == (2, 2)
    rounds.add([row(2, 0, "rejected"), row(0, 1, "rejected")])
    assert [[pair[2] for pair in pairs] for pairs in rounds.open(1)] == [[0, 2], [3]] and rounds.finished == 3
    made = [(one["number"], one["attempt"]) for one in rounds.rows()]
    assert made == [(0, 0), (0, 1), (1, 0), (2, 0), (3, 0), (4, 0)]


def test_a_batch_that_does_not_divide_is_refused():
    check_batch(4, 2)
    with pytest.raises(DitAttnError, match="--train-batch 4 is shared by 3 processes"):
        check_batch(4, 3)
