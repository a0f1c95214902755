"""What the stages will cost: operations add up, windows and native passes are cheaper, a store has to fit."""

from __future__ import annotations

import pytest
import torch

from dit_attn import DitAttnError, InwardWindow, explain, models
from dit_attn.pipelines import HighResolution
from dit_attn.pipelines.high_resolution import estimate
from tests._support.compose import tiny_pipeline


def test_shares_add_up_and_follow_the_operations() -> None:
    pipe = models.load("tiny-image")
    found = HighResolution(pipe, sigma=0.6).explain(256, 256, num_inference_steps=10)
    names = ["native pass", "decode 128 x 128", "encode 256 x 256", "denoise", "decode 256 x 256"]
    assert [stage.name for stage in found.stages] == names
    assert sum(stage.share for stage in found.stages) == pytest.approx(1.0)
    native, denoise = found.stages[0], found.stages[3]
    assert (native.tokens, denoise.tokens, native.steps) == (1024, 4096, 10) and 0 < denoise.steps < 10
    assert native.operations == 2 * 10 * explain(pipe, height=128, width=128).operations
    assert native.density == 1.0 and 0.25 <= denoise.density < 0.4  # windows of a quarter, in full tiles
    decode = found.stages[4].operations / found.stages[1].operations
    assert decode == pytest.approx(4.0) and denoise.memory > native.memory
    dense = HighResolution(pipe, None, sigma=0.6).explain(256, 256, num_inference_steps=10, guided=False)
    assert dense.dense == 1.0 < found.dense and dense.stages[0].operations == native.operations / 2
    assert "4,096 tokens" in str(found) and found.to_dict()["stages"][3]["tokens"] == 4096


def test_the_twin_pass_and_its_store_are_counted() -> None:
    pipe = models.load("tiny-image")
    window = InwardWindow(override="text", interval=2)
    plain, twin = (HighResolution(pipe, one).explain(256, 256) for one in (InwardWindow(), window))
    steps, dense = twin.stages[3].steps, explain(pipe, height=256, width=256).operations
    extra = twin.stages[3].operations - plain.stages[3].operations
    assert extra == pytest.approx(2 * dense * -(-steps // 2)) and twin.store > 0 == plain.store
    there = HighResolution(pipe, InwardWindow(override="text", offload=True)).explain(256, 256)
    layers = explain(pipe).layers
    assert there.store == there.host_store == twin.store and twin.host_store == 0
    assert twin.stages[3].memory - there.stages[3].memory == twin.store - 2 * twin.store // layers
    assert "of it in main" in str(there)


def test_latents_are_neither_decoded_nor_encoded_in_between() -> None:
    found = HighResolution(models.load("tiny-joint"), space="latent").explain(256, 256)
    assert [stage.name for stage in found.stages] == ["native pass", "denoise", "decode 256 x 256"]


def test_a_store_larger_than_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(estimate, "free_memory", lambda device: 1000)
    pipe = models.load("tiny-image")
    make = HighResolution(pipe, InwardWindow(override="text"))
    with pytest.raises(DitAttnError, match=r"what the twin pass leaves takes .* MiB, and cpu has"):
        make("a red circle", height=256, width=256)
    make.check_store(256, 256, (256, 256), None)
    with pytest.raises(DitAttnError, match="offload=true"):
        estimate.check_store(1001, False, torch.device("cuda"))


@pytest.mark.parametrize("name", ["wan", "ltx"])
def test_clips_are_estimated_too(name: str) -> None:
    pipe, _ = tiny_pipeline(name)
    found = HighResolution(pipe, sigma=0.9).explain(128, 128, native=(64, 64), num_frames=9, num_inference_steps=4)
    assert all(stage.operations > 0 and stage.memory > 0 for stage in found.stages)
