"""`compare` on workers and in parts: the files and figures of one process."""

from __future__ import annotations

import json

import pytest

WORDS = ("compare", "--model", "tiny-image", "--prompt", "a large red circle at the left on white", "--seeds", "0,1,2")
SMALL = ("--height", "64", "--width", "64", "--steps", "2", "--method", "block-sparse:density=0.5,dense_steps=0")
TIMES = {"seconds", "dense_seconds"}


def images(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("0*.png")}


def figures(folder):
    """The results without what the clock says."""
    results = json.loads((folder / "results.json").read_text())
    takes = [{key: value for key, value in take.items() if key not in TIMES} for take in results["takes"]]
    metrics = [row["metrics"] for row in results["headline"]]
    maps = {label: (one["density"], one["error"]) for label, one in results["maps"].items()}
    return takes, metrics, maps


def test_workers_and_parts_make_the_files_and_figures_of_one_process(cli, tmp_path, engine):
    assert cli(*WORDS, *SMALL, "-o", "alone").code == 0
    made = images(tmp_path / "alone")
    assert len(made) == 6
    outcome = cli(*WORDS, *SMALL, "-o", "workers", *engine)
    assert outcome.code == 0, outcome.err
    assert images(tmp_path / "workers") == made and figures(tmp_path / "workers") == figures(tmp_path / "alone")
    sidecar = json.loads(next((tmp_path / "workers/dense").glob("0*.json")).read_text())
    assert "worker " in sidecar["worker"] and sidecar["compare"]["variant"] == "dense"
    for number in (1, 2):
        outcome = cli(*WORDS, *SMALL, "-o", "parts", "--shard", f"{number}/2")
        assert outcome.code == 0 and "`dit-attn merge parts`" in outcome.out, outcome.err
    assert not (tmp_path / "parts/results.json").exists()
    outcome = cli("merge", "parts")
    assert outcome.code == 0 and "figures" in outcome.out, outcome.err
    assert images(tmp_path / "parts") == made and figures(tmp_path / "parts") == figures(tmp_path / "alone")
    assert (tmp_path / "parts/report.html").is_file()
    next((tmp_path / "parts/dense").glob("0001*.png")).unlink()
    cli("merge", "parts").refused("0001_", "of dense is not in parts", "run part 2/2 again with --resume")


@pytest.mark.parametrize("flag", [("--workers", "2"), ("--shard", "1/2")])
def test_matching_needs_one_process(cli, flag):
    cli(*WORDS, *SMALL, "--method", "softpag", "--match-strength", *flag).refused("--match-strength measures in one")
