"""The runner of anomalib's data modules reports what is not as written."""

from __future__ import annotations

import copy

import pytest

from dit_attn.pipelines.anomaly.exports import export
from tests.readers import run


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    """What was written by data module, and a reader's report that agrees with it."""
    folder = tmp_path_factory.mktemp("readers")
    pairs, normals = run.write_pairs(folder / "made")
    for name in run.FORMATS:
        export(folder, name, pairs, normals)
    wanted = run.expected(folder, pairs, normals)
    items = {name: [{"file": file, "split": "test", **item} for file, item in one.items()]
             for name, one in wanted.items()}  # fmt: skip
    return wanted, {name: {"items": one, "batches": [[2, 40, 48]]} for name, one in items.items()}


def test_every_pair_and_normal_image_is_expected_once_a_format(loaded):
    wanted, given = loaded
    results = {name: run.compare(wanted[name], given[name]) for name in wanted}
    assert set(results) == {"mvtec/nut", "mvtec/leather", "folder"}
    assert results["mvtec/nut"] == {"normal": 10, "abnormal": 36, "masks_equal": 36, "problems": []}
    assert results["folder"] == {"normal": 20, "abnormal": 48, "masks_equal": 48, "problems": []}


def test_swapped_masks_lost_images_and_defects_in_training_are_problems(loaded):
    wanted, given = loaded
    damaged = copy.deepcopy(given["mvtec/nut"])
    defects = [item for item in damaged["items"] if item["label"]]
    defects[0]["mask"], defects[1]["mask"] = defects[1]["mask"], defects[0]["mask"]
    defects[2]["split"] = "train"
    damaged["items"].remove(defects[3])
    found = run.compare(wanted["mvtec/nut"], damaged)
    assert found["abnormal"] == 35 and found["masks_equal"] == 33
    assert sorted(problem.split(": ")[1].split(" ")[0] for problem in found["problems"]) == ["a", "mask", "mask", "not"]
